//! What is large: a download that goes on where it broke off, an upload in parts.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use step::Failure;
use tokio::task::JoinSet;

use crate::client::unsigned;
use crate::fault::{Fault, Waits, innermost, try_again};
use crate::{Bucket, Condition, Object, Put, Written};

/// How many parts of an upload travel at once: so many lie in memory.
const AT_ONCE: usize = 4;

/// The size of a part: S3 takes at most 10,000 of them.
const fn part_size(size: u64) -> u64 {
    let (least, scaled) = (16 << 20, size.div_ceil(9000));
    if scaled > least { scaled } else { least }
}

impl Bucket {
    /// Hands on an object, or a `range` of it, piece by piece and in order; `None` if there is none.
    ///
    /// A connection that breaks off is made again, from the byte where it did: each byte is handed on
    /// once. That they are the right ones is for the caller to check. `on` may refuse to go on.
    pub async fn fetch(
        &self,
        name: &str,
        range: Option<Range<u64>>,
        mut on: impl FnMut(&[u8]) -> Result<(), Failure> + Send,
    ) -> Result<Option<Object>, Failure> {
        let start = range.as_ref().map_or(0, |range| range.start);
        let mut object: Option<Object> = None;
        // Bytes handed on, and how many there will be once that is known.
        let (mut done, mut all) = (0, None);
        let mut waits = Waits::default();
        while all.is_none_or(|all| done < all) {
            let from = start + done;
            let bytes = match &range {
                Some(range) if range.is_empty() => return self.head(name).await,
                Some(range) => Some(format!("bytes={from}-{}", range.end - 1)),
                None => (from > 0).then(|| format!("bytes={from}-")),
            };
            let request = self.client.get_object().bucket(&self.location.bucket);
            let request = request.key(self.location.key(name)).set_range(bytes);
            // Not half of one object and half of the next.
            let request = request.set_if_match(object.as_ref().map(|object| object.etag.clone()));
            let why = match request.send().await.map_err(|e| Fault::of(e, self.place(), name)) {
                Ok(mut answer) => {
                    let same = |object: &Object| answer.e_tag.as_ref() == Some(&object.etag);
                    if !object.as_ref().is_none_or(same) {
                        return Err(self.failure(name, Fault::Refused));
                    }
                    let here = unsigned(answer.content_length);
                    all.get_or_insert(done + here);
                    let whole = answer.content_range.as_deref().and_then(|of| {
                        of.rsplit_once('/').and_then(|(_, whole)| whole.parse().ok())
                    });
                    object.get_or_insert_with(|| Object {
                        size: whole.unwrap_or(here),
                        etag: answer.e_tag.take().unwrap_or_default(),
                        content_type: answer.content_type.take(),
                        content_encoding: answer.content_encoding.take(),
                        cache_control: answer.cache_control.take(),
                        metadata: answer.metadata.take().into_iter().flatten().collect(),
                        sha256: None,
                    });
                    let before = done;
                    let why = loop {
                        match answer.body.next().await {
                            Some(Ok(part)) => {
                                done += part.len() as u64;
                                on(&part)?;
                            }
                            Some(Err(error)) => break innermost(&error),
                            None => break "the connection ended early".to_string(),
                        }
                    };
                    if done > before {
                        waits.moved();
                    }
                    why
                }
                Err(Fault::Passing(why)) => why,
                Err(Fault::Missing) if object.is_none() => return Ok(None),
                Err(fault) => return Err(self.failure(name, fault)),
            };
            if all.is_none_or(|all| done < all) {
                waits.wait(self.place(), name, why).await.map_err(|f| self.failure(name, f))?;
            }
        }
        if Some(done) != all {
            return Err(self.place().failure(name, "more came than was announced"));
        }
        Ok(object)
    }

    /// Writes a file as an object, in parts of which four travel at once if it is larger than one;
    /// `sent` is told how many bytes have gone, each time some have.
    ///
    /// # Errors
    /// What [`Bucket::put`] fails by, and a file that changes or cannot be read. Parts that went are
    /// taken back.
    pub async fn put_file(
        &self,
        name: &str,
        path: &Path,
        put: &Put,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<Written, Failure> {
        let unreadable = |e| Failure::environment(format!("cannot read {}: {e}", path.display()));
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let size = file.metadata().map_err(unreadable)?.len();
        let file = Arc::new(file);
        if size <= part_size(size) {
            let bytes = read(&file, 0..size).await.map_err(unreadable)?;
            let written = self.put(name, bytes, put).await?;
            sent(size);
            return Ok(written);
        }
        let before = self.head(name).await?.map(|object| object.etag);
        if put.condition == Condition::New && before.is_some() {
            return Ok(Written::Refused);
        }
        let upload = self.begin(name, put).await?;
        let parts = match self.send_parts(name, &upload, &file, size, sent).await {
            Ok(parts) => parts,
            Err(failure) => {
                self.abort(name, &upload).await;
                return Err(match failure {
                    PartFault::Read(e) => unreadable(e),
                    PartFault::Sent(failure) => failure,
                });
            }
        };
        let written = self.complete(name, &upload, parts, put, size, before.as_ref()).await;
        if !written.as_ref().is_ok_and(Written::is_now) {
            self.abort(name, &upload).await;
        }
        written
    }

    async fn begin(&self, name: &str, put: &Put) -> Result<String, Failure> {
        let upload = try_again(self.place(), name, || async {
            self.client
                .create_multipart_upload()
                .bucket(&self.location.bucket)
                .key(self.location.key(name))
                .set_content_type(put.content_type.clone())
                .set_content_encoding(put.content_encoding.clone())
                .set_cache_control(put.cache_control.clone())
                .set_metadata(Some(put.metadata.clone().into_iter().collect()))
                .checksum_algorithm(ChecksumAlgorithm::Crc32)
                .send()
                .await
                .map_err(|error| Fault::of(error, self.place(), name))
        });
        let upload = upload.await.map_err(|fault| self.failure(name, fault))?;
        upload.upload_id.ok_or_else(|| self.place().failure(name, "its upload got no name"))
    }

    async fn send_parts(
        &self,
        name: &str,
        upload: &str,
        file: &Arc<std::fs::File>,
        size: u64,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<CompletedPart>, PartFault> {
        let each = part_size(size);
        let mut starts = (0..size).step_by(usize::try_from(each).expect("a part fits in memory"));
        let mut travelling = JoinSet::new();
        let mut parts = Vec::new();
        loop {
            while travelling.len() < AT_ONCE
                && let Some(start) = starts.next()
            {
                let range = start..(start + each).min(size);
                let number = i32::try_from(start / each + 1).expect("at most 10,000 parts");
                let (bucket, file) = (self.clone(), file.clone());
                let (name, upload) = (name.to_string(), upload.to_string());
                travelling.spawn(async move {
                    let length = range.end - range.start;
                    let bytes = read(&file, range).await.map_err(PartFault::Read)?;
                    let part = bucket.send_part(&name, &upload, number, bytes).await;
                    part.map(|part| (part, length)).map_err(PartFault::Sent)
                });
            }
            // Those that still travel are dropped with the set.
            match travelling.join_next().await {
                Some(part) => {
                    let (part, length) = part.expect("no part panics")?;
                    sent(length);
                    parts.push(part);
                }
                None => break,
            }
        }
        parts.sort_by_key(|part| part.part_number);
        Ok(parts)
    }

    async fn send_part(
        &self,
        name: &str,
        upload: &str,
        number: i32,
        bytes: Bytes,
    ) -> Result<CompletedPart, Failure> {
        let part = try_again(self.place(), name, || async {
            self.client
                .upload_part()
                .bucket(&self.location.bucket)
                .key(self.location.key(name))
                .upload_id(upload)
                .part_number(number)
                .checksum_algorithm(ChecksumAlgorithm::Crc32)
                .body(bytes.clone().into())
                .send()
                .await
                .map_err(|error| Fault::of(error, self.place(), name))
        });
        let part = part.await.map_err(|fault| self.failure(name, fault))?;
        Ok(CompletedPart::builder()
            .part_number(number)
            .set_e_tag(part.e_tag)
            .set_checksum_crc32(part.checksum_crc32)
            .build())
    }

    async fn complete(
        &self,
        name: &str,
        upload: &str,
        parts: Vec<CompletedPart>,
        put: &Put,
        size: u64,
        before: Option<&String>,
    ) -> Result<Written, Failure> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let written = try_again(self.place(), name, || async {
            let request = self
                .client
                .complete_multipart_upload()
                .bucket(&self.location.bucket)
                .key(self.location.key(name))
                .upload_id(upload)
                .multipart_upload(parts.clone());
            let request = match &put.condition {
                Condition::Always => request,
                Condition::New => request.if_none_match("*"),
                Condition::Still(etag) => request.if_match(etag),
            };
            request.send().await.map_err(|error| Fault::of(error, self.place(), name))
        });
        match written.await {
            // An earlier attempt may have been carried out and its answer lost: the upload is gone, as
            // it has become the object.
            Err(fault @ (Fault::Missing | Fault::Lasting(_))) => match self.head(name).await? {
                Some(now) if now.size == size && Some(&now.etag) != before => {
                    Ok(Written::Now(now.etag))
                }
                _ => Err(self.failure(name, fault)),
            },
            other => self.written(name, put, other.map(|output| output.e_tag)),
        }
    }

    /// What cannot be taken back goes by the bucket's own rules.
    async fn abort(&self, name: &str, upload: &str) {
        let request = self.client.abort_multipart_upload().bucket(&self.location.bucket);
        let _ = request.key(self.location.key(name)).upload_id(upload).send().await;
    }
}

/// Why a part did not go.
enum PartFault {
    Read(std::io::Error),
    Sent(Failure),
}

async fn read(file: &Arc<std::fs::File>, range: Range<u64>) -> std::io::Result<Bytes> {
    let file = file.clone();
    let length = usize::try_from(range.end - range.start).expect("a part fits in memory");
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes.into())
    });
    read.await.expect("reading does not panic")
}

#[cfg(test)]
mod tests {
    use super::part_size;

    #[test]
    fn parts_grow_with_the_file() {
        for size in [0u64, 1 << 20, 16 << 20, 3 << 30, 1 << 40, 5 << 40] {
            let parts = size.div_ceil(part_size(size));
            assert!(parts <= 9000 && part_size(size) >= 16 << 20, "{size}: {parts}");
        }
        assert!(part_size(5 << 40) <= 5 << 30, "a part of S3 has at most 5 GiB");
    }
}
