//! The work of `publish check`: a live site, held to its own manifest and to the headers that a page
//! needs, every byte of it.
//!
//! Knows nothing of who published it, or where it lies.

use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use publish::Check;
use release::{File, INDEX, Manifest, headers, manifest};
use serde_json::{Value, json};
use step::worker::{Act, Job, Progress};
use step::{BlobDigest, Failure};

/// Files on their way at once.
const AT_ONCE: usize = 6;
/// How long a release may take until it is seen: caches between here and there are told to let go.
const PATIENCE: Duration = Duration::from_secs(120);
const SMALL: u64 = 64 << 20;

pub fn run(job: &Job) -> anyhow::Result<()> {
    let act: Act = job.params()?;
    let check: Check = serde_json::from_value(act.task)?;
    crate::answer(job, &look(job, &check)?)
}

/// What is wrong with the site, by path; and what was looked at.
pub fn look(job: &Job, check: &Check) -> anyhow::Result<Value> {
    let base = check.url.trim_end_matches(INDEX).trim_end_matches('/').to_string() + "/";
    let agent = agent();
    let mut wrong = Wrong::default();
    let host = base.strip_prefix("http://").map(|rest| rest.split([':', '/']).next());
    if host.is_some_and(|host| host != Some("127.0.0.1") && host != Some("localhost")) {
        wrong.add("", "it is not https: browsers isolate no page without".into());
    }
    let page = wait_for(&agent, &base, check.release.as_deref())?;
    let release = manifest::name(&page.bytes);
    wrong.headers("", INDEX, &page);
    if let Some(expected) = &check.release
        && *expected != release
    {
        wrong.add("", format!("it is release {release}, expected {expected}"));
    }
    let path = manifest::path_of(&release);
    let found = get(&agent, &format!("{base}{path}"))?;
    if found.status != 200 {
        return Err(Failure::input(format!("{base}{path} answers {}", found.status))
            .hint("only a site that Anneal made has a manifest there; was it copied whole?")
            .into());
    }
    wrong.headers(&path, &path, &found);
    let manifest = Manifest::parse(&found.bytes)
        .map_err(|e| Failure { message: format!("{base}{path}: {}", e.message), ..e })?;
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(wrong));
    let done = Mutex::new(0);
    std::thread::scope(|scope| {
        let looking: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(file) = manifest.files.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let found = hold(&agent, &base, file)?;
                        wrong.lock().expect("no panic while holding it").take(found);
                        let mut done = done.lock().expect("no panic while holding it");
                        *done += file.bytes;
                        job.progress(Progress {
                            phase: "check".into(),
                            done: *done,
                            total: manifest.bytes(),
                            unit: "bytes".into(),
                            ..Progress::default()
                        });
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        for thread in looking {
            thread.join().map_err(|_| Failure::bug("a thread of the check panicked"))??;
        }
        anyhow::Ok(())
    })?;
    let mut wrong = wrong.into_inner().expect("no panic while holding it");
    wrong.0.sort();
    let rows: Vec<Value> =
        wrong.0.iter().map(|(path, what)| json!({"path": path, "wrong": what})).collect();
    Ok(json!({
        "url": base, "release": release, "files": manifest.files.len(), "bytes": manifest.bytes(),
        "licences": manifest.licences, "wrong": rows,
    }))
}

/// Path → what is wrong with it.
#[derive(Default)]
struct Wrong(Vec<(String, String)>);

impl Wrong {
    fn add(&mut self, path: &str, what: String) {
        self.0.push((format!("/{path}"), what));
    }

    fn take(&mut self, other: Wrong) {
        self.0.extend(other.0);
    }

    /// Holds an answer to the headers of `file`, which lies at `path`.
    fn headers(&mut self, path: &str, file: &str, got: &Got) {
        for (name, value) in headers::ALWAYS {
            match got.header(name) {
                Some(said) if said.eq_ignore_ascii_case(value) => {}
                // What others may take too is isolated all the same.
                Some("cross-origin") if name == "Cross-Origin-Resource-Policy" => {}
                Some(said) => self.add(path, format!("{name}: `{said}`, expected `{value}`")),
                None => self.add(path, format!("{name} is missing")),
            }
        }
        if let Some(what) = headers::misses_caching(file, got.header("cache-control")) {
            self.add(path, what);
        }
        let kind = |text: &str| text.split(';').next().unwrap_or_default().trim().to_lowercase();
        let expected = headers::content_type(file);
        let said = got.header("content-type").unwrap_or_default();
        // What is read as bytes needs no type.
        if expected != "application/octet-stream" && kind(said) != kind(expected) {
            self.add(path, format!("content-type: `{said}`, expected `{expected}`"));
        }
    }
}

/// Fetches a file and holds it to what the manifest says.
fn hold(agent: &ureq::Agent, base: &str, file: &File) -> anyhow::Result<Wrong> {
    let mut wrong = Wrong::default();
    let got = open(agent, &format!("{base}{}", file.path))?;
    if got.status != 200 {
        wrong.add(&file.path, format!("answers {}", got.status));
        return Ok(wrong);
    }
    wrong.headers(&file.path, &file.path, &got);
    let mut hasher = blake3::Hasher::new();
    let read = std::io::copy(&mut got.body.take(file.bytes + 1), &mut hasher);
    match read {
        Err(error) => wrong.add(&file.path, format!("its body does not come whole: {error}")),
        Ok(bytes) if bytes != file.bytes => {
            let more = if bytes > file.bytes { "more than " } else { "" };
            let bytes = bytes.min(file.bytes);
            let expected = file.bytes;
            wrong.add(&file.path, format!("{more}{bytes} bytes, expected {expected}"));
        }
        Ok(_) => {
            let digest = BlobDigest::from_bytes(*hasher.finalize().as_bytes());
            if digest != file.blake3 {
                wrong.add(&file.path, format!("other bytes: {digest}, expected {}", file.blake3));
            }
        }
    }
    Ok(wrong)
}

/// The page, once it is the expected one; else as it is in the end.
fn wait_for(agent: &ureq::Agent, base: &str, expected: Option<&str>) -> anyhow::Result<Got> {
    let until = Instant::now() + PATIENCE;
    loop {
        let page = get(agent, base)?;
        if page.status != 200 {
            return Err(Failure::environment(format!("{base} answers {}", page.status))
                .hint("is it the address of the site's folder, with `https://`?")
                .into());
        }
        let there = expected.is_none_or(|release| manifest::name(&page.bytes) == release);
        if there || Instant::now() > until {
            return Ok(page);
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

struct Got {
    status: u16,
    headers: ureq::http::HeaderMap,
    body: Box<dyn Read>,
    /// Read already, of what is small.
    bytes: Vec<u8>,
}

impl Got {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

fn open(agent: &ureq::Agent, url: &str) -> anyhow::Result<Got> {
    let mut tries = 0;
    loop {
        match agent.get(url).call() {
            Ok(answer) if answer.status().as_u16() < 500 || tries == 4 => {
                let (head, body) = answer.into_parts();
                let body = Box::new(body.into_reader());
                let (status, headers) = (head.status.as_u16(), head.headers);
                return Ok(Got { status, headers, body, bytes: Vec::new() });
            }
            Err(error) if tries == 4 => {
                return Err(Failure::environment(format!("{url}: {error}"))
                    .hint("check the address and the network")
                    .into());
            }
            _ => tries += 1,
        }
        std::thread::sleep(Duration::from_millis(100 << tries));
    }
}

fn get(agent: &ureq::Agent, url: &str) -> anyhow::Result<Got> {
    let mut got = open(agent, url)?;
    let mut bytes = Vec::new();
    (&mut got.body).take(SMALL).read_to_end(&mut bytes).with_context(|| url.to_string())?;
    got.bytes = bytes;
    Ok(got)
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .user_agent(concat!("anneal/", env!("CARGO_PKG_VERSION")));
    config.build().into()
}
