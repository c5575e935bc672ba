//! What the tests stand on: a bucket, sites, the worker as a process, something that plays CloudFront,
//! and something that listens in between.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use ::release::{INDEX, Licence, Manifest, headers, manifest};
use s3::testing::{KEY_ID, SECRET, Server};
use s3::{Bucket, Object};
use serde_json::{Value, json};
use step::worker::{Input, Mode, Request};
use step::{BlobDigest, Kind};
use tempfile::TempDir;

pub fn site(files: &[(&str, &str)]) -> TempDir {
    site_lacking(files, &[])
}

pub fn site_lacking(files: &[(&str, &str)], lacks: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut all = BTreeMap::from([("index.html", "<p>"), ("isolate.js", "//")]);
    all.extend(files.iter().copied());
    for (path, text) in all {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let licence = Licence { of: String::new(), license: "apache-2.0".into() };
    let lacks = lacks.iter().map(ToString::to_string).collect();
    Manifest::write(dir.path(), vec![licence], lacks).unwrap();
    dir
}

pub fn release_of(site: &TempDir) -> String {
    manifest::name(&std::fs::read(site.path().join(INDEX)).unwrap())
}

pub struct World {
    pub server: Server,
    runtime: tokio::runtime::Runtime,
}

impl World {
    pub fn new() -> Self {
        Self::on(Server::start())
    }

    pub fn on(server: Server) -> Self {
        Self { server, runtime: tokio::runtime::Runtime::new().unwrap() }
    }

    pub fn block<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    pub fn bucket(&self) -> Bucket {
        self.server.bucket("")
    }

    pub fn names(&self) -> Vec<String> {
        self.server.names()
    }

    pub fn head(&self, name: &str) -> Object {
        self.block(self.bucket().head(name)).unwrap().unwrap()
    }

    pub fn get(&self, name: &str) -> Vec<u8> {
        self.block(self.bucket().get(name, 1 << 30)).unwrap().unwrap().1.to_vec()
    }

    /// The release that a visitor gets.
    pub fn visible(&self) -> String {
        manifest::name(&self.get(INDEX))
    }

    /// Every file that the release names lies there, with its bytes.
    pub fn assert_whole(&self, release: &str) {
        let manifest = Manifest::parse(&self.get(&manifest::path_of(release))).unwrap();
        for file in manifest.hashed() {
            assert_eq!(BlobDigest::of(&self.get(&file.path)), file.blake3, "{}", file.path);
        }
    }

    fn endpoint(&self) -> String {
        self.server.settings().endpoint.unwrap()
    }

    pub fn publish(&self, site: &TempDir) -> Result<Value, String> {
        self.publish_to(site, "")
    }

    pub fn publish_to(&self, site: &TempDir, prefix: &str) -> Result<Value, String> {
        let target = target(&self.endpoint(), prefix);
        run(target, publishing(), Some(site.path()), |_| {})
    }

    pub fn publish_through(
        &self,
        site: &TempDir,
        endpoint: &str,
        started: impl FnOnce(u32),
    ) -> Result<Value, String> {
        run(target(endpoint, ""), publishing(), Some(site.path()), started)
    }

    pub fn ask(&self, site: &TempDir, task: Value) -> Result<Value, String> {
        run(target(&self.endpoint(), ""), task, Some(site.path()), |_| {})
    }

    pub fn check(&self, url: &str) -> Result<Value, String> {
        run(json!(null), json!({"url": url, "release": null}), None, |_| {})
    }
}

fn publishing() -> Value {
    json!({"publish": {"dry_run": false, "documents": {"release.json": "{\"format\": 1}"}}})
}

fn target(endpoint: &str, prefix: &str) -> Value {
    json!({
        "bucket": "bucket", "prefix": prefix, "region": null, "endpoint": endpoint,
        "path_style": true, "distribution": null, "url": null,
    })
}

/// The worker's answer, or its failure.
fn run(
    target: Value,
    task: Value,
    site: Option<&Path>,
    started: impl FnOnce(u32),
) -> Result<Value, String> {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let mut inputs = BTreeMap::new();
    if let Some(site) = site {
        let input = Input {
            label: "site".into(),
            kind: Kind::Site,
            path: site.into(),
            origin: "demo/site".into(),
        };
        inputs.insert("site".to_string(), vec![input]);
    }
    let request = Request {
        format: 1,
        step: if target.is_null() { publish::CHECK } else { "publish/s3" }.into(),
        mode: Mode::Act,
        params: json!({"target": target, "task": task}),
        inputs,
        out: folder("out"),
        report: folder("report"),
        scratch: folder("scratch"),
        tools: BTreeMap::new(),
        threads: 1,
    };
    let path = dir.path().join("request.json");
    std::fs::write(&path, serde_json::to_vec(&request).unwrap()).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_publish-worker"))
        .arg(&path)
        .env("AWS_ACCESS_KEY_ID", KEY_ID)
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .env("AWS_REGION", "us-east-1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    started(child.id());
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        let answer = std::fs::read(request.out.join("answer.json")).unwrap();
        return Ok(serde_json::from_slice(&answer).unwrap());
    }
    let lines = String::from_utf8(output.stdout).unwrap();
    let failed = lines.lines().find(|line| line.contains("\"failed\""));
    Err(failed.unwrap_or("killed").to_string())
}

/// A request as it came: its first line, its head and its body.
struct Heard {
    line: String,
    bytes: Vec<u8>,
}

fn hear(stream: &TcpStream) -> Option<Heard> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length, mut first) = (Vec::new(), 0, String::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let lower = line.to_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if first.is_empty() {
            first = line.trim().to_string();
        }
        let end = line.trim().is_empty();
        if end {
            head.extend_from_slice(b"connection: close\r\n");
        }
        if !lower.starts_with("connection:") {
            head.extend_from_slice(line.as_bytes());
        }
        if end {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    head.extend_from_slice(&body);
    Some(Heard { line: first, bytes: head })
}

/// Listens on loopback for as long as the tests run; each connection brings one request.
fn listen(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || answer(stream));
        }
    });
    url
}

fn pass_on(heard: &Heard, to: &str) -> Vec<u8> {
    let mut server = TcpStream::connect(to.trim_start_matches("http://")).unwrap();
    server.write_all(&heard.bytes).unwrap();
    let mut answer = Vec::new();
    let _ = server.read_to_end(&mut answer);
    answer
}

/// Stands between the worker and the store, and kills the worker at a request.
pub struct Spy {
    url: String,
    victim: Arc<AtomicU32>,
}

impl Spy {
    /// At request number `at`: before the store has heard of it, or once it is carried out.
    pub fn start(world: &World, at: usize, carried_out: bool) -> Self {
        let (store, victim) = (world.endpoint(), Arc::new(AtomicU32::new(0)));
        let (count, kill) = (AtomicUsize::new(0), victim.clone());
        let url = listen(move |mut stream| {
            let Some(heard) = hear(&stream) else { return };
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            if number >= at {
                if number == at && carried_out {
                    pass_on(&heard, &store);
                }
                let pid = kill.load(Ordering::SeqCst).to_string();
                let _ = Command::new("kill").args(["-KILL", &pid]).stderr(Stdio::null()).status();
                return;
            }
            let _ = stream.write_all(&pass_on(&heard, &store));
        });
        Self { url, victim }
    }

    /// Holds the first request that begins so: tells when it has come, and lets it go on when told.
    pub fn holding(world: &World, start: &'static str) -> (String, Receiver<()>, Sender<()>) {
        let store = world.endpoint();
        let (come, has_come) = channel();
        let (go, may_go) = channel::<()>();
        let (held, may_go) = (AtomicBool::new(false), Mutex::new(may_go));
        let url = listen(move |mut stream| {
            let Some(heard) = hear(&stream) else { return };
            if heard.line.starts_with(start) && !held.swap(true, Ordering::SeqCst) {
                come.send(()).unwrap();
                may_go.lock().unwrap().recv().unwrap();
            }
            let _ = stream.write_all(&pass_on(&heard, &store));
        });
        (url, has_come, go)
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }

    pub fn watch(&self, pid: u32) {
        self.victim.store(pid, Ordering::SeqCst);
    }
}

/// Plays CloudFront: a bucket's objects with the headers of our policy, one of them left out.
pub struct Front {
    url: String,
}

impl Front {
    pub fn start(bucket: Bucket, without: Option<&str>) -> Self {
        let without = without.unwrap_or_default().to_string();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let url = listen(move |mut stream| {
            let Some(heard) = hear(&stream) else { return };
            let path = heard.line.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
            let path = if path.is_empty() { INDEX } else { path };
            let found = runtime.block_on(bucket.get(path, 1 << 30)).unwrap();
            let mut said: Vec<(String, String)> =
                headers::ALWAYS.map(|(name, value)| (name.into(), value.into())).to_vec();
            let mut say = |name: &str, value: Option<String>| {
                said.extend(value.map(|value| (name.to_string(), value)));
            };
            let (status, body) = match found {
                Some((object, bytes)) => {
                    say("Content-Type", object.content_type);
                    say("Cache-Control", object.cache_control);
                    say("Content-Encoding", object.content_encoding);
                    ("200 OK", bytes)
                }
                None => ("404 Not Found", Default::default()),
            };
            let mut answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n", body.len());
            for (name, value) in said.iter().filter(|(name, _)| *name != without) {
                answer += &format!("{name}: {value}\r\n");
            }
            let _ = stream.write_all((answer + "connection: close\r\n\r\n").as_bytes());
            let _ = stream.write_all(&body);
        });
        Self { url }
    }

    pub fn url(&self) -> String {
        format!("{}/", self.url)
    }
}
