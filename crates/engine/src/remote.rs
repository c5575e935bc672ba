//! The shared cache: its settings, its worker, and what a build asks of it.
//!
//! Knows nothing of S3: the worker (`crates/cache`) does, and is compiled when a cache is first used.
//! A cache that cannot be reached costs a warning, and the build goes on without it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cache::{Answer, Asked, Done, Request, Said, Setup};
use step::worker::Progress;
use step::{ActionKey, ActionResult, Failure};

use crate::build::Built;
use crate::resolve::Graph;
use crate::target::TargetId;
use crate::{Engine, Error, Event, Status, cannot, execute, held, nar};

/// Where the shared cache is, and what may be done with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Remote {
    pub location: s3::Location,
    pub settings: s3::Settings,
    /// Whether results are given to it, or only taken from it.
    pub write: bool,
    /// Public keys, `name:base64`: whose results are believed.
    pub trusted: Vec<String>,
    /// The program that speaks to it; compiled from the workspace, if not said.
    pub worker: Option<PathBuf>,
    /// What the worker's environment has beside ours.
    pub env: BTreeMap<String, String>,
    /// For how long a lease holds that nobody renews.
    pub lease: Duration,
}

/// The variables that say otherwise than the workspace's manifest.
const REMOTE: &str = "ANNEAL_REMOTE";
const ENDPOINT: &str = "ANNEAL_REMOTE_ENDPOINT";
const REGION: &str = "ANNEAL_REMOTE_REGION";
const PATH_STYLE: &str = "ANNEAL_REMOTE_PATH_STYLE";
const MODE: &str = "ANNEAL_REMOTE_MODE";

impl Remote {
    /// At this place, to read from only.
    pub fn at(location: s3::Location) -> Self {
        Self {
            location,
            settings: s3::Settings::default(),
            write: false,
            trusted: Vec::new(),
            worker: None,
            env: BTreeMap::new(),
            lease: Duration::from_secs(30),
        }
    }

    /// What `[workspace.metadata.anneal]` and the environment say; none if neither names one.
    pub fn of(root: &Path) -> Result<Option<Self>, Failure> {
        Self::from(&crate::metadata(root), &|name| {
            std::env::var(name).ok().filter(|value| !value.is_empty())
        })
        .map_err(|failure| Failure {
            message: format!("{}: {}", root.join("Cargo.toml").display(), failure.message),
            ..failure
        })
    }

    fn from(
        manifest: &toml::Table,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, Failure> {
        let text = |key: &str, name: &str| match (variable(name), manifest.get(key)) {
            (Some(text), _) => Ok(Some(text)),
            (None, Some(toml::Value::String(text))) => Ok(Some(text.clone())),
            (None, None) => Ok(None),
            (None, Some(other)) => Err(Failure::input(format!("{key} = {other} is no text"))),
        };
        let Some(location) = text("remote", REMOTE)? else { return Ok(None) };
        let mut remote = Self::at(location.parse()?);
        remote.settings.endpoint = text("remote-endpoint", ENDPOINT)?;
        remote.settings.region = text("remote-region", REGION)?;
        remote.settings.path_style = match (variable(PATH_STYLE), manifest.get("remote-path-style"))
        {
            (Some(text), _) => ["1", "true"].contains(&text.as_str()),
            (None, Some(toml::Value::Boolean(yes))) => *yes,
            (None, None) => false,
            (None, Some(other)) => {
                return Err(Failure::input(format!("remote-path-style = {other}"))
                    .hint("it is true or false"));
            }
        };
        remote.write = match text("remote-mode", MODE)?.as_deref() {
            Some("read-write") => true,
            Some("read") => false,
            // A laptop reads; CI, where it can sign, writes.
            None => {
                let signs = [cache::SIGNING_KEY, cache::SIGNING_KEY_FILE];
                variable("CI").is_some() && signs.iter().any(|name| variable(name).is_some())
            }
            Some(other) => {
                return Err(Failure::input(format!("remote-mode = \"{other}\""))
                    .hint("it is \"read\" or \"read-write\""));
            }
        };
        let trusted = manifest.get("trusted").cloned().unwrap_or(toml::Value::Array(Vec::new()));
        remote.trusted = trusted.try_into().map_err(|_| {
            Failure::input("`trusted` is no list of keys").hint("write [\"name:base64\"]")
        })?;
        Ok(Some(remote))
    }
}

/// Whether there is a shared cache, as far as is known.
#[derive(Default)]
pub(crate) enum State {
    #[default]
    Unread,
    Off,
    Set(Remote),
    On(Arc<Connection>),
}

/// The cache's worker, which runs.
pub(crate) struct Connection {
    pub write: bool,
    child: Child,
    input: Mutex<Option<ChildStdin>>,
    open: Arc<Mutex<Open>>,
    next: AtomicU64,
}

/// Who waits for which answer.
#[derive(Default)]
struct Open {
    waiting: HashMap<u64, mpsc::Sender<Said>>,
    /// Why there are no more answers.
    ended: Option<Failure>,
}

impl Connection {
    fn start(worker: &Path, remote: &Remote, store: &Path) -> Result<Self, Failure> {
        let mut command = Command::new(worker);
        // Ctrl-C is for us: the worker ends with its input, when it has given its leases back.
        command.process_group(0).envs(&remote.env);
        // With glibc: a piece's memory goes back to the system and is not kept for the next thread's.
        command.env("MALLOC_MMAP_THRESHOLD_", "1048576");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(cannot("start", worker))?;
        let mut input = child.stdin.take().expect("standard input is piped");
        let output = child.stdout.take().expect("standard output is piped");
        let setup = Setup {
            format: cache::FORMAT,
            location: remote.location.clone(),
            settings: remote.settings.clone(),
            store: store.to_path_buf(),
            write: remote.write,
            trusted: remote.trusted.clone(),
            lease_seconds: remote.lease.as_secs_f64(),
        };
        // If it has ended already, its answers say why.
        let _ = input.write_all(&line(&setup));
        let open: Arc<Mutex<Open>> = Arc::default();
        let shared = open.clone();
        std::thread::spawn(move || {
            let mut why = Failure::bug("the shared cache's worker has ended");
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                match serde_json::from_str::<Answer>(&line) {
                    Ok(Answer { id: 0, said: Said::Failed(failure) }) => why = failure,
                    Ok(Answer { id, said }) => {
                        let mut open = held(&shared);
                        let last = matches!(said, Said::Done(_) | Said::Failed(_));
                        if let Some(sender) = open.waiting.get(&id) {
                            let _ = sender.send(said);
                        }
                        if last {
                            open.waiting.remove(&id);
                        }
                    }
                    Err(_) => {}
                }
            }
            let mut open = held(&shared);
            open.ended = Some(why);
            open.waiting.clear();
        });
        let write = remote.write;
        Ok(Self { write, child, input: Mutex::new(Some(input)), open, next: AtomicU64::new(1) })
    }

    /// Asks, and waits for the answer until `stopped`.
    pub fn ask(
        &self,
        request: Request,
        stopped: &dyn Fn() -> bool,
        on: &mut dyn FnMut(Said),
    ) -> Result<Done, Failure> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        held(&self.open).waiting.insert(id, sender);
        let asked = line(&Asked { id, request });
        // If nobody reads it, nobody answers either.
        held(&self.input).iter_mut().for_each(|input| _ = input.write_all(&asked));
        loop {
            if let Some(ended) = &held(&self.open).ended {
                return Err(ended.clone());
            }
            match receiver.recv_timeout(Duration::from_millis(100)) {
                Ok(Said::Done(done)) => return Ok(done),
                Ok(Said::Failed(failure)) => return Err(failure),
                Ok(said) => on(said),
                Err(RecvTimeoutError::Timeout) if stopped() => {
                    return Err(Failure::environment("stopped"));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = held(&self.open).ended.clone();
                    let why = || Failure::bug("the shared cache's worker gave no answer");
                    return Err(ended.unwrap_or_else(why));
                }
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(held(&self.input).take());
        let _ = self.child.wait();
    }
}

fn line(value: &impl serde::Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("requests serialise to JSON");
    line.push(b'\n');
    line
}

/// What the shared cache says of an action that is about to run here.
pub(crate) enum Leave {
    /// Run it.
    Go,
    /// It is made: what there is of it, and how many bytes came for it.
    Made(Box<ActionResult>, u64),
    /// Another machine runs it.
    Held,
}

impl Engine {
    /// With this shared cache, whatever the manifest says.
    pub fn with_remote(self, remote: Remote) -> Self {
        Self { remote: Mutex::new(State::Set(remote)), ..self }
    }

    /// Without any.
    pub fn offline(self) -> Self {
        Self { remote: Mutex::new(State::Off), ..self }
    }

    /// Whether a shared cache may be asked: reads the settings, starts nothing.
    pub(crate) fn has_remote(&self, tell: &dyn Fn(Event<'_>)) -> bool {
        let mut state = held(&self.remote);
        if let State::Unread = *state {
            *state = match Remote::of(&self.root) {
                Ok(Some(remote)) => State::Set(remote),
                Ok(None) => State::Off,
                Err(failure) => {
                    warn(&failure, tell);
                    State::Off
                }
            };
        }
        !matches!(*state, State::Off)
    }

    /// The shared cache's worker, started and if need be compiled.
    pub(crate) fn remote(&self, tell: &dyn Fn(Event<'_>)) -> Option<Arc<Connection>> {
        if !self.has_remote(tell) {
            return None;
        }
        // Whoever needs it too waits here.
        let mut state = held(&self.remote);
        if let State::Set(remote) = &*state {
            let started = self
                .cache_worker(remote, tell)
                .and_then(|worker| Ok(Connection::start(&worker, remote, self.store.root())?));
            *state = match started {
                Ok(connection) => State::On(Arc::new(connection)),
                Err(Error::Failure(failure)) => {
                    warn(&failure, tell);
                    State::Off
                }
                Err(Error::Recipe(_)) => State::Off,
            };
        }
        match &*state {
            State::On(connection) => Some(connection.clone()),
            _ => None,
        }
    }

    fn cache_worker(&self, remote: &Remote, tell: &dyn Fn(Event<'_>)) -> Result<PathBuf, Error> {
        match &remote.worker {
            Some(worker) => Ok(worker.clone()),
            None => self.compiled_worker("cache", &[], &mut |event| tell(event)),
        }
    }

    /// Where the shared cache is, if there is one.
    pub fn remote_settings(&self) -> Result<Option<Remote>, Failure> {
        match &*held(&self.remote) {
            State::Set(remote) => Ok(Some(remote.clone())),
            State::Off => Ok(None),
            _ => Remote::of(&self.root),
        }
    }

    /// Where the shared cache is.
    ///
    /// # Errors
    /// There is none.
    pub fn needs_remote(&self) -> Result<Remote, Failure> {
        self.remote_settings()?.ok_or_else(|| {
            Failure::input("there is no shared cache").hint(
                "name one in Cargo.toml: [workspace.metadata.anneal] remote = \"s3://bucket/prefix\"",
            )
        })
    }

    /// Makes a key to sign results by. Returns its public half, for the list of trusted ones.
    pub fn keygen(
        &self,
        file: &Path,
        name: &str,
        on: &mut dyn FnMut(Event),
    ) -> Result<String, Error> {
        let worker = match &*held(&self.remote) {
            State::Set(Remote { worker: Some(worker), .. }) => worker.clone(),
            _ => self.compiled_worker("cache", &[], on)?,
        };
        let output = Command::new(&worker).arg("keygen").arg(file).arg(name).output();
        let output = output.map_err(cannot("start", &worker))?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_string();
        if output.status.success() {
            return Ok(said);
        }
        match serde_json::from_str::<Answer>(&said) {
            Ok(Answer { said: Said::Failed(failure), .. }) => Err(failure.into()),
            _ => Err(Failure::bug(String::from_utf8_lossy(&output.stderr)).into()),
        }
    }

    /// From now on without the cache, which said why.
    fn give_up(&self, failure: &Failure, tell: &dyn Fn(Event<'_>)) {
        let mut state = held(&self.remote);
        if !matches!(*state, State::Off) && !self.running.is_stopped() {
            warn(failure, tell);
        }
        // Those who still wait for an answer hold on to the connection.
        *state = State::Off;
    }

    /// A result that the cache has, its files in the store; `None` where it has none.
    pub(crate) fn pull(
        &self,
        target: &TargetId,
        key: ActionKey,
        tell: &dyn Fn(Event<'_>),
    ) -> Option<(Box<ActionResult>, u64)> {
        self.ask(target, Request::Pull { key }, &|| false, tell).and_then(|done| match done {
            Done::Pulled { result, transferred } => Some((result, transferred)),
            Done::Absent { why } => {
                why.iter().for_each(|text| tell(Event::Note { target, text }));
                None
            }
            _ => None,
        })
    }

    /// Before an action runs here: whether it may.
    pub(crate) fn leave(
        &self,
        target: &TargetId,
        key: ActionKey,
        tell: &dyn Fn(Event<'_>),
    ) -> Leave {
        let who = format!("process {} on {}", std::process::id(), execute::host());
        loop {
            let request = Request::Lease { key, who: who.clone() };
            match self.ask(target, request, &|| false, tell) {
                Some(Done::Pulled { result, transferred }) => {
                    return Leave::Made(result, transferred);
                }
                Some(Done::Held { holder }) => {
                    tell(Event::Held { target, holder: &holder });
                    return Leave::Held;
                }
                // It was given back just now.
                Some(Done::Free) => {}
                _ => return Leave::Go,
            }
        }
    }

    /// Waits for another machine's result; `None` once there is nothing to wait for.
    pub(crate) fn wait_for(
        &self,
        target: &TargetId,
        key: ActionKey,
        stopped: &dyn Fn() -> bool,
        tell: &dyn Fn(Event<'_>),
    ) -> Option<(Box<ActionResult>, u64)> {
        match self.ask(target, Request::Await { key }, stopped, tell) {
            Some(Done::Pulled { result, transferred }) => Some((result, transferred)),
            _ => None,
        }
    }

    /// Gives a lease back without a result.
    pub(crate) fn release(&self, target: &TargetId, key: ActionKey, tell: &dyn Fn(Event<'_>)) {
        self.ask(target, Request::Release { key }, &|| false, tell);
    }

    /// Gives a result to the cache, if this machine does that, and its lease back.
    pub(crate) fn share(
        &self,
        target: &TargetId,
        key: ActionKey,
        tell: &dyn Fn(Event<'_>),
    ) -> bool {
        match self.ask(target, Request::Push { key }, &|| false, tell) {
            Some(Done::Pushed { transferred, shared }) => {
                tell(Event::Shared { target, key, transferred, shared });
                true
            }
            _ => false,
        }
    }

    /// A result that was made here goes to the cache, or its lease back.
    pub(crate) fn give(&self, target: &TargetId, key: ActionKey, tell: &dyn Fn(Event<'_>)) {
        if self.remote(tell).is_some_and(|connection| connection.write) {
            self.share(target, key, tell);
        }
    }

    /// One question; `None` if there is no cache, or none any more.
    fn ask(
        &self,
        target: &TargetId,
        request: Request,
        stopped: &dyn Fn() -> bool,
        tell: &dyn Fn(Event<'_>),
    ) -> Option<Done> {
        let connection = self.remote(tell)?;
        let gives = matches!(request, Request::Push { .. } | Request::Archive { .. });
        let phase = if gives { "share" } else { "fetch" };
        let began = Instant::now();
        let stopped = || stopped() || self.running.is_stopped();
        let asked = connection.ask(request, &stopped, &mut |said| match said {
            Said::Progress { done, total } => {
                let rate = done as f64 / 1e6 / began.elapsed().as_secs_f64();
                let progress = Progress {
                    phase: phase.into(),
                    done,
                    total,
                    unit: "bytes".into(),
                    values: [("MB/s".to_string(), rate)].into(),
                };
                tell(Event::Progress { target, progress: &progress });
            }
            Said::Note(text) => tell(Event::Note { target, text: &text }),
            Said::Done(_) | Said::Failed(_) => {}
        });
        match asked {
            Ok(done) => Some(done),
            Err(_) if stopped() => None,
            Err(failure) => {
                self.give_up(&failure, tell);
                None
            }
        }
    }

    /// Keeps a result whose files came from the cache.
    pub(crate) fn fetched(
        &self,
        target: &TargetId,
        result: &ActionResult,
        transferred: u64,
        tell: &dyn Fn(Event<'_>),
    ) -> Result<Built, Error> {
        self.store.note_added(transferred);
        let result = self.store.actions().record(result)?;
        self.point(target, &result)?;
        let ActionResult { key, output, .. } = result;
        tell(Event::Fetched { target, key, output, transferred });
        Ok(Built { id: target.clone(), key, output, ran: false, fetched: Some(transferred) })
    }

    /// Gives every result of `graph` that there is to the cache, and those that are pinned as Nix
    /// archives, too; says how many results went.
    pub fn push(&self, graph: &Graph, on: &mut (dyn FnMut(Event) + Send)) -> Result<usize, Error> {
        let plan = self.plan(graph)?;
        let on = Mutex::new(on);
        let tell = |event: Event<'_>| held(&on)(event);
        let made = plan.targets.iter().filter_map(|target| match &target.status {
            Status::Cached(result) => Some((&target.id, result.key)),
            _ => None,
        });
        let made: Vec<_> = made.collect();
        let next = AtomicU64::new(0);
        let work = || {
            let mut pushed = 0;
            while let Some((target, key)) = made.get(next.fetch_add(1, Ordering::Relaxed) as usize)
            {
                pushed += usize::from(self.share(target, *key, &tell));
            }
            pushed
        };
        let pushed = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
            workers.into_iter().map(|worker| worker.join().expect("no push panics")).sum()
        });
        for (target, pinned, current) in self.locked_results(graph)? {
            if current {
                self.archive(&target, &pinned, &tell)?;
            }
        }
        Ok(pushed)
    }

    /// Gives a pinned result to the cache as `nix build` takes it.
    fn archive(
        &self,
        target: &TargetId,
        pinned: &recipe::PinnedResult,
        tell: &dyn Fn(Event<'_>),
    ) -> Result<(), Error> {
        let ask = |file| {
            let request = Request::Archive { sha256: pinned.sha256.clone(), file };
            self.ask(target, request, &|| false, tell)
        };
        let Some(Done::Absent { .. }) = ask(None) else { return Ok(()) };
        let attempt = self.store.attempt("archive")?;
        let path = attempt.path().join("nar");
        let write = |file: File| {
            let mut archive = BufWriter::new(file);
            nar::write(&self.materialise(pinned.tree)?, &mut archive)
                .and_then(|()| archive.flush())
                .map_err(cannot("write", &path))?;
            Ok::<_, Error>(())
        };
        write(File::create(&path).map_err(cannot("write", &path))?)?;
        ask(Some(path));
        Ok(())
    }

    /// What is in the cache.
    pub fn remote_status(
        &self,
        on: &mut (dyn FnMut(Event) + Send),
    ) -> Result<cache::Status, Error> {
        let on = Mutex::new(on);
        let tell = |event: Event<'_>| held(&on)(event);
        let none = || Failure::environment("the shared cache's worker does not start");
        let connection = self.remote(&tell).ok_or_else(none)?;
        let stopped = || self.running.is_stopped();
        match connection.ask(Request::Status, &stopped, &mut |_| {})? {
            Done::Status(status) => Ok(status),
            _ => Err(Failure::bug("the shared cache's worker answered something else").into()),
        }
    }
}

fn warn(failure: &Failure, tell: &dyn Fn(Event<'_>)) {
    tell(Event::Warning { failure });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(manifest: &str, variables: &[(&str, &str)]) -> Result<Option<Remote>, String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        };
        Remote::from(&manifest.parse().unwrap(), &variable).map_err(|failure| failure.message)
    }

    #[test]
    fn the_manifest_names_a_cache_and_the_environment_another() {
        assert_eq!(remote("max-size = '1 GB'", &[]), Ok(None));
        let manifest = "remote = 's3://bucket/a'\nremote-region = 'eu-west-1'\ntrusted = ['ci:x']";
        let read = remote(manifest, &[]).unwrap().unwrap();
        assert_eq!(read.location.to_string(), "s3://bucket/a");
        assert_eq!(read.settings.region.as_deref(), Some("eu-west-1"));
        assert_eq!((read.write, read.trusted), (false, vec!["ci:x".to_string()]));
        let other = [(REMOTE, "s3://other"), (PATH_STYLE, "true"), (MODE, "read-write")];
        let other = remote(manifest, &other).unwrap().unwrap();
        assert_eq!(other.location.to_string(), "s3://other");
        assert!(other.write && other.settings.path_style);
    }

    #[test]
    fn ci_writes_where_it_can_sign() {
        let writes = |variables: &[(&str, &str)]| {
            remote("remote = 's3://bucket'", variables).unwrap().unwrap().write
        };
        assert!(!writes(&[("CI", "true")]));
        assert!(!writes(&[(cache::SIGNING_KEY, "k")]));
        assert!(writes(&[("CI", "true"), (cache::SIGNING_KEY, "k")]));
        assert!(!writes(&[("CI", "true"), (cache::SIGNING_KEY, "k"), (MODE, "read")]));
    }

    #[test]
    fn settings_that_make_no_sense_are_told() {
        for (manifest, told) in [
            ("remote = 3", "remote = 3 is no text"),
            ("remote = 'bucket'", "`bucket` is no place in S3: it begins otherwise"),
            ("remote = 's3://bucket'\nremote-mode = 'write'", "remote-mode = \"write\""),
            ("remote = 's3://bucket'\ntrusted = 'ci'", "`trusted` is no list of keys"),
        ] {
            assert_eq!(remote(manifest, &[]).unwrap_err(), told);
        }
    }
}
