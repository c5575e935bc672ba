//! The worker against a server on this machine that has a tiny repository in the hub's layout, and
//! breaks off, lies and asks for a token as servers do.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use step::worker::{Mode, Request};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const CARD: &[u8] = b"---\nlicense: llama3.2\n---\n# Tiny\n";
const CONFIG: &[u8] = br#"{"model_type": "llama"}"#;

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i % 251) as u8).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// What the server does wrong.
#[derive(Clone, Copy, Default)]
struct Faults {
    /// Each answer with a body ends after so many bytes of it.
    breaks_after: Option<usize>,
    /// Weights that are not the pinned ones.
    lies: bool,
    token: Option<&'static str>,
}

/// A hub. It lives as long as the test.
struct Hub {
    endpoint: String,
    /// The request lines, with their Range.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let log = Arc::clone(&log);
                std::thread::spawn(move || answer(stream, faults, &log));
            }
        });
        Self { endpoint, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, faults: Faults, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();
    let (mut from, mut token) = (0, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let start = value.trim().trim_start_matches("bytes=").trim_end_matches('-');
                from = start.parse().unwrap();
            }
            "authorization" => token = Some(value.trim().to_string()),
            _ => {}
        }
    }
    log.lock().unwrap().push(format!("{path} from {from}"));
    if let Some(wanted) = faults.token
        && token != Some(format!("Bearer {wanted}"))
    {
        _ = stream.write_all(
            b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        );
        return;
    }
    let mut weights = weights();
    if faults.lies {
        weights[7] ^= 1;
    }
    let revision = json!({"sha": COMMIT, "siblings": [
        {"rfilename": "README.md"},
        {"rfilename": "config.json"},
        {"rfilename": "model.safetensors",
            "lfs": {"sha256": sha256(&self::weights()), "size": weights.len()}},
        {"rfilename": "pytorch_model.bin", "lfs": {"sha256": "00", "size": 1}},
    ]});
    let body = match path.as_str() {
        "/api/models/tiny/llama/revision/main?blobs=true" => revision.to_string().into_bytes(),
        p if p == format!("/tiny/llama/resolve/{COMMIT}/README.md") => CARD.to_vec(),
        p if p == format!("/tiny/llama/resolve/{COMMIT}/config.json") => CONFIG.to_vec(),
        p if p == format!("/tiny/llama/resolve/{COMMIT}/model.safetensors") => weights,
        _ => {
            _ = stream.write_all(
                b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            );
            return;
        }
    };
    let rest = &body[from..];
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{}\r\nconnection: close\r\n\r\n",
        rest.len(),
        body.len() - 1,
        body.len()
    );
    let sent = faults.breaks_after.unwrap_or(usize::MAX).min(rest.len());
    _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&rest[..sent]));
}

/// One run of the worker, and what it said.
struct Ran {
    code: i32,
    failure: String,
    out: PathBuf,
}

fn run(dir: &Path, hub: &Hub, token: Option<&str>, step: &str, mode: Mode, params: Value) -> Ran {
    let folder = |name: &str| {
        let path = dir.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let out = dir.join("out");
    _ = std::fs::remove_dir_all(&out);
    let request = Request {
        format: 1,
        step: step.into(),
        mode,
        params,
        inputs: BTreeMap::new(),
        out: folder("out"),
        report: folder("report"),
        scratch: folder("scratch"),
        tools: BTreeMap::new(),
        threads: 1,
    };
    let path = dir.join("request.json");
    std::fs::write(&path, serde_json::to_vec(&request).unwrap()).unwrap();
    let mut worker = Command::new(env!("CARGO_BIN_EXE_source-worker"));
    worker.arg(&path).env("HF_ENDPOINT", &hub.endpoint).env_remove("HF_TOKEN");
    if let Some(token) = token {
        worker.env("HF_TOKEN", token);
    }
    let output = worker.output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let failure = lines.lines().find(|l| l.contains("\"failed\"")).unwrap_or_default();
    Ran { code: output.status.code().unwrap(), failure: failure.replace(&hub.endpoint, "HUB"), out }
}

fn tiny(lock: Option<Value>) -> Value {
    json!({"repo": "tiny/llama", "rev": "main", "type": "model", "files": [],
        "architecture": "llama", "lock": lock})
}

fn pin(dir: &Path, hub: &Hub, token: Option<&str>) -> Value {
    let ran = run(dir, hub, token, "source/huggingface", Mode::Lock, tiny(None));
    assert_eq!(ran.code, 0, "{}", ran.failure);
    serde_json::from_slice(&std::fs::read(ran.out.join("lock.json")).unwrap()).unwrap()
}

#[test]
fn a_repository_is_pinned_and_fetched() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::start(Faults::default()));
    let pin = pin(dir.path(), &hub, None);
    assert_eq!(
        pin,
        json!({"commit": COMMIT, "files": {
            "README.md": {"size": CARD.len(), "sha256": sha256(CARD)},
            "config.json": {"size": CONFIG.len(), "sha256": sha256(CONFIG)},
            "model.safetensors": {"size": 300_000, "sha256": sha256(&weights())},
        }})
    );
    let ran = run(dir.path(), &hub, None, "source/huggingface", Mode::Build, tiny(Some(pin)));
    assert_eq!(ran.code, 0, "{}", ran.failure);
    assert_eq!(std::fs::read(ran.out.join("model.safetensors")).unwrap(), weights());
    assert_eq!(std::fs::read(ran.out.join("config.json")).unwrap(), CONFIG);
    assert!(!ran.out.join("pytorch_model.bin").exists());
    let licence = std::fs::read_to_string(ran.out.join("LICENSE.json")).unwrap();
    assert_eq!(licence, r#"{"license":"llama3.2","of":"tiny/llama"}"#);
}

#[test]
fn a_download_goes_on_where_it_broke_off() {
    let dir = tempfile::tempdir().unwrap();
    let pin = pin(dir.path(), &Hub::start(Faults::default()), None);
    let hub = Hub::start(Faults { breaks_after: Some(100_000), ..Faults::default() });
    let ran = run(dir.path(), &hub, None, "source/huggingface", Mode::Build, tiny(Some(pin)));
    assert_eq!(ran.code, 0, "{}", ran.failure);
    assert_eq!(std::fs::read(ran.out.join("model.safetensors")).unwrap(), weights());
    let mut starts: Vec<String> = hub.asked().into_iter().filter(|a| a.contains("model")).collect();
    starts.sort();
    let of = |from: usize| format!("/tiny/llama/resolve/{COMMIT}/model.safetensors from {from}");
    assert_eq!(starts, [of(0), of(100_000), of(200_000)]);
}

#[test]
fn bytes_that_were_not_pinned_never_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let pin = pin(dir.path(), &Hub::start(Faults::default()), None);
    let hub = Hub::start(Faults { lies: true, ..Faults::default() });
    let ran = run(dir.path(), &hub, None, "source/huggingface", Mode::Build, tiny(Some(pin)));
    assert_eq!(ran.code, 2);
    let said = "model.safetensors is not what was pinned: 300000 bytes with sha256";
    assert!(ran.failure.contains(said), "{}", ran.failure);
    assert!(ran.failure.contains("cargo xtask lock"), "{}", ran.failure);
    assert!(!ran.out.join("model.safetensors").exists());
}

#[test]
fn a_token_opens_what_is_gated() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::start(Faults { token: Some("hf_secret"), ..Faults::default() });
    let ran = run(dir.path(), &hub, None, "source/huggingface", Mode::Lock, tiny(None));
    assert_eq!(ran.code, 2);
    assert!(ran.failure.contains("set HF_TOKEN"), "{}", ran.failure);
    let pin = pin(dir.path(), &hub, Some("hf_secret"));
    let build = Mode::Build;
    let ran =
        run(dir.path(), &hub, Some("hf_secret"), "source/huggingface", build, tiny(Some(pin)));
    assert_eq!(ran.code, 0, "{}", ran.failure);
}

#[test]
fn what_the_hub_does_not_have_is_named() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::start(Faults::default()));
    let mut params = tiny(None);
    params["rev"] = json!("v2");
    let ran = run(dir.path(), &hub, None, "source/huggingface", Mode::Lock, params);
    assert_eq!(ran.code, 1);
    assert!(ran.failure.contains("the hub has no tiny/llama at v2"), "{}", ran.failure);
}

#[test]
fn a_name_that_leads_out_is_refused() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::start(Faults::default()));
    let files = json!({"../escaped": {"size": 1, "sha256": "00"}});
    let lock = json!({"commit": COMMIT, "files": files});
    let ran = run(dir.path(), &hub, None, "source/huggingface", Mode::Build, tiny(Some(lock)));
    assert_eq!(ran.code, 1);
    assert!(ran.failure.contains("`../escaped` is no name for a file"), "{}", ran.failure);
}

#[test]
fn a_url_is_fetched_and_checked() {
    let (dir, hub) = (tempfile::tempdir().unwrap(), Hub::start(Faults::default()));
    let url = format!("{}/tiny/llama/resolve/{COMMIT}/config.json", hub.endpoint);
    let params = |sha256: String| json!({"url": url, "sha256": sha256});
    let ran = run(dir.path(), &hub, None, "source/url", Mode::Build, params(sha256(CONFIG)));
    assert_eq!((ran.code, ran.failure.as_str()), (0, ""));
    assert_eq!(std::fs::read(ran.out.join("config.json")).unwrap(), CONFIG);
    let ran = run(dir.path(), &hub, None, "source/url", Mode::Build, params(sha256(b"other")));
    assert_eq!(ran.code, 2, "{}", ran.failure);
}
