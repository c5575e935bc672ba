//! Plan, keys, execution, provenance, why: from resolved recipes to artifacts in the store.
//!
//! Prints nothing and reads no command line: it emits [`Event`]s. Knows no step by name: a
//! [`Registry`] is handed to it.

mod act;
mod alone;
mod build;
mod capacity;
pub mod code;
mod compiled;
mod event;
mod execute;
mod fresh;
pub mod gc;
pub mod graph;
mod links;
pub mod lock;
pub mod nar;
pub mod plan;
mod process;
pub mod remote;
pub mod resolve;
pub mod sandbox;
mod schedule;
mod stamp;
mod target;
pub mod tools;
pub mod verify;
pub mod vouch;
pub mod why;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use step::{Action, ActionKey, ActionResult, Failure};
use store::Store;

pub use act::Errand;
pub use alone::Given;
pub use build::{Built, Options, Outcome};
pub use event::Event;
pub use fresh::Remembered;
pub use plan::{Blocked, Plan, Planned, Stale, Status};
pub use process::Running;
pub use remote::Remote;
pub use resolve::{DEFAULT_RECIPE, Graph, Input, Node, Origin, Registry, Resolver};
pub use target::TargetId;

/// What stops the engine: a mistake at a place in a recipe, or any other failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Recipe(Box<recipe::Diagnostic>),
    #[error("{0}")]
    Failure(#[from] Failure),
}

impl Error {
    /// The same, with a recipe's path as people see it from `root`.
    fn relative_to(self, root: &Path) -> Self {
        match self {
            Error::Recipe(diagnostic) => Error::Recipe(Box::new(diagnostic.relative_to(root))),
            other => other,
        }
    }
}

impl From<recipe::Diagnostic> for Error {
    fn from(diagnostic: recipe::Diagnostic) -> Self {
        Error::Recipe(Box::new(diagnostic))
    }
}

impl From<store::StoreError> for Error {
    fn from(error: store::StoreError) -> Self {
        Error::Failure(error.into())
    }
}

/// Where a workspace's store lies: the format is part of the path.
pub fn store_path(root: &Path) -> PathBuf {
    root.join("artifacts").join(format!("v{}", store::FORMAT))
}

/// Where workers come from.
#[derive(Debug, Clone)]
pub enum Workers {
    /// Compiled from the workspace's own sources, by cargo.
    Cargo,
    /// One program for every family: tests bring their own.
    Fixed(PathBuf),
}

/// One workspace and its store. Shared between the threads of a build.
pub struct Engine {
    root: PathBuf,
    store: Store,
    registry: Registry,
    opened: SystemTime,
    /// Read when the first key is made.
    code: Mutex<Option<code::CodeBase>>,
    workers: Workers,
    /// Whether steps are held to what they may touch.
    confined: bool,
    /// Family → its worker, once compiled.
    compiled: Mutex<BTreeMap<String, PathBuf>>,
    /// The workspace's commit, and whether it was changed since; asked for once.
    commit: OnceLock<(Option<String>, bool)>,
    /// Program → its digest.
    programs: Mutex<BTreeMap<String, String>>,
    remembered: Mutex<Option<fresh::Fresh>>,
    running: Arc<Running>,
    remote: Mutex<remote::State>,
}

impl Engine {
    /// Opens the workspace at `root`, whose store is `artifacts/v1`.
    pub fn open(root: &Path, registry: Registry) -> Result<Self, Error> {
        Ok(Self {
            root: root.to_path_buf(),
            opened: SystemTime::now(),
            store: Store::open(&store_path(root))?,
            registry,
            code: Mutex::new(None),
            workers: Workers::Cargo,
            confined: true,
            compiled: Mutex::default(),
            commit: OnceLock::new(),
            programs: Mutex::default(),
            remembered: Mutex::default(),
            running: Arc::default(),
            remote: Mutex::default(),
        })
    }

    pub fn with_workers(self, workers: Workers) -> Self {
        Self { workers, ..self }
    }

    /// Lets steps touch anything.
    pub fn unconfined(self) -> Self {
        Self { confined: false, ..self }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn registry(&self) -> Registry {
        self.registry
    }

    /// The workers of this engine that run now: how another thread ends them.
    pub fn running(&self) -> Arc<Running> {
        Arc::clone(&self.running)
    }

    pub fn resolver(&self) -> Resolver<'_> {
        Resolver::new(&self.root, self.registry)
    }

    /// The result that a target's name stands for now: what was built last.
    pub fn last(&self, id: &TargetId) -> Option<ActionResult> {
        let text = std::fs::read(self.pointer(id)).ok()?;
        let key: ActionKey = serde_json::from_slice(&text).ok()?;
        self.result(key)
    }

    /// The result of an action, if it is usable.
    pub fn result(&self, key: ActionKey) -> Option<ActionResult> {
        self.store.actions().lookup(key).ok()?.found()
    }

    /// The action behind a result.
    pub fn action(&self, key: ActionKey) -> Option<Action> {
        self.store.action(key).ok()
    }

    /// Where a target's artifact is linked for people.
    pub fn link(&self, id: &TargetId) -> PathBuf {
        self.root.join("artifacts").join(&id.recipe).join(&id.target)
    }

    /// The results that a target's name has stood for and that are still usable, oldest first.
    pub fn history(&self, id: &TargetId) -> Vec<ActionResult> {
        let text = std::fs::read_to_string(self.history_path(id)).unwrap_or_default();
        let keys = text.lines().filter_map(|line| line.parse().ok());
        keys.filter_map(|key| self.result(key)).collect()
    }

    /// Keeps that a name stands for another action now. Losing it costs a comparison, no result.
    fn note_in_history(&self, id: &TargetId, key: ActionKey) {
        let path = self.history_path(id);
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(format!("{key}\n").as_bytes()));
    }

    fn history_path(&self, id: &TargetId) -> PathBuf {
        self.pointer(id).with_extension("history")
    }

    /// The file that keeps which action a target's name stood for last.
    fn pointer(&self, id: &TargetId) -> PathBuf {
        self.store.root().join("targets").join(&id.recipe).join(format!("{}.json", id.target))
    }
}

/// `[workspace.metadata.anneal]` of the workspace's manifest; empty where there is none.
fn metadata(root: &Path) -> toml::Table {
    let text = std::fs::read_to_string(root.join("Cargo.toml")).unwrap_or_default();
    let manifest: toml::Table = text.parse().unwrap_or_default();
    let table = (|| manifest.get("workspace")?.get("metadata")?.get("anneal")?.as_table())();
    table.cloned().unwrap_or_default()
}

/// What a lock holds, though another thread may have panicked with it: nothing that is kept behind
/// one here is ever half changed.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names the act and the path of an I/O error; a full disk has its hint.
fn cannot(act: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| {
        let error = anyhow::Error::new(e).context(format!("cannot {act} {}", path.display()));
        Failure::from_anyhow(&error)
    }
}
