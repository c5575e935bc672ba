//! Parallel, resumable, checked downloads.
//!
//! A file grows as `<sha256>.part` in the job's scratch folder, which outlives a killed attempt; a
//! dropped connection goes on where it broke. Only bytes with the pinned SHA-256 reach the output.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Component, Path};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use source::huggingface::PinnedFile;
use step::Failure;
use step::worker::{Job, Progress};

/// How often a file is tried again after a dropped connection or a server's error.
const TRIES: u32 = 6;
/// Files at once: enough to fill a link, few enough for a hub to like us.
const PARALLEL: usize = 4;

/// A file to fetch.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its path in the output.
    pub name: String,
    pub url: String,
    /// A size of 0 is not checked: the digest is.
    pub pin: PinnedFile,
    pub token: Option<String>,
}

impl Wanted {
    /// The URL at a commit.
    pub fn at(mut self, commit: &str) -> Self {
        self.url = self.url.replace("{commit}", commit);
        self
    }
}

/// Fetches all of `wanted` into the job's output.
pub fn all(job: &Job, wanted: &[Wanted]) -> anyhow::Result<()> {
    for one in wanted {
        // What lies outside names it: it must not lead out of the output.
        let inside = Path::new(&one.name).components().all(|c| matches!(c, Component::Normal(_)));
        if !inside || one.name.is_empty() {
            return Err(Failure::input(format!("`{}` is no name for a file", one.name))
                .hint("a repository that names files so is not to be trusted")
                .into());
        }
    }
    let total: u64 = wanted.iter().map(|w| w.pin.size).sum();
    let done = AtomicU64::new(0);
    let next = AtomicUsize::new(0);
    std::fs::create_dir_all(job.scratch())?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..PARALLEL.min(wanted.len()))
            .map(|_| {
                scope.spawn(|| {
                    while let Some(one) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let more = |bytes: u64| {
                            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                            job.progress(Progress {
                                phase: "download".into(),
                                done,
                                total,
                                unit: "bytes".into(),
                                ..Progress::default()
                            });
                        };
                        fetch(job, one, &more)
                            .with_context(|| format!("cannot fetch {}", one.name))?;
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| Failure::bug("a download thread panicked"))??;
        }
        anyhow::Ok(())
    })
}

fn fetch(job: &Job, wanted: &Wanted, more: &dyn Fn(u64)) -> anyhow::Result<()> {
    let part = job.scratch().join(format!("{}.part", wanted.pin.sha256));
    let mut tries = 0;
    loop {
        match go_on(wanted, &part, more) {
            Ok(()) => break,
            Err(Stop::Final(error)) => return Err(error),
            Err(Stop::Again(error)) => {
                tries += 1;
                if tries == TRIES {
                    return Err(Failure::environment(format!(
                        "{} broke off {TRIES} times; the last time: {error:#}",
                        wanted.url
                    ))
                    .hint("run the build again: it goes on where this one stopped")
                    .into());
                }
                std::thread::sleep(Duration::from_millis(200 << tries));
            }
        }
    }
    let (size, sha256) = hash(&part)?;
    if sha256 != wanted.pin.sha256 {
        std::fs::remove_file(&part)?;
        return Err(Failure::environment(format!(
            "{} is not what was pinned: {size} bytes with sha256 {sha256}, expected {}",
            wanted.url, wanted.pin.sha256
        ))
        .hint("if the file was changed on purpose, pin it anew with `cargo xtask lock`")
        .into());
    }
    let to = job.out().join(&wanted.name);
    std::fs::create_dir_all(to.parent().context("a file in the output")?)?;
    std::fs::rename(&part, &to).or_else(|_| std::fs::copy(&part, &to).map(|_| ()))?;
    Ok(())
}

enum Stop {
    /// A dropped connection, a busy server.
    Again(anyhow::Error),
    /// Nothing that another try would mend.
    Final(anyhow::Error),
}

/// Fetches what `part` still lacks.
fn go_on(wanted: &Wanted, part: &Path, more: &dyn Fn(u64)) -> Result<(), Stop> {
    let fatal =
        |e: std::io::Error| Stop::Final(anyhow::Error::new(e).context(part.display().to_string()));
    let open = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(part);
    let mut file = open.map_err(fatal)?;
    let mut have = file.metadata().map_err(fatal)?.len();
    if wanted.pin.size > 0 && have >= wanted.pin.size {
        return Ok(());
    }
    let mut request = agent().get(&wanted.url);
    if let Some(token) = &wanted.token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    if have > 0 {
        request = request.header("range", format!("bytes={have}-"));
    }
    let mut response = match request.call() {
        Ok(response) => response,
        Err(ureq::Error::StatusCode(416)) => return Ok(()),
        Err(ureq::Error::StatusCode(code)) if code < 500 && code != 429 && code != 408 => {
            let failure = Failure::environment(format!("{} answers {code}", wanted.url));
            return Err(Stop::Final(match code {
                401 | 403 => failure.hint("set HF_TOKEN to a token that may read it").into(),
                _ => failure.into(),
            }));
        }
        Err(error) => return Err(Stop::Again(error.into())),
    };
    if response.status() != 206 && have > 0 {
        // The server does not resume: from the start.
        file.set_len(0).map_err(fatal)?;
        have = 0;
    }
    file.seek(SeekFrom::Start(have)).map_err(fatal)?;
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                file.write_all(&buffer[..n]).map_err(fatal)?;
                have += n as u64;
                more(n as u64);
            }
            Err(error) => return Err(Stop::Again(error.into())),
        }
    }
    if wanted.pin.size > 0 && have < wanted.pin.size {
        return Err(Stop::Again(anyhow::anyhow!("{have} of {} bytes came", wanted.pin.size)));
    }
    Ok(())
}

/// A small text.
pub fn text(url: &str, token: Option<&str>) -> anyhow::Result<String> {
    let mut response = get(url, token)?;
    Ok(response.body_mut().read_to_string()?)
}

/// Size and SHA-256 of what lies at `url`.
pub fn measure(url: &str, token: Option<&str>) -> anyhow::Result<PinnedFile> {
    let mut response = get(url, token)?;
    let (size, sha256) = release::sha256(&mut response.body_mut().as_reader())?;
    Ok(PinnedFile { size, sha256 })
}

fn get(url: &str, token: Option<&str>) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
    let mut tries = 0;
    loop {
        let mut request = agent().get(url);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        match request.call() {
            Ok(response) => return Ok(response),
            Err(ureq::Error::StatusCode(code)) if code < 500 && code != 429 => {
                bail!("{url} answers {code}")
            }
            Err(error) => {
                tries += 1;
                if tries == TRIES {
                    return Err(Failure::environment(format!("{url}: {error}"))
                        .hint("check the network; HF_ENDPOINT names another hub")
                        .into());
                }
                std::thread::sleep(Duration::from_millis(100 << tries));
            }
        }
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .user_agent(concat!("anneal/", env!("CARGO_PKG_VERSION")));
    config.build().into()
}

fn hash(path: &Path) -> anyhow::Result<(u64, String)> {
    Ok(release::sha256(&mut File::open(path)?)?)
}
