//! The worker protocol: one request file in, read-only input folders, one output folder, JSON
//! lines of events on standard output, one exit code.
//!
//! A worker's `main` is `step::worker::main(&[("merge/lora", lora::run)])`. It knows nothing of
//! the store, of recipes, or of who started it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::{Class, Failure};
use crate::kind::Kind;

/// What a worker is asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub format: u32,
    pub step: String,
    pub mode: Mode,
    /// Resolved parameters: the step's struct.
    pub params: Value,
    /// Input name → artifacts. One element unless the input takes many.
    pub inputs: BTreeMap<String, Vec<Input>>,
    /// An empty folder: becomes the artifact. Nothing that differs from run to run belongs here.
    pub out: PathBuf,
    /// An empty folder for what people read beside the artifact: curves, tables, times.
    pub report: PathBuf,
    /// A folder that outlives a killed attempt of the same action: checkpoints go here.
    pub scratch: PathBuf,
    /// Tool name → its folder.
    pub tools: BTreeMap<String, PathBuf>,
    /// How many threads to use.
    pub threads: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Make the artifact in `out`.
    Build,
    /// Ask the outside world what the step names today; write `lock.json` in `out`.
    Lock,
    /// Do something outside; write `answer.json` in `out`. The parameters are an [`Act`].
    Act,
}

/// What a step that acts outside is asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Act {
    /// The step's own parameters, as its recipe has them.
    pub target: Value,
    /// What the family's light half declares.
    pub task: Value,
}

/// An artifact that a step reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// The target's name, or the file's.
    pub label: String,
    pub kind: Kind,
    /// A folder, read-only.
    pub path: PathBuf,
    /// Where a person finds it, for error messages: `recipes/demo/rows.jsonl`. Never in a result.
    pub origin: String,
}

/// A line on a worker's standard output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    Progress(Progress),
    /// A figure of the result, kept in the action's result.
    Metric {
        name: String,
        value: f64,
    },
    /// A line for people; kept in the log.
    Note {
        text: String,
    },
    /// A library's version or the device's name, for the provenance.
    Version {
        name: String,
        version: String,
    },
    /// What the step cost: the last line of one that ended well.
    Usage {
        cpu_seconds: f64,
        /// Bytes.
        peak_memory: u64,
    },
    Failed(Failure),
}

/// How far a step is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// `download`, `train`.
    pub phase: String,
    pub done: u64,
    /// 0 when nobody knows.
    pub total: u64,
    /// `steps`, `bytes`, `rows`.
    pub unit: String,
    /// What else is worth seeing now: `loss`, `tokens/s`.
    #[serde(default)]
    pub values: BTreeMap<String, f64>,
}

/// A request being worked on.
pub struct Job {
    pub request: Request,
    events: Mutex<Box<dyn Write + Send>>,
    last_progress: Mutex<Option<Instant>>,
}

impl Job {
    /// A job that writes its events to `events`: how tests run a step without a process.
    pub fn new(request: Request, events: impl Write + Send + 'static) -> Self {
        Self { request, events: Mutex::new(Box::new(events)), last_progress: Mutex::new(None) }
    }

    /// The step's parameters.
    pub fn params<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        T::deserialize(&self.request.params)
            .map_err(|e| Failure::bug(format!("the request's parameters do not parse: {e}")).into())
    }

    /// The artifacts of an input, none if the recipe leaves it out.
    pub fn inputs(&self, name: &str) -> &[Input] {
        self.request.inputs.get(name).map_or(&[], Vec::as_slice)
    }

    /// The artifact of an input that takes exactly one.
    pub fn input(&self, name: &str) -> anyhow::Result<&Input> {
        match self.inputs(name) {
            [one] => Ok(one),
            other => Err(Failure::bug(format!(
                "the request has {} artifacts for input `{name}`, expected one",
                other.len()
            ))
            .into()),
        }
    }

    pub fn out(&self) -> &Path {
        &self.request.out
    }

    pub fn report(&self) -> &Path {
        &self.request.report
    }

    pub fn scratch(&self) -> &Path {
        &self.request.scratch
    }

    pub fn tool(&self, name: &str) -> anyhow::Result<&Path> {
        self.request
            .tools
            .get(name)
            .map(PathBuf::as_path)
            .ok_or_else(|| Failure::bug(format!("the request names no tool `{name}`")).into())
    }

    pub fn threads(&self) -> usize {
        self.request.threads.max(1)
    }

    /// How many threads are worth their while to run a model whose weights, at 16 bits, take so
    /// many bytes. Threads that wait for each other over small matrices cost more than they carry.
    pub fn threads_for(&self, weights: u64) -> usize {
        const BYTES_A_THREAD: u64 = 16 << 20;
        let useful = usize::try_from(1 + weights / BYTES_A_THREAD).unwrap_or(usize::MAX);
        self.threads().min(useful)
    }

    /// Tells how far the step is. At most ten lines a second are written; the last one always is.
    pub fn progress(&self, progress: Progress) {
        let mut last = self.last_progress.lock().expect("no panic while holding it");
        let due = last.is_none_or(|at| at.elapsed() >= Duration::from_millis(100));
        if due || progress.done == progress.total {
            *last = Some(Instant::now());
            self.emit(&Event::Progress(progress));
        }
    }

    pub fn metric(&self, name: &str, value: f64) {
        self.emit(&Event::Metric { name: name.into(), value });
    }

    pub fn note(&self, text: impl Into<String>) {
        self.emit(&Event::Note { text: text.into() });
    }

    pub fn version(&self, name: &str, version: impl Into<String>) {
        self.emit(&Event::Version { name: name.into(), version: version.into() });
    }

    fn emit(&self, event: &Event) {
        let mut line = serde_json::to_vec(event).expect("events serialise to JSON");
        line.push(b'\n');
        let mut events = self.events.lock().expect("no panic while holding it");
        // Nobody listening is no reason to stop: the engine kills what it no longer wants.
        let _ = events.write_all(&line).and_then(|()| events.flush());
    }
}

/// A step's implementation.
pub type Run = fn(&Job) -> anyhow::Result<()>;

/// The option with which an engine names itself, by its process id: the worker ends when it does.
pub const ENGINE: &str = "--engine";
/// The option that says that standard input is a Landlock ruleset, for the worker to lay on itself.
pub const CONFINED: &str = "--confined";

/// The whole of a worker's `main`: reads the request named by the first argument, runs its step.
///
/// An engine leaves it to the worker to confine itself and to end with the engine. To do that in
/// between fork and exec would mean a copy of the engine's page tables for every step.
pub fn main(steps: &[(&str, Run)]) -> ExitCode {
    let job = match arguments() {
        Ok(request) => Job::new(request, std::io::stdout()),
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(Class::Bug.exit_code());
        }
    };
    let result = match steps.iter().find(|(name, _)| *name == job.request.step) {
        Some((_, run)) => run(&job),
        None => Err(Failure::bug(format!("this worker has no step `{}`", job.request.step)).into()),
    };
    match result {
        Ok(()) => {
            job.emit(&usage());
            ExitCode::SUCCESS
        }
        Err(error) => {
            let failure = Failure::from_anyhow(&error);
            let code = failure.class.exit_code();
            job.emit(&Event::Failed(failure));
            ExitCode::from(code)
        }
    }
}

fn arguments() -> anyhow::Result<Request> {
    let usage = "usage: worker REQUEST.json [--engine PID] [--confined]";
    let mut args = std::env::args_os().skip(1);
    let path = PathBuf::from(args.next().context(usage)?);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some(ENGINE) => {
                let pid = args.next().and_then(|pid| pid.to_str()?.parse().ok());
                end_with(pid.context(usage)?)?;
            }
            Some(CONFINED) => confine().context("cannot confine this process")?,
            _ => anyhow::bail!(usage),
        }
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is no request", path.display()))
}

/// When the engine is killed, so is the worker: no orphan goes on writing.
fn end_with(engine: i32) -> anyhow::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, getppid, set_parent_process_death_signal};
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have been killed already.
        if getppid().is_none_or(|parent| parent.as_raw_pid() != engine) {
            anyhow::bail!("the engine is gone");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = engine;
    Ok(())
}

/// Lays the ruleset that is standard input on this process, before it has another thread.
fn confine() -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let nothing = std::fs::File::open("/dev/null")?;
        // SAFETY: none of the calls takes a pointer.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::syscall(libc::SYS_landlock_restrict_self, libc::STDIN_FILENO, 0) != 0
                || libc::dup2(nothing.as_raw_fd(), libc::STDIN_FILENO) < 0
        };
        if failed {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What this process has used so far, zeros where the system does not tell.
fn usage() -> Event {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15 (user and system time, in hundredths), counted after the name in brackets.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    Event::Usage { cpu_seconds: ticks as f64 / 100.0, peak_memory: kib.unwrap_or(0) * 1024 }
}
