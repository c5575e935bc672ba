//! The work of `publish/s3`: a release goes up, and then one object says that it is the one.
//!
//! All that a release consists of lies under names that hold its digests, or below `releases/`, and is
//! written once. index.html is the only object that decides what visitors get; it is written last, on
//! the condition that it still is what it was. Stopped anywhere before, the old site is whole.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use ::release::{INDEX, Manifest, headers, manifest};
use anyhow::Context;
use publish::{Check, FIGURES, Task, s3::S3};
use s3::{Bucket, Bytes, Condition, Location, Object, Put, Settings};
use serde_json::{Value, json};
use step::worker::{Act, Job};
use step::{BlobDigest, Failure};

use crate::release::{self, Upload};
use crate::{check, cloudfront, setup};

/// The metadata that holds a file's digest before any compression.
pub const BLAKE3: &str = "blake3";
/// Seconds since 1970 at which a release was first published.
const PUBLISHED: &str = "published";
/// How large an index.html and a manifest may be.
const SMALL: u64 = 64 << 20;

pub fn run(job: &Job) -> anyhow::Result<()> {
    let act: Act = job.params()?;
    let target: S3 = serde_json::from_value(act.target)?;
    let task: Task = serde_json::from_value(act.task)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let (mut told, look) = runtime.block_on(async {
        if task == Task::Setup {
            return Ok((setup::run(job, &target).await?, None));
        }
        let location = Location { bucket: target.bucket.clone(), prefix: target.prefix.clone() };
        let bucket = Bucket::open(&location, &settings(&target)).await?;
        let place = Place { job, target: &target, bucket };
        anyhow::Ok(match task {
            Task::Publish { dry_run, documents } => place.publish(dry_run, &documents).await?,
            Task::Rollback { release } => place.rollback(release).await?,
            Task::Releases => (place.releases().await?, None),
            Task::Setup => unreachable!("it was done above"),
        })
    })?;
    if let (Some(release), Some(url)) = (look, &target.url) {
        let check = Check { url: url.clone(), release: Some(release) };
        told["check"] = check::look(job, &check)?;
    }
    crate::answer(job, &told)
}

pub fn settings(target: &S3) -> Settings {
    Settings {
        endpoint: target.endpoint.clone(),
        region: target.region.clone(),
        path_style: target.path_style,
    }
}

struct Place<'a> {
    job: &'a Job,
    target: &'a S3,
    bucket: Bucket,
}

/// What visitors get now.
struct Current {
    release: String,
    etag: String,
}

impl Place<'_> {
    async fn publish(
        &self,
        dry_run: bool,
        documents: &BTreeMap<String, String>,
    ) -> anyhow::Result<(Value, Option<String>)> {
        let site = self.job.input("site")?;
        let manifest = Manifest::read(&site.path)?;
        if !manifest.lacks.is_empty() {
            return Err(Failure::input(format!(
                "{} is not published: it lacks {}",
                site.origin,
                manifest.lacks.join("; and ")
            ))
            .hint("name the model's licence with `license = \"…\"` and what goes along with it with `notices = [\"./NOTICE\"]` in the site's table")
            .into());
        }
        let current = self.current().await?;
        let there = self.listed(&["assets/", "models/", "vendor/", "releases/"]).await?;
        let uploads = release::uploads(&site.path, &manifest, documents);
        let (kept, new): (Vec<_>, Vec<_>) =
            uploads.into_iter().partition(|upload| there.contains_key(&upload.name));
        let bytes = |uploads: &[Upload]| uploads.iter().map(|u| u.file.bytes).sum::<u64>();
        let (all, to_send) = (bytes(&kept) + bytes(&new), bytes(&new));
        let row = |upload: &Upload| {
            json!({
                "path": upload.name, "bytes": upload.file.bytes, "type": upload.file.kind,
                "cache-control": upload.file.cache, "encoding": upload.encoding(),
            })
        };
        let mut told = json!({
            "place": self.bucket.location(),
            "release": manifest.release,
            "before": current.as_ref().map(|current| &current.release),
            "dry_run": dry_run,
            "files": kept.len() + new.len(),
            "bytes": all,
            "new": new.iter().map(row).collect::<Vec<_>>(),
            "bytes_new": to_send,
            "headers": headers::ALWAYS,
        });
        if dry_run {
            return Ok((told, None));
        }
        if !self.bucket.is_conditional("probe").await? {
            return Err(Failure::environment(format!(
                "{} does not hold to conditional writes: two who publish at once would spoil each other's site",
                self.bucket.location()
            ))
            .hint("use a store that does, as AWS, MinIO and R2 do")
            .into());
        }
        let sent = release::send(self.job, &self.bucket, kept, new).await?;
        told["bytes_sent"] = json!(sent);
        let moved = self.point(&manifest, &site.path.join(INDEX), current).await?;
        told["moved"] = json!(moved);
        Ok((told, Some(manifest.release)))
    }

    async fn releases(&self) -> anyhow::Result<Value> {
        let current = self.current().await?.map(|current| current.release);
        let rows = self.history().await?;
        let figures = match &current {
            Some(release) => self.bucket.get(&manifest::path(release, FIGURES), SMALL).await?,
            None => None,
        };
        let figures: Option<Value> =
            figures.map(|(_, bytes)| serde_json::from_slice(&bytes)).transpose()?;
        Ok(json!({
            "place": self.bucket.location(), "current": current, "releases": rows,
            "figures": figures,
        }))
    }

    async fn rollback(&self, wanted: Option<String>) -> anyhow::Result<(Value, Option<String>)> {
        let current = self.current().await?;
        let now = current.as_ref().map(|current| current.release.clone());
        let history = self.history().await?;
        let names: Vec<&str> = history.iter().filter_map(|r| r["release"].as_str()).collect();
        let at = names.iter().position(|name| Some(*name) == now.as_deref());
        let found = match &wanted {
            Some(start) => names.iter().find(|name| name.starts_with(start.as_str())),
            None => at.and_then(|at| names.get(at.checked_sub(1)?)),
        };
        let Some(release) = found.map(ToString::to_string) else {
            let what = match wanted {
                Some(start) => format!("{} has no release {start}", self.bucket.location()),
                None => format!("{} has no release before the current", self.bucket.location()),
            };
            let hint = match names.as_slice() {
                [] => "nothing was published there yet".to_string(),
                names => format!("its releases are {}", names.join(", ")),
            };
            return Err(Failure::input(what).hint(hint).into());
        };
        let manifest = self.manifest(&release).await?;
        let there = self.listed(&["assets/", "models/", "vendor/", "releases/"]).await?;
        let lost: Vec<&str> = manifest
            .hashed()
            .map(|file| file.path.as_str())
            .filter(|path| !there.contains_key(*path))
            .collect();
        if !lost.is_empty() {
            let what = format!("release {release} is no longer whole: {}", lost.join(", "));
            return Err(Failure::environment(what).hint("publish it again").into());
        }
        let page = self.small(&manifest::path(&release, INDEX)).await?;
        if manifest::name(&page) != release {
            let what = format!("the page of release {release} is not what it was");
            return Err(Failure::environment(what).hint("publish it again").into());
        }
        let index = self.job.scratch().join(INDEX);
        std::fs::write(&index, &page).with_context(|| index.display().to_string())?;
        let moved = self.point(&manifest, &index, current).await?;
        let told = json!({
            "place": self.bucket.location(), "release": release, "before": now, "moved": moved,
        });
        Ok((told, Some(release)))
    }

    /// Makes a release that is all there what visitors get. Returns the paths that changed in place.
    async fn point(
        &self,
        manifest: &Manifest,
        index: &std::path::Path,
        current: Option<Current>,
    ) -> anyhow::Result<Vec<String>> {
        let mut moved = Vec::new();
        let page = std::fs::read(index).with_context(|| index.display().to_string())?;
        if current.as_ref().is_none_or(|current| current.release != manifest.release) {
            let condition = match current {
                Some(Current { etag, .. }) => Condition::Still(etag),
                None => Condition::New,
            };
            let put = put(manifest, INDEX, condition);
            let written = self.bucket.put(INDEX, Bytes::from(page), &put).await?;
            // A write whose answer was lost is refused when it is tried again.
            let ours = written.is_now()
                || self.current().await?.is_some_and(|now| now.release == manifest.release);
            if !ours {
                return Err(Failure::environment(format!(
                    "somebody else published to {} meanwhile: theirs is what visitors get",
                    self.bucket.location()
                ))
                .hint("look at it with `cargo xtask publish releases`; publish again to put yours in its place")
                .into());
            }
            moved.push(INDEX.to_string());
        }
        for file in manifest.fixed().filter(|file| file.path != INDEX) {
            let there = self.bucket.head(&file.path).await?;
            if there.is_some_and(|object| is_file(&object, &file.blake3)) {
                continue;
            }
            let bytes = self.small(&manifest::path(&manifest.release, &file.path)).await?;
            let put = put(manifest, &file.path, Condition::Always);
            self.bucket.put(&file.path, bytes, &put).await?;
            moved.push(file.path.clone());
        }
        if let Some(distribution) = self.target.distribution.as_ref().filter(|_| !moved.is_empty())
        {
            cloudfront::invalidate(distribution, &moved).await?;
        }
        Ok(moved)
    }

    /// The release that index.html is of; none where nothing was published yet.
    async fn current(&self) -> anyhow::Result<Option<Current>> {
        let Some((object, page)) = self.bucket.get(INDEX, SMALL).await? else { return Ok(None) };
        let release = manifest::name(&page);
        if self.bucket.head(&manifest::path_of(&release)).await?.is_none() {
            return Err(Failure::input(format!(
                "{}/{INDEX} is a page of no release: it would be lost",
                self.bucket.location()
            ))
            .hint("take it away, or give `prefix = \"…\"`")
            .into());
        }
        Ok(Some(Current { release, etag: object.etag }))
    }

    /// Releases, the oldest first.
    async fn history(&self) -> anyhow::Result<Vec<Value>> {
        let mut all = Vec::new();
        for name in self.listed(&["releases/"]).await?.into_keys() {
            let Some(release) = name.strip_prefix("releases/") else { continue };
            let Some(release) = release.strip_suffix("/manifest.json") else { continue };
            let Some(object) = self.bucket.head(&name).await? else { continue };
            let published = object.metadata.get(PUBLISHED).and_then(|time| time.parse().ok());
            let manifest = self.manifest(release).await?;
            all.push((published.unwrap_or(0_u64), release.to_string(), manifest));
        }
        all.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        let row = |(published, release, manifest): (u64, String, Manifest)| {
            json!({
                "release": release, "published": published,
                "files": manifest.files.len(), "bytes": manifest.bytes(),
            })
        };
        Ok(all.into_iter().map(row).collect())
    }

    async fn manifest(&self, release: &str) -> anyhow::Result<Manifest> {
        let bytes = self.small(&manifest::path_of(release)).await?;
        Ok(Manifest::parse(&bytes)?)
    }

    async fn small(&self, name: &str) -> anyhow::Result<Bytes> {
        let found = self.bucket.get(name, SMALL).await?;
        let (_, bytes) = found.ok_or_else(|| {
            Failure::environment(format!("{}/{name} is not there", self.bucket.location()))
                .hint("publish the release again")
        })?;
        Ok(bytes)
    }

    /// Name → bytes of what lies below these folders.
    async fn listed(&self, folders: &[&str]) -> anyhow::Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for folder in folders {
            self.bucket.list(folder, |one| _ = all.insert(one.name, one.size)).await?;
        }
        Ok(all)
    }
}

/// Whether an object holds the file of this digest, as whoever wrote it says.
pub fn is_file(object: &Object, digest: &BlobDigest) -> bool {
    object.metadata.get(BLAKE3).is_some_and(|said| *said == digest.to_string())
}

/// How a file of the manifest is written.
fn put(manifest: &Manifest, path: &str, condition: Condition) -> Put {
    let file = manifest.file(path).expect("a file of the manifest");
    Put {
        content_type: Some(file.kind.clone()),
        cache_control: Some(file.cache.clone()),
        metadata: BTreeMap::from([(BLAKE3.to_string(), file.blake3.to_string())]),
        sha256: true,
        ..Put::when(condition)
    }
}

/// The metadata of a file that is written once.
pub fn metadata(digest: &BlobDigest) -> BTreeMap<String, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    BTreeMap::from([
        (BLAKE3.to_string(), digest.to_string()),
        (PUBLISHED.to_string(), now.to_string()),
    ])
}

/// What a write came to that must not replace anything.
pub fn settled(
    place: &Location,
    name: &str,
    digest: &BlobDigest,
    there: &Object,
) -> Result<(), Failure> {
    if is_file(there, digest) {
        return Ok(());
    }
    Err(Failure::environment(format!("{place}/{name} is there and holds something else"))
        .hint("what lies under the name of a digest was changed by somebody: take it away, and publish again"))
}
