//! The results of actions, under their keys. A result is written once: the first one wins.
//!
//! Knows nothing of how a key comes about. A result whose files are lost counts as absent.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use step::{ActionKey, ActionResult, BlobDigest, canonical};
use tempfile::NamedTempFile;

use crate::error::io;
use crate::{Result, Store, StoreError};

/// The part of a store that remembers results.
#[derive(Debug, Clone, Copy)]
pub struct ActionCache<'a> {
    store: &'a Store,
}

/// What the store knows of an action.
#[derive(Debug, Clone, PartialEq)]
pub enum Lookup {
    Found(Box<ActionResult>),
    Never,
    /// It was built, but cannot be used any more; the text says what is wrong.
    Lost(String),
}

impl Lookup {
    pub fn found(self) -> Option<ActionResult> {
        match self {
            Lookup::Found(result) => Some(*result),
            Lookup::Never | Lookup::Lost(_) => None,
        }
    }
}

impl<'a> ActionCache<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store }
    }

    /// The action's result, if every file of its output is there in full size. (Not hashed: that
    /// is what [`Store::materialise`] and [`Store::scrub`] are for.)
    pub fn lookup(&self, key: ActionKey) -> Result<Lookup> {
        let path = self.path(key);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Lookup::Never),
            Err(e) => return Err(io("read", &path)(e)),
        };
        Ok(match self.parse(key, &bytes) {
            Ok(result) => Lookup::Found(Box::new(result)),
            Err(why) => Lookup::Lost(why),
        })
    }

    /// Keeps `result` unless its action has a usable one already; returns the one that is kept.
    pub fn record(&self, result: &ActionResult) -> Result<ActionResult> {
        let path = self.path(result.key);
        let parent = path.parent().expect("a file of the store has a folder");
        fs::create_dir_all(parent).map_err(io("create", parent))?;
        let tmp = self.store.root().join("tmp");
        let mut file = NamedTempFile::new_in(&tmp).map_err(io("write", &tmp))?;
        file.write_all(&canonical::to_vec(result)).map_err(io("write", file.path()))?;
        self.store.goes_in(file.as_file(), file.path())?;
        let file = match file.persist_noclobber(&path) {
            Ok(_) => return Ok(result.clone()),
            Err(e) if e.error.kind() == ErrorKind::AlreadyExists => e.file,
            Err(e) => return Err(io("write", &path)(e.error)),
        };
        if let Lookup::Found(first) = self.lookup(result.key)? {
            return Ok(*first);
        }
        // The first result has lost its files: only then does a later one take its place.
        file.persist(&path).map_err(|e| io("write", &path)(e.error))?;
        Ok(result.clone())
    }

    /// When the result was written.
    pub fn recorded(&self, key: ActionKey) -> Option<SystemTime> {
        fs::metadata(self.path(key)).and_then(|m| m.modified()).ok()
    }

    /// Takes a result away; its files stay until gc.
    pub fn forget(&self, key: ActionKey) -> Result<()> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Every usable result, by key.
    pub fn all(&self) -> Result<Vec<ActionResult>> {
        let mut results = Vec::new();
        for key in self.keys()? {
            results.extend(self.lookup(key)?.found());
        }
        Ok(results)
    }

    /// The keys of all results, usable or not, sorted.
    pub(crate) fn keys(&self) -> Result<Vec<ActionKey>> {
        let mut keys = Vec::new();
        let actions = self.store.root().join("actions");
        for folder in fs::read_dir(&actions).map_err(io("read", &actions))?.flatten() {
            let folder = folder.path();
            for file in fs::read_dir(&folder).map_err(io("read", &folder))?.flatten() {
                let name = file.file_name();
                let hex = name.to_str().and_then(|n| n.strip_suffix(".json"));
                keys.extend(hex.and_then(|hex| hex.parse::<ActionKey>().ok()));
            }
        }
        keys.sort();
        Ok(keys)
    }

    pub(crate) fn path(&self, key: ActionKey) -> PathBuf {
        let hex = key.to_string();
        self.store.root().join("actions").join(&hex[..2]).join(format!("{hex}.json"))
    }

    /// The result as it was written, whether or not its files are still there.
    pub(crate) fn written(&self, key: ActionKey) -> Option<ActionResult> {
        let bytes = fs::read(self.path(key)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn parse(&self, key: ActionKey, bytes: &[u8]) -> Result<ActionResult, String> {
        let result: ActionResult =
            serde_json::from_slice(bytes).map_err(|e| format!("its result cannot be read: {e}"))?;
        if result.key != key {
            return Err(format!("its result is that of another action, {}", result.key.short()));
        }
        let tree = self.store.tree(result.output).map_err(|e| match e {
            StoreError::Missing { .. } => "the list of its files is lost".to_string(),
            other => other.to_string(),
        })?;
        match self.store.first_missing(&tree) {
            Some(entry) if self.store.has(entry.digest) => {
                Err(format!("{} no longer has its size of {} bytes", entry.path, entry.size))
            }
            Some(entry) => Err(format!("{} is lost", entry.path)),
            None => Ok(result),
        }
    }
}

impl Store {
    /// Keeps the canonical bytes of an action: they are what its key is the digest of.
    pub fn put_action(&self, action: &step::Action) -> Result<ActionKey> {
        let digest = self.put_bytes(&action.to_canonical())?;
        Ok(ActionKey::from_bytes(*digest.as_bytes()))
    }

    /// The action behind a key, if its bytes were kept.
    pub fn action(&self, key: ActionKey) -> Result<step::Action> {
        let digest = BlobDigest::from_bytes(*key.as_bytes());
        serde_json::from_slice(&self.blob(digest)?).map_err(|e| StoreError::Malformed {
            path: self.blob_path(digest),
            message: format!("no action: {e}"),
        })
    }
}
