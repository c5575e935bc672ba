//! One worker process: request in, events out, nothing left behind.
//!
//! Knows nothing of keys or stores.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use step::Failure;
use step::worker::{self, Event, Progress, Request};

use crate::{cannot, held};

/// The variables a worker sees, where they are set: what finds programs and the network, and what
/// picks an accelerator. Everything else is left out, so that it cannot take part in a result.
const ENVIRONMENT: &[&str] = &[
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RUST_BACKTRACE",
];

/// What a worker said, progress left out.
#[derive(Debug, Default)]
pub struct Outcome {
    pub metrics: BTreeMap<String, f64>,
    pub versions: BTreeMap<String, String>,
    pub cpu_seconds: f64,
    /// Bytes.
    pub peak_memory: u64,
    /// Notes and standard error, in the order they came.
    pub log: Vec<u8>,
}

/// What a worker says while it runs.
pub enum Said<'a> {
    Progress(&'a Progress),
    Note(&'a str),
}

/// The worker processes of an engine. Whoever holds this can end them all.
#[derive(Debug, Default)]
pub struct Running {
    stopped: AtomicBool,
    /// Their process groups.
    groups: Mutex<HashSet<Pid>>,
}

/// How long a worker that is asked to end may take: a training writes a checkpoint.
const GRACE: Duration = Duration::from_secs(10);

impl Running {
    /// Ends all that run, and all that would run from now on: asks them first, and kills those that
    /// are still there after a while. Waits for none of them.
    pub fn stop(self: &Arc<Self>) {
        self.stopped.store(true, Ordering::SeqCst);
        self.signal(Signal::TERM);
        let running = self.clone();
        std::thread::spawn(move || {
            std::thread::sleep(GRACE);
            running.signal(Signal::KILL);
        });
    }

    fn signal(&self, signal: Signal) {
        for group in held(&self.groups).iter() {
            let _ = kill_process_group(*group, signal);
        }
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    fn add(&self, group: Pid) {
        held(&self.groups).insert(group);
        // It may have been started while the others were ended.
        if self.is_stopped() {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs the worker `program` on `request` in `dir`, which must exist and be empty of `request.json`.
/// Temporary files go there too.
pub fn run(
    program: &Path,
    request: &Request,
    dir: &Path,
    running: &Running,
    rules: Option<OwnedFd>,
    on: &mut dyn FnMut(Said),
) -> Result<Outcome, Failure> {
    let request_path = dir.join("request.json");
    let text = serde_json::to_vec_pretty(request).expect("requests serialise to JSON");
    File::create(&request_path)
        .and_then(|mut f| f.write_all(&text))
        .map_err(cannot("write", &request_path))?;
    let mut stderr = memory(dir).map_err(cannot("write in", dir))?;

    let mut command = Command::new(program);
    command.arg(&request_path).current_dir(dir).env("TMPDIR", dir);
    // Where no result is made there is none to keep clean, and credentials come in many variables.
    if request.mode != worker::Mode::Act {
        let seen = ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        command.env_clear().env("TMPDIR", dir).envs(seen);
    }
    let end = stderr.try_clone().map_err(cannot("start", program))?;
    command.args([worker::ENGINE, &std::process::id().to_string()]);
    match rules {
        Some(rules) => command.arg(worker::CONFINED).stdin(rules),
        None => command.stdin(Stdio::null()),
    };
    // Nothing is done between fork and exec, so that the system need not copy this process.
    command.stdout(Stdio::piped()).stderr(end).process_group(0);
    let child = command.spawn().map_err(cannot("start", program))?;
    let mut group = Group::new(child, running);
    let stdout = group.child.stdout.take().expect("standard output is piped");

    let mut outcome = Outcome::default();
    let mut failure = None;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.map_err(cannot("read the events of", program))?;
        match serde_json::from_slice::<Event>(&line) {
            Ok(Event::Progress(progress)) => on(Said::Progress(&progress)),
            Ok(Event::Metric { name, value }) => {
                outcome.metrics.insert(name, value);
            }
            Ok(Event::Version { name, version }) => {
                outcome.versions.insert(name, version);
            }
            Ok(Event::Note { text }) => {
                outcome.log.extend_from_slice(text.as_bytes());
                outcome.log.push(b'\n');
                on(Said::Note(&text));
            }
            Ok(Event::Usage { cpu_seconds, peak_memory }) => {
                outcome.cpu_seconds = cpu_seconds;
                outcome.peak_memory = peak_memory;
            }
            Ok(Event::Failed(failed)) => failure = Some(failed),
            // A library that prints to standard output: worth keeping, not worth stopping for.
            Err(_) => {
                outcome.log.extend_from_slice(&line);
                outcome.log.push(b'\n');
            }
        }
    }
    let status = group.child.wait().map_err(cannot("wait for", program))?;
    let mut said = Vec::new();
    let _ = stderr.rewind().and_then(|()| stderr.read_to_end(&mut said));
    outcome.log.extend_from_slice(&said);

    if running.is_stopped() {
        failure.iter().for_each(|failure| on(Said::Note(&failure.message)));
        return Err(Failure::environment("stopped"));
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if status.success() {
        return Ok(outcome);
    }
    let how = match (status.code(), status.signal()) {
        (_, Some(9)) => "was killed (signal 9): out of memory, or somebody stopped it".to_string(),
        (_, Some(signal)) => format!("died of signal {signal}"),
        (Some(code), _) => format!("ended with exit code {code}"),
        _ => "ended badly".to_string(),
    };
    let last = tail(&outcome.log, 40);
    Err(Failure::bug(format!("the worker of {} {how}{last}", request.step)))
}

/// A place for what a worker says: in memory, where the system can.
fn memory(dir: &Path) -> std::io::Result<File> {
    #[cfg(target_os = "linux")]
    let (_, file) = (dir, rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC)?);
    #[cfg(not(target_os = "linux"))]
    let file =
        File::options().read(true).write(true).create_new(true).open(dir.join("stderr.log"))?;
    Ok(file.into())
}

/// A worker and all that it started: none of them outlives this value.
struct Group<'a> {
    child: Child,
    id: Option<Pid>,
    running: &'a Running,
}

impl<'a> Group<'a> {
    fn new(child: Child, running: &'a Running) -> Self {
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        id.into_iter().for_each(|id| running.add(id));
        Self { child, id, running }
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            held(&self.running.groups).remove(&id);
            // Already gone is as good.
            let _ = kill_process_group(id, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn tail(stderr: &[u8], lines: usize) -> String {
    let text = String::from_utf8_lossy(stderr);
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    if last.is_empty() { String::new() } else { format!("; it said:\n{}", last.join("\n")) }
}

/// Compiles a family's worker and says where it is.
pub fn compile(
    root: &Path,
    family: &str,
    env: &BTreeMap<String, String>,
    on_line: &mut dyn FnMut(&str),
) -> Result<PathBuf, Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let bin = format!("{family}-worker");
    let mut command = Command::new(&cargo);
    command
        .args(["build", "--release", "--locked", "--package", family, "--features", "worker"])
        .args(["--bin", &bin, "--message-format", "json-render-diagnostics"])
        .current_dir(root)
        .envs(env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child =
        command.spawn().map_err(|e| Failure::environment(format!("cannot start cargo: {e}")))?;
    let stdout = child.stdout.take().expect("standard output is piped");
    let artifacts = std::thread::spawn(move || {
        let mut executable = None;
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let message: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if message["target"]["name"] == bin.as_str()
                && let Some(path) = message["executable"].as_str()
            {
                executable = Some(PathBuf::from(path));
            }
        }
        executable
    });
    let stderr = child.stderr.take().expect("standard error is piped");
    let mut said = Vec::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        on_line(line.trim());
        said.push(line);
    }
    let status = child.wait().map_err(|e| Failure::environment(format!("cargo: {e}")))?;
    match artifacts.join() {
        Ok(Some(path)) if status.success() => Ok(path),
        _ => {
            let last = said[said.len().saturating_sub(40)..].join("\n");
            Err(Failure::environment(format!("the worker of `{family}` does not compile:\n{last}"))
                .hint("`cargo xtask doctor` tells whether a tool is missing"))
        }
    }
}
