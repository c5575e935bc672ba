//! What went wrong, whether it may pass, and how a person is told. Tries again what may.
//!
//! Knows nothing of what is transferred.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use step::Failure;

use crate::{Location, Settings};

/// How often something is tried in all, and how long at most between two attempts.
const ATTEMPTS: u32 = 8;
const LONGEST: Duration = Duration::from_secs(10);

/// What a request came to that did not come to what it was made for.
#[derive(Debug)]
pub(crate) enum Fault {
    /// There is no such object.
    Missing,
    /// The condition does not hold.
    Refused,
    /// It may go better next time.
    Passing(String),
    /// It will not.
    Lasting(Failure),
}

impl Fault {
    /// The fault of a request for `name`.
    pub fn of<E>(error: SdkError<E, HttpResponse>, at: Place<'_>, name: &str) -> Self
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let Some(response) = error.raw_response() else {
            let text = DisplayErrorContext(&error).to_string();
            return match &error {
                SdkError::ConstructionFailure(_) => Fault::Lasting(at.failure(name, &text)),
                // Credentials are asked for within a request, too.
                _ if text.contains("CredentialsNotLoaded") => {
                    Fault::Lasting(no_credentials(at, None))
                }
                _ => Fault::Passing(innermost(&error)),
            };
        };
        let status = response.status().as_u16();
        let region = response.headers().get("x-amz-bucket-region").map(str::to_string);
        let (code, message) = (error.code().unwrap_or_default(), error.message());
        let said = match (code, message) {
            ("", _) => format!("status {status}"),
            (code, Some(message)) => format!("{status} {code}: {message}"),
            (code, None) => format!("{status} {code}"),
        };
        match (status, code) {
            (404, "NoSuchBucket") => Fault::Lasting(
                at.failure(name, "there is no such bucket")
                    .hint("make it, or mend its name; a store that is not AWS needs its endpoint"),
            ),
            (404 | 410, _) => Fault::Missing,
            (304 | 412, _) => Fault::Refused,
            (301 | 307, _)
            | (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
                let region = region.map_or("its region".into(), |region| format!("`{region}`"));
                Fault::Lasting(
                    at.failure(name, &said).hint(format!("set the region to {region}")),
                )
            }
            // What was sent is not what arrived.
            (
                400,
                "BadDigest" | "IncompleteBody" | "RequestTimeout" | "XAmzContentSHA256Mismatch",
            )
            | (408 | 409 | 425 | 429 | 500..=599, _) => Fault::Passing(said),
            (403, "RequestTimeTooSkewed") => Fault::Lasting(
                at.failure(name, &said).hint("this machine's clock is wrong: set it"),
            ),
            (401 | 403, _) => Fault::Lasting(at.failure(name, &said).hint(
                "the credentials may not do this: see `aws sts get-caller-identity`, and the bucket's policy",
            )),
            // An answer that cannot be understood was damaged on its way.
            (200..=299, _) => Fault::Passing(format!("the answer cannot be read: {}", innermost(&error))),
            _ => Fault::Lasting(at.failure(name, &said)),
        }
    }
}

/// Where requests go, for messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub location: &'a Location,
    pub settings: &'a Settings,
}

impl Place<'_> {
    pub fn failure(&self, name: &str, what: &str) -> Failure {
        Failure::environment(format!("{}: {what}", self.shown(name)))
    }

    fn shown(&self, name: &str) -> String {
        let mut text = format!("s3://{}/{}", self.location.bucket, self.location.key(name));
        if let Some(endpoint) = &self.settings.endpoint {
            text += &format!(" at {endpoint}");
        }
        text
    }
}

pub(crate) fn no_credentials(at: Place<'_>, why: Option<String>) -> Failure {
    let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
    Failure::environment(format!("{}: there are no AWS credentials{why}", at.location))
        .hint("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
}

/// Does what may fault until it does not, or will not pass. `Missing` and `Refused` come back.
pub(crate) async fn try_again<T, F: Future<Output = Result<T, Fault>>>(
    at: Place<'_>,
    name: &str,
    mut once: impl FnMut() -> F,
) -> Result<T, Fault> {
    let mut waits = Waits::default();
    loop {
        match once().await {
            Err(Fault::Passing(why)) => waits.wait(at, name, why).await?,
            other => return other,
        }
    }
}

/// The waits between attempts: twice as long each time, by a share that chance decides, so that many
/// clients do not come back at once.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    attempts: u32,
}

impl Waits {
    /// Waits, or gives up.
    pub async fn wait(&mut self, at: Place<'_>, name: &str, why: String) -> Result<(), Fault> {
        self.attempts += 1;
        if self.attempts >= ATTEMPTS {
            let message = format!("{why}, {ATTEMPTS} times in a row");
            return Err(Fault::Lasting(
                at.failure(name, &message).hint("is the network up, and the endpoint right?"),
            ));
        }
        let longest = (Duration::from_millis(50) * (1 << self.attempts)).min(LONGEST);
        tokio::time::sleep(longest.mul_f64(fastrand::f64().max(0.1))).await;
        Ok(())
    }

    /// Something moved: what went before does not count.
    pub fn moved(&mut self) {
        self.attempts = 0;
    }
}

/// What lies at the bottom of an error: the SDK's upper layers say little.
pub(crate) fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
