//! The work of `source/huggingface`: asking the hub for a pin, and fetching what is pinned.
//!
//! The hub's interface: `GET api/models/{repo}/revision/{rev}?blobs=true` tells commit, files, sizes
//! and, for files in large-file storage, SHA-256; `{repo}/resolve/{commit}/{path}` is the file.

use std::collections::BTreeMap;

use anyhow::Context;
use globset::{Glob, GlobSetBuilder};
use release::Licence;
use serde::Deserialize;
use source::huggingface::{HuggingFace, Pin, PinnedFile, RepoType};
use step::worker::{Job, Mode, Progress};
use step::{Failure, canonical};

use crate::download::{self, Wanted};

/// Where the hub is, unless `HF_ENDPOINT` says otherwise.
const HUB: &str = "https://huggingface.co";

pub fn run(job: &Job) -> anyhow::Result<()> {
    let params: HuggingFace = job.params()?;
    let hub = Hub::from_environment(&params);
    match job.request.mode {
        Mode::Lock => {
            let pin = hub.pin(job, &params)?;
            let text = serde_json::to_vec_pretty(&pin)?;
            Ok(std::fs::write(job.out().join("lock.json"), text)?)
        }
        Mode::Build => {
            let pin = params.lock.as_ref().ok_or_else(|| {
                Failure::input(format!("{} is not pinned", params.repo))
                    .hint("run `cargo xtask lock`")
            })?;
            let wanted = pin.files.iter().map(|(path, pin)| hub.wanted(&params, path, pin));
            let commit = &pin.commit;
            let wanted: Vec<Wanted> = wanted.map(|w| w.at(commit)).collect();
            download::all(job, &wanted)?;
            name_licence(job, &params)?;
            check_architecture(job, &params)
        }
        Mode::Act => Err(Failure::bug("a source has nothing to do outside").into()),
    }
}

/// Writes down the licence that the card names: it goes wherever the model's own files do.
fn name_licence(job: &Job, params: &HuggingFace) -> anyhow::Result<()> {
    let card = std::fs::read(job.out().join("README.md")).unwrap_or_default();
    let Some(license) = release::licence::of_card(&String::from_utf8_lossy(&card)) else {
        return Ok(());
    };
    let licence = Licence { of: params.repo.clone(), license };
    let path = job.out().join(release::licence::FILE);
    std::fs::write(&path, canonical::to_vec(&licence))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// What the recipe declared of the model, held to its config.json.
fn check_architecture(job: &Job, params: &HuggingFace) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Config {
        model_type: String,
    }
    let (Some(declared), path) = (&params.architecture, job.out().join("config.json")) else {
        return Ok(());
    };
    let text =
        std::fs::read(&path).with_context(|| format!("{} has no config.json", params.repo))?;
    let config: Config = serde_json::from_slice(&text)
        .with_context(|| format!("{}'s config.json names no model_type", params.repo))?;
    if config.model_type != *declared {
        return Err(Failure::input(format!(
            "{} is a `{}` by its config.json, the recipe says architecture = \"{declared}\"",
            params.repo, config.model_type
        ))
        .hint("correct the recipe")
        .into());
    }
    Ok(())
}

struct Hub {
    endpoint: String,
    token: Option<String>,
    /// `api/models` or `api/datasets`.
    api: &'static str,
    /// What stands before the repository's name in a file's URL.
    files: &'static str,
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: String,
    size: u64,
}

impl Hub {
    fn from_environment(params: &HuggingFace) -> Self {
        let set = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        let (api, files) = match params.repo_type {
            RepoType::Model => ("api/models", ""),
            RepoType::Dataset => ("api/datasets", "datasets/"),
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| HUB.into());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        Self { endpoint, token: set("HF_TOKEN"), api, files }
    }

    /// Asks what the revision means now. Files outside large-file storage have no SHA-256 on the
    /// hub: they are small, so they are fetched and hashed.
    fn pin(&self, job: &Job, params: &HuggingFace) -> anyhow::Result<Pin> {
        let url = format!(
            "{}/{}/{}/revision/{}?blobs=true",
            self.endpoint, self.api, params.repo, params.rev
        );
        let text =
            download::text(&url, self.token.as_deref()).map_err(|e| self.refused(params, e))?;
        let revision: Revision = serde_json::from_str(&text)
            .with_context(|| format!("{url} is not the hub's answer"))?;
        let mut globs = GlobSetBuilder::new();
        for glob in params.globs() {
            globs.add(Glob::new(glob).map_err(|e| Failure::input(format!("files: {e}")))?);
        }
        let globs = globs.build()?;
        let taken: Vec<&Sibling> =
            revision.siblings.iter().filter(|s| globs.is_match(&s.rfilename)).collect();
        if taken.is_empty() {
            return Err(Failure::input(format!(
                "{} at {} has no file that matches {}",
                params.repo,
                params.rev,
                params.globs().join(", ")
            ))
            .hint("name the files to take with `files = [\"…\"]`")
            .into());
        }
        let mut files = BTreeMap::new();
        for (done, sibling) in taken.iter().enumerate() {
            job.progress(Progress {
                phase: "lock".into(),
                done: done as u64,
                total: taken.len() as u64,
                unit: "files".into(),
                ..Progress::default()
            });
            let path = &sibling.rfilename;
            let pin = match &sibling.lfs {
                Some(lfs) => PinnedFile { size: lfs.size, sha256: lfs.sha256.clone() },
                None => {
                    let url = self.url(params, path).replace("{commit}", &revision.sha);
                    download::measure(&url, self.token.as_deref())?
                }
            };
            files.insert(path.clone(), pin);
        }
        Ok(Pin { commit: revision.sha, files })
    }

    fn wanted(&self, params: &HuggingFace, path: &str, pin: &PinnedFile) -> Wanted {
        Wanted {
            name: path.to_string(),
            url: self.url(params, path),
            pin: pin.clone(),
            token: self.token.clone(),
        }
    }

    fn url(&self, params: &HuggingFace, path: &str) -> String {
        format!("{}/{}{}/resolve/{{commit}}/{path}", self.endpoint, self.files, params.repo)
    }

    fn refused(&self, params: &HuggingFace, error: anyhow::Error) -> anyhow::Error {
        let text = format!("{error:#}");
        if text.contains("401") || text.contains("403") {
            return Failure::environment(format!("the hub does not show {}: {text}", params.repo))
                .hint("accept the model's licence on its page and set HF_TOKEN")
                .into();
        }
        if text.contains("404") {
            return Failure::input(format!("the hub has no {} at {}", params.repo, params.rev))
                .hint("check `repo` and `rev`; a private repository needs HF_TOKEN")
                .into();
        }
        error
    }
}
