//! The objects that a release consists of: which file goes under which name, compressed or not.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use flate2::{Compression, GzBuilder};
use release::{File, Manifest, headers, manifest};
use s3::{Bucket, Condition, Put};
use step::worker::{Job, Progress};
use step::{Failure, canonical};
use tokio::task::JoinSet;

use crate::s3::{metadata, settled};

/// CloudFront compresses what is smaller by itself.
const COMPRESSED_ABOVE: u64 = 10_000_000;
/// Objects on their way at once.
const AT_ONCE: usize = 8;

/// An object of a release.
pub struct Upload {
    /// Its name in the bucket.
    pub name: String,
    pub file: File,
    from: From,
    /// What another put there first stays: a document tells of whoever published it.
    first_stays: bool,
}

enum From {
    File(PathBuf),
    Bytes(Vec<u8>),
}

impl Upload {
    /// How its bytes are encoded in the bucket.
    pub fn encoding(&self) -> Option<&'static str> {
        let large = self.file.bytes > COMPRESSED_ABOVE && headers::compresses(&self.name);
        large.then_some("gzip")
    }
}

/// What a release consists of: first what it names, then its own files, the manifest last.
pub fn uploads(
    site: &Path,
    release: &Manifest,
    documents: &BTreeMap<String, String>,
) -> Vec<Upload> {
    let below = |file: &str| manifest::path(&release.release, file);
    let mut uploads: Vec<Upload> = release
        .hashed()
        .map(|file| Upload {
            name: file.path.clone(),
            file: file.clone(),
            from: From::File(site.join(&file.path)),
            first_stays: false,
        })
        .collect();
    // What a rollback writes in place again.
    uploads.extend(release.fixed().map(|file| {
        let name = below(&file.path);
        let cache = headers::cache_control(&name).into();
        let from = From::File(site.join(&file.path));
        Upload { file: File { cache, ..file.clone() }, from, name, first_stays: false }
    }));
    let own = |name: &str, bytes: Vec<u8>, first_stays| {
        let name = below(name);
        let file = File::of_bytes(&name, &bytes);
        Upload { name, file, from: From::Bytes(bytes), first_stays }
    };
    uploads.extend(documents.iter().map(|(name, text)| own(name, text.clone().into(), true)));
    uploads.push(own("manifest.json", canonical::to_vec(release), false));
    uploads
}

/// Makes sure of what is there and writes what is not, the manifest last. Returns how many bytes
/// went.
pub async fn send(
    job: &Job,
    bucket: &Bucket,
    kept: Vec<Upload>,
    new: Vec<Upload>,
) -> anyhow::Result<u64> {
    let total = new.iter().map(|upload| upload.file.bytes).sum();
    let sent = Arc::new(AtomicU64::new(0));
    let mut done = 0;
    let mut tell = |bytes: u64| {
        done += bytes;
        job.progress(Progress {
            phase: "upload".into(),
            done,
            total,
            unit: "bytes".into(),
            ..Progress::default()
        });
    };
    // A release's own files come last and name the others.
    let (own, mut shared): (Vec<_>, Vec<_>) =
        new.into_iter().partition(|upload| upload.name.starts_with("releases/"));
    let mut travelling = JoinSet::new();
    for upload in kept {
        let bucket = bucket.clone();
        wait(&mut travelling, &mut |_| {}).await?;
        travelling.spawn(async move {
            if upload.first_stays {
                return Ok(0);
            }
            let there = bucket.head(&upload.name).await?;
            let gone = || Failure::environment(format!("{} is gone again", upload.name));
            settled(
                bucket.location(),
                &upload.name,
                &upload.file.blake3,
                &there.ok_or_else(gone)?,
            )?;
            Ok(0)
        });
    }
    while !travelling.is_empty() {
        join(&mut travelling, &mut |_| {}).await?;
    }
    // The largest first, so that none is waited for at the end.
    shared.sort_by_key(|upload| std::cmp::Reverse(upload.file.bytes));
    for upload in shared {
        wait(&mut travelling, &mut tell).await?;
        let (bucket, sent) = (bucket.clone(), sent.clone());
        let packed = upload.encoding().map(|_| pack(job, &upload)).transpose()?;
        travelling.spawn(async move { one(&bucket, upload, packed, &sent).await });
    }
    while !travelling.is_empty() {
        join(&mut travelling, &mut tell).await?;
    }
    for upload in own {
        tell(one(bucket, upload, None, &sent).await?);
    }
    Ok(sent.load(Ordering::Relaxed))
}

/// Room for one more.
async fn wait(
    travelling: &mut JoinSet<anyhow::Result<u64>>,
    tell: &mut dyn FnMut(u64),
) -> anyhow::Result<()> {
    while travelling.len() >= AT_ONCE {
        join(travelling, tell).await?;
    }
    Ok(())
}

async fn join(
    travelling: &mut JoinSet<anyhow::Result<u64>>,
    tell: &mut dyn FnMut(u64),
) -> anyhow::Result<()> {
    if let Some(one) = travelling.join_next().await {
        tell(one.context("an upload panicked")??);
    }
    Ok(())
}

/// Writes one object, unless another did meanwhile.
async fn one(
    bucket: &Bucket,
    upload: Upload,
    packed: Option<PathBuf>,
    sent: &AtomicU64,
) -> anyhow::Result<u64> {
    let put = Put {
        content_type: Some(upload.file.kind.clone()),
        content_encoding: packed.is_some().then(|| "gzip".to_string()),
        cache_control: Some(upload.file.cache.clone()),
        metadata: metadata(&upload.file.blake3),
        sha256: true,
        ..Put::when(Condition::New)
    };
    let more = |bytes: u64| _ = sent.fetch_add(bytes, Ordering::Relaxed);
    let written = match (&upload.from, &packed) {
        (_, Some(path)) | (From::File(path), None) => {
            bucket.put_file(&upload.name, path, &put, &more).await?
        }
        (From::Bytes(bytes), None) => {
            more(bytes.len() as u64);
            bucket.put(&upload.name, bytes.clone().into(), &put).await?
        }
    };
    if !written.is_now() && !upload.first_stays {
        let there = bucket.head(&upload.name).await?;
        let gone = || Failure::environment(format!("{} comes and goes", upload.name));
        settled(bucket.location(), &upload.name, &upload.file.blake3, &there.ok_or_else(gone)?)?;
    }
    Ok(upload.file.bytes)
}

/// The file as gzip, in the job's scratch: the same bytes each time.
fn pack(job: &Job, upload: &Upload) -> anyhow::Result<PathBuf> {
    let From::File(from) = &upload.from else {
        return Err(Failure::bug("only files are compressed").into());
    };
    let to = job.scratch().join(format!("{}.gz", upload.file.blake3));
    let mut source = fs::File::open(from).with_context(|| from.display().to_string())?;
    let target = fs::File::create(&to).with_context(|| to.display().to_string())?;
    let mut packed = GzBuilder::new().write(target, Compression::best());
    std::io::copy(&mut source, &mut packed).with_context(|| to.display().to_string())?;
    packed.finish().and_then(|mut file| file.flush()).with_context(|| to.display().to_string())?;
    Ok(to)
}
