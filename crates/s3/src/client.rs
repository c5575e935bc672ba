//! A bucket, opened: small objects whole, listings, and what a store can do.

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    self, BehaviorVersion, Credentials, ProvideCredentials, Region, ResponseChecksumValidation,
    SharedCredentialsProvider, SharedHttpClient,
};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::ChecksumMode;
use aws_smithy_http_client::{Builder, tls};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use step::Failure;

use crate::fault::{Fault, Place, innermost, no_credentials, try_again};
use crate::{Condition, Listed, Location, Object, Put, Settings, Written};

/// A place in an S3 store. Cheap to clone; requests may run side by side.
#[derive(Debug, Clone)]
pub struct Bucket {
    pub(crate) client: Client,
    pub(crate) location: Location,
    settings: Settings,
}

impl Bucket {
    /// Finds credentials and the region; makes no request to the store itself.
    ///
    /// # Errors
    /// No credentials, or no region for a store that is AWS.
    pub async fn open(location: &Location, settings: &Settings) -> Result<Self, Failure> {
        let mut loader = aws_config::defaults(BehaviorVersion::latest()).http_client(http());
        if let Some(region) = &settings.region {
            loader = loader.region(Region::new(region.clone()));
        }
        let found = loader.load().await;
        let place = Place { location, settings };
        let credentials =
            found.credentials_provider().ok_or_else(|| no_credentials(place, None))?;
        credentials
            .provide_credentials()
            .await
            .map_err(|error| no_credentials(place, Some(innermost(&error))))?;
        let mut settings = settings.clone();
        settings.region = settings.region.or_else(|| Some(found.region()?.to_string()));
        settings.endpoint = settings.endpoint.or_else(|| found.endpoint_url().map(str::to_string));
        if settings.region.is_none() && settings.endpoint.is_none() {
            return Err(Failure::input(format!("{location}: in which region is it?"))
                .hint("set its region, or AWS_REGION"));
        }
        Ok(Self::with(location, &settings, credentials))
    }

    pub(crate) fn with(
        location: &Location,
        settings: &Settings,
        credentials: SharedCredentialsProvider,
    ) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(5))
            .read_timeout(Duration::from_secs(120))
            .build();
        // Stores that are not AWS take any region, but a signature has one.
        let region = settings.region.clone().unwrap_or_else(|| "us-east-1".into());
        let mut config = config::Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .http_client(http())
            .credentials_provider(credentials)
            .region(Region::new(region))
            .force_path_style(settings.path_style)
            .timeout_config(timeouts)
            // What is tried again is decided in `fault`: the SDK knows nothing of a body that breaks off.
            .retry_config(RetryConfig::disabled())
            // Whoever reads compares digests of their own.
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        config.set_endpoint_url(settings.endpoint.clone());
        let client = Client::from_conf(config.build());
        Self { client, location: location.clone(), settings: settings.clone() }
    }

    /// With these keys and no others.
    pub fn with_keys(location: &Location, settings: &Settings, id: &str, secret: &str) -> Self {
        let keys = Credentials::new(id, secret, None, None, "given");
        Self::with(location, settings, SharedCredentialsProvider::new(keys))
    }

    pub fn location(&self) -> &Location {
        &self.location
    }

    pub(crate) fn place(&self) -> Place<'_> {
        Place { location: &self.location, settings: &self.settings }
    }

    /// What the store says of an object; `None` if there is none.
    pub async fn head(&self, name: &str) -> Result<Option<Object>, Failure> {
        let found = try_again(self.place(), name, || async {
            self.client
                .head_object()
                .bucket(&self.location.bucket)
                .key(self.location.key(name))
                .checksum_mode(ChecksumMode::Enabled)
                .send()
                .await
                .map_err(|error| Fault::of(error, self.place(), name))
        });
        self.found(name, found.await.map(described))
    }

    /// A whole object in memory; `None` if there is none. One of more than `limit` bytes is refused.
    pub async fn get(&self, name: &str, limit: u64) -> Result<Option<(Object, Bytes)>, Failure> {
        // Grown by doubling, it would be half empty when it is full.
        let mut all = Vec::with_capacity(usize::try_from(limit).unwrap_or(usize::MAX).min(8 << 20));
        let found = self.fetch(name, None, |part| {
            if (all.len() + part.len()) as u64 > limit {
                return Err(self.place().failure(name, "it is larger than it may be"));
            }
            all.extend_from_slice(part);
            Ok(())
        });
        let found = found.await?;
        Ok(found.map(|object| (object, all.into())))
    }

    /// Writes an object in one request: for up to some 16 MiB. What is larger goes by
    /// [`Bucket::put_file`].
    pub async fn put(&self, name: &str, bytes: Bytes, put: &Put) -> Result<Written, Failure> {
        let sha256 = put.sha256.then(|| BASE64.encode(Sha256::digest(&bytes)));
        let written = try_again(self.place(), name, || async {
            let mut request = self
                .client
                .put_object()
                .bucket(&self.location.bucket)
                .key(self.location.key(name))
                .set_content_type(put.content_type.clone())
                .set_content_encoding(put.content_encoding.clone())
                .set_cache_control(put.cache_control.clone())
                .set_metadata(Some(put.metadata.clone().into_iter().collect()))
                .set_checksum_sha256(sha256.clone())
                .body(bytes.clone().into());
            request = match &put.condition {
                Condition::Always => request,
                Condition::New => request.if_none_match("*"),
                Condition::Still(etag) => request.if_match(etag),
            };
            request.send().await.map_err(|error| Fault::of(error, self.place(), name))
        });
        let written = written.await.map(|output| output.e_tag);
        self.written(name, put, written)
    }

    /// Takes an object away; one that is not there is gone already.
    pub async fn delete(&self, name: &str) -> Result<(), Failure> {
        let gone = try_again(self.place(), name, || async {
            let request = self.client.delete_object().bucket(&self.location.bucket);
            let request = request.key(self.location.key(name));
            request.send().await.map_err(|error| Fault::of(error, self.place(), name))
        });
        self.found(name, gone.await).map(drop)
    }

    /// Every object whose name begins with `start`, page by page, by name.
    pub async fn list(
        &self,
        start: &str,
        mut on: impl FnMut(Listed) + Send,
    ) -> Result<(), Failure> {
        let above = self.location.key("");
        let mut next: Option<String> = None;
        loop {
            let page = try_again(self.place(), start, || async {
                self.client
                    .list_objects_v2()
                    .bucket(&self.location.bucket)
                    .prefix(self.location.key(start))
                    .set_continuation_token(next.clone())
                    .send()
                    .await
                    .map_err(|error| Fault::of(error, self.place(), start))
            });
            let page = page.await.map_err(|fault| self.failure(start, fault))?;
            for object in page.contents.unwrap_or_default() {
                let Some(key) = object.key else { continue };
                let name = key.strip_prefix(&above).unwrap_or(&key).to_string();
                on(Listed { name, size: unsigned(object.size) });
            }
            match page.next_continuation_token {
                Some(token) if page.is_truncated == Some(true) => next = Some(token),
                _ => return Ok(()),
            }
        }
    }

    /// Whether the store holds to conditions. Some take `If-None-Match` and write all the same: tried
    /// with an object below `name`, which is gone again afterwards.
    pub async fn is_conditional(&self, name: &str) -> Result<bool, Failure> {
        let name = format!("{name}/{:016x}", fastrand::u64(..));
        let put = |condition| async {
            let put = Put::when(condition);
            self.put(&name, Bytes::from_static(b"?"), &put).await
        };
        put(Condition::Always).await?;
        let holds = !put(Condition::New).await?.is_now()
            && !put(Condition::Still("\"another\"".into())).await?.is_now();
        self.delete(&name).await?;
        Ok(holds)
    }

    pub(crate) fn found<T>(
        &self,
        name: &str,
        found: Result<T, Fault>,
    ) -> Result<Option<T>, Failure> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(Fault::Missing) => Ok(None),
            Err(fault) => Err(self.failure(name, fault)),
        }
    }

    pub(crate) fn written(
        &self,
        name: &str,
        put: &Put,
        written: Result<Option<String>, Fault>,
    ) -> Result<Written, Failure> {
        match written {
            Ok(etag) => Ok(Written::Now(etag.unwrap_or_default())),
            Err(Fault::Refused) => Ok(Written::Refused),
            // What is gone is not what it was.
            Err(Fault::Missing) if matches!(put.condition, Condition::Still(_)) => {
                Ok(Written::Refused)
            }
            Err(fault) => Err(self.failure(name, fault)),
        }
    }

    pub(crate) fn failure(&self, name: &str, fault: Fault) -> Failure {
        match fault {
            Fault::Lasting(failure) => failure,
            Fault::Passing(why) => self.place().failure(name, &why),
            Fault::Missing => self.place().failure(name, "it is not there"),
            Fault::Refused => self.place().failure(name, "it has changed in between"),
        }
    }
}

fn http() -> SharedHttpClient {
    let ring = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
    Builder::new().tls_provider(ring).build_https()
}

fn described(head: HeadObjectOutput) -> Object {
    let sha256 = head.checksum_sha256.and_then(|text| BASE64.decode(text).ok()?.try_into().ok());
    Object {
        size: unsigned(head.content_length),
        etag: head.e_tag.unwrap_or_default(),
        content_type: head.content_type,
        content_encoding: head.content_encoding,
        cache_control: head.cache_control,
        metadata: head.metadata.unwrap_or_default().into_iter().collect(),
        sha256,
    }
}

pub(crate) fn unsigned(size: Option<i64>) -> u64 {
    size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0)
}
