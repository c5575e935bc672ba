//! `cache-worker`: serves one engine's requests to the shared cache, as `cache`'s library says.
//!
//! `cache-worker keygen FILE NAME` makes a signing key. Knows nothing of recipes or of how a step runs.

mod layout;
mod lease;
mod pieces;
mod pull;
mod push;
mod signature;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cache::{Answer, Asked, Done, Request, Said, Setup, Status};
use step::{ActionKey, BlobDigest, Failure};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinSet;

use signature::{Secret, Trusted};

/// How many chunks of at most 8 MiB may be in memory.
const IN_MEMORY: usize = 6;

/// The cache, and what this process knows of it.
struct Remote {
    bucket: s3::Bucket,
    store: store::Store,
    write: bool,
    trusted: Trusted,
    secret: Option<Secret>,
    lease_time: Duration,
    memory: Arc<Semaphore>,
    /// Of chunks that have come, for the next: fresh memory costs a tenth of a pull.
    buffers: Mutex<Vec<Vec<u8>>>,
    conditional: OnceCell<bool>,
    leases: Mutex<HashMap<ActionKey, lease::Ours>>,
    /// Leases by their ETags that were watched until they ran out.
    run_out: Mutex<HashMap<ActionKey, String>>,
    /// Results by their ETags that cannot be used, and chunks: whoever has better ones replaces them.
    broken: Mutex<HashMap<ActionKey, String>>,
    damaged: Mutex<HashSet<BlobDigest>>,
}

/// Where the answers to one request go.
struct Tell {
    id: u64,
    last: Mutex<Option<Instant>>,
}

impl Tell {
    fn new(id: u64) -> Self {
        Self { id, last: Mutex::new(None) }
    }

    /// At most ten lines a second.
    fn progress(&self, done: u64, total: u64) {
        let mut last = self.last.lock().expect("no panic while holding it");
        let due = last.get_or_insert_with(Instant::now);
        if due.elapsed() >= Duration::from_millis(100) {
            *due = Instant::now();
            self.say(Said::Progress { done, total });
        }
    }

    fn note(&self, text: &str) {
        self.say(Said::Note(text.into()));
    }

    fn say(&self, said: Said) {
        use std::io::Write;
        let answer = Answer { id: self.id, said };
        let mut line = serde_json::to_vec(&answer).expect("answers serialise to JSON");
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        // An engine that is gone hears nothing.
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, file, name] = args.as_slice()
        && command == "keygen"
    {
        return match Secret::generate(Path::new(file), name) {
            Ok(public) => {
                println!("{public}");
                ExitCode::SUCCESS
            }
            Err(failure) => fail(&failure),
        };
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(e) => return fail(&Failure::environment(format!("cannot start a thread: {e}"))),
    };
    let ended = runtime.block_on(serve());
    // Standard input may be read by a thread that does not end.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}

/// Tells whoever listens: as the answer to the setup, which has no number, and as text.
fn fail(failure: &Failure) -> ExitCode {
    Tell::new(0).say(Said::Failed(failure.clone()));
    eprintln!("error: {}", failure.message);
    ExitCode::from(failure.class.exit_code())
}

async fn serve() -> Result<(), Failure> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let Some(setup) = line(&mut lines).await? else { return Ok(()) };
    let setup: Setup = parse(&setup)?;
    let remote = Arc::new(Remote::open(setup).await?);
    let mut running = JoinSet::new();
    while let Some(asked) = line(&mut lines).await? {
        let Asked { id, request } = parse(&asked)?;
        let remote = remote.clone();
        running.spawn(async move {
            let tell = Tell::new(id);
            let said = match remote.answer(request, &tell).await {
                Ok(done) => Said::Done(done),
                Err(failure) => Said::Failed(failure),
            };
            tell.say(said);
        });
        while running.try_join_next().is_some() {}
    }
    running.shutdown().await;
    remote.release_all().await;
    remote.store.settle().map_err(Into::into)
}

async fn line(lines: &mut Lines<BufReader<Stdin>>) -> Result<Option<String>, Failure> {
    let line = lines.next_line().await;
    line.map_err(|e| Failure::environment(format!("cannot read standard input: {e}")))
}

fn parse<T: serde::de::DeserializeOwned>(line: &str) -> Result<T, Failure> {
    serde_json::from_str(line).map_err(|e| Failure::bug(format!("no request: {e}: {line}")))
}

impl Remote {
    async fn open(setup: Setup) -> Result<Self, Failure> {
        if setup.format != cache::FORMAT {
            return Err(Failure::bug(format!("the engine speaks format {}", setup.format)));
        }
        Ok(Self {
            bucket: s3::Bucket::open(&setup.location, &setup.settings).await?,
            store: store::Store::open(&setup.store)?,
            write: setup.write,
            trusted: Trusted::parse(&setup.trusted)?,
            secret: if setup.write { Secret::find()? } else { None },
            lease_time: Duration::from_secs_f64(setup.lease_seconds),
            memory: Arc::new(Semaphore::new(IN_MEMORY)),
            buffers: Mutex::default(),
            conditional: OnceCell::new(),
            leases: Mutex::default(),
            run_out: Mutex::default(),
            broken: Mutex::default(),
            damaged: Mutex::default(),
        })
    }

    async fn answer(self: &Arc<Self>, request: Request, tell: &Tell) -> Result<Done, Failure> {
        match request {
            Request::Status => self.status(tell).await.map(Done::Status),
            Request::Pull { key } => self.pull(key, tell).await,
            Request::Lease { key, who } => self.lease(key, &who, tell).await,
            Request::Await { key } => self.wait(key, tell).await,
            Request::Push { key } => {
                let pushed = self.push(key, tell).await;
                self.release(key).await?;
                pushed
            }
            Request::Release { key } => self.release(key).await.map(|()| Done::Released),
            Request::Archive { sha256, file } => self.archive(&sha256, file.as_deref(), tell).await,
        }
    }

    async fn archive(
        &self,
        sha256: &str,
        file: Option<&Path>,
        tell: &Tell,
    ) -> Result<Done, Failure> {
        let name = layout::archive(sha256);
        if self.bucket.head(&name).await?.is_some() {
            return Ok(Done::Pushed { transferred: 0, shared: 0 });
        }
        let Some(file) = file else { return Ok(Done::Absent { why: None }) };
        let unreadable = |e| Failure::environment(format!("cannot read {}: {e}", file.display()));
        let size = file.metadata().map_err(unreadable)?.len();
        let sent = AtomicU64::new(0);
        let more = |bytes| tell.progress(sent.fetch_add(bytes, Ordering::Relaxed) + bytes, size);
        // Whoever writes this name writes the same bytes.
        self.bucket.put_file(&name, file, &s3::Put::default(), &more).await?;
        Ok(Done::Pushed { transferred: size, shared: 0 })
    }

    async fn status(&self, tell: &Tell) -> Result<Status, Failure> {
        let mut status = Status::default();
        for (start, count) in [
            (layout::RESULTS, &mut status.results),
            (layout::CHUNKS, &mut status.chunks),
            (layout::LEASES, &mut status.leases),
        ] {
            let add = |object: s3::Listed| {
                *count += 1;
                status.size += object.size;
            };
            self.bucket.list(start, add).await?;
        }
        if self.write {
            status.conditional = Some(self.holds_to_conditions(tell).await?);
        }
        status.signs_as = self.secret.as_ref().map(|secret| secret.name.clone());
        status.believed = self.secret.as_ref().is_some_and(|secret| secret.is_in(&self.trusted));
        Ok(status)
    }
}
