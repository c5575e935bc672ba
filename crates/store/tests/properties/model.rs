//! What a store must be like after any history, and what histories are made of.
//!
//! Knows nothing of disks: a blob is its digest and the bytes that lie there.

use std::collections::{BTreeMap, BTreeSet};

use step::{
    Action, ActionKey, ActionResult, BlobDigest, CodeDigest, Entry, Kind, Provenance, Tree,
    TreeDigest, canonical,
};
use store::{LostFile, Root, StoreError};

use crate::bytes;

/// Of which all files of a history are made.
pub const SIZES: [usize; 7] = [0, 1, 7, 1023, 1025, 5000, 70_000];
pub const NAMES: [&str; 4] = ["a", "b c/d", "b c/ü", "z"];
pub const KEYS: u8 = 4;

pub fn content(which: u8) -> Vec<u8> {
    bytes(which, SIZES[usize::from(which)])
}

/// Name → content, each by its place in the lists above.
pub type Files = BTreeMap<u8, u8>;

pub fn tree(files: &Files) -> Tree {
    let entry = |(name, which): (&u8, &u8)| {
        let bytes = content(*which);
        let path = NAMES[usize::from(*name)].into();
        Entry { path, digest: BlobDigest::of(&bytes), size: bytes.len() as u64 }
    };
    Tree::new(files.iter().map(entry).collect()).unwrap()
}

pub fn input(of: u8) -> Files {
    [(0, of)].into()
}

pub fn blob_of(tree: TreeDigest) -> BlobDigest {
    BlobDigest::from_bytes(*tree.as_bytes())
}

pub fn action(which: u8) -> Action {
    Action {
        format: 1,
        step: format!("test/{which}"),
        params: serde_json::json!({}),
        inputs: [("text".to_string(), tree(&input(which)).digest())].into(),
        code: CodeDigest::of(&content(SIZES.len() as u8 - 1 - which)),
        tools: BTreeMap::new(),
        platform: None,
    }
}

pub fn result(key: u8, output: &Files, report: &Files, log: u8, started: u64) -> ActionResult {
    ActionResult {
        format: 1,
        key: action(key).key(),
        step: action(key).step,
        kind: Kind::Files,
        output: tree(output).digest(),
        report: tree(report).digest(),
        log: BlobDigest::of(&content(log)),
        metrics: BTreeMap::new(),
        provenance: Provenance {
            started,
            wall_seconds: 0.0,
            cpu_seconds: 0.0,
            peak_memory: 0,
            host: "test".into(),
            device: "cpu".into(),
            versions: BTreeMap::new(),
            git_commit: None,
            git_dirty: false,
            vouched_from: None,
        },
    }
}

/// What a store must be like.
#[derive(Debug, Default)]
pub struct Model {
    /// The bytes that lie under each digest, sound or not.
    pub blobs: BTreeMap<BlobDigest, Vec<u8>>,
    pub results: BTreeMap<ActionKey, ActionResult>,
}

/// How reading a blob ends.
#[derive(Debug, PartialEq)]
pub enum Read {
    Sound,
    Missing,
    Corrupt,
}

impl Read {
    pub fn of<T>(result: &store::Result<T>) -> Self {
        match result {
            Ok(_) => Read::Sound,
            Err(StoreError::Missing { .. }) => Read::Missing,
            Err(StoreError::Corrupt { .. }) => Read::Corrupt,
            Err(other) => panic!("{other}"),
        }
    }
}

impl Model {
    pub fn has_sized(&self, digest: BlobDigest, size: u64) -> bool {
        self.blobs.get(&digest).is_some_and(|bytes| bytes.len() as u64 == size)
    }

    /// What has its size is taken for sound until somebody reads it.
    pub fn put(&mut self, bytes: Vec<u8>) {
        let digest = BlobDigest::of(&bytes);
        if !self.has_sized(digest, bytes.len() as u64) {
            self.blobs.insert(digest, bytes);
        }
    }

    pub fn put_files(&mut self, files: &Files) {
        files.values().for_each(|which| self.put(content(*which)));
        self.put(canonical::to_vec(&tree(files)));
    }

    /// A damaged blob is gone once it is read.
    pub fn read(&mut self, digest: BlobDigest) -> Read {
        match self.blobs.get(&digest) {
            None => Read::Missing,
            Some(bytes) if BlobDigest::of(bytes) == digest => Read::Sound,
            Some(_) => {
                self.blobs.remove(&digest);
                Read::Corrupt
            }
        }
    }

    pub fn tree(&mut self, digest: TreeDigest) -> Option<Tree> {
        let sound = self.read(blob_of(digest)) == Read::Sound;
        sound.then(|| serde_json::from_slice(&self.blobs[&blob_of(digest)]).unwrap())
    }

    pub fn lookup(&mut self, key: ActionKey) -> Option<ActionResult> {
        let result = self.results.get(&key)?.clone();
        let tree = self.tree(result.output)?;
        tree.entries().iter().all(|e| self.has_sized(e.digest, e.size)).then_some(result)
    }

    pub fn record(&mut self, result: ActionResult) -> ActionResult {
        self.lookup(result.key).unwrap_or_else(|| {
            self.results.insert(result.key, result.clone());
            result
        })
    }

    /// The error's path in the tree, and what it says.
    pub fn materialise(&mut self, tree: &Tree, verify: bool) -> Result<(), (String, Read)> {
        for entry in tree.entries() {
            let read = match verify {
                true => self.read(entry.digest),
                false if self.blobs.contains_key(&entry.digest) => Read::Sound,
                false => Read::Missing,
            };
            if read != Read::Sound {
                return Err((entry.path.clone(), read));
            }
        }
        Ok(())
    }

    pub fn gc(&mut self, roots: &[Root], young: bool, dry_run: bool) -> [usize; 4] {
        let mut marked = BTreeSet::new();
        let mut trees: Vec<TreeDigest> = Vec::new();
        let mut results = BTreeMap::new();
        for root in roots {
            if let Root::Tree(tree) = root {
                trees.push(*tree);
            }
        }
        for key in self.results.keys().copied().collect::<Vec<_>>() {
            if let Some(result) = self.lookup(key)
                && (young || roots.contains(&Root::Action(key)))
            {
                trees.extend([result.output, result.report]);
                let action_blob = BlobDigest::from_bytes(*key.as_bytes());
                marked.extend([result.log, action_blob]);
                if self.read(action_blob) == Read::Sound {
                    let action: Action = serde_json::from_slice(&self.blobs[&action_blob]).unwrap();
                    marked.insert(BlobDigest::from_bytes(*action.code.as_bytes()));
                    marked.extend(action.inputs.values().map(|tree| blob_of(*tree)));
                }
                results.insert(key, result);
            }
        }
        for digest in trees {
            marked.insert(blob_of(digest));
            let files = self.tree(digest);
            marked.extend(files.iter().flat_map(|t| t.entries().iter().map(|e| e.digest)));
        }
        let kept = self.blobs.keys().filter(|digest| marked.contains(digest)).count();
        let told =
            [results.len(), self.results.len() - results.len(), kept, self.blobs.len() - kept];
        if !dry_run {
            self.results = results;
            self.blobs.retain(|digest, _| marked.contains(digest));
        }
        told
    }

    /// Takes the damaged blobs away; says which, and what results lack.
    pub fn scrub(&mut self) -> (Vec<BlobDigest>, Vec<LostFile>) {
        let all: Vec<BlobDigest> = self.blobs.keys().copied().collect();
        let corrupt = all.into_iter().filter(|d| self.read(*d) == Read::Corrupt).collect();
        let mut lost = Vec::new();
        for (key, result) in self.results.clone() {
            let mut add = |part, path: &str, digest| {
                let step = result.step.clone();
                lost.push(LostFile { key, step, part, path: path.into(), digest });
            };
            for (part, digest) in [("output", result.output), ("report", result.report)] {
                match self.tree(digest) {
                    None => add(part, "", blob_of(digest)),
                    Some(tree) => tree
                        .entries()
                        .iter()
                        .filter(|e| !self.has_sized(e.digest, e.size))
                        .for_each(|e| add(part, &e.path, e.digest)),
                }
            }
            if !self.blobs.contains_key(&result.log) {
                add("log", "", result.log);
            }
        }
        (corrupt, lost)
    }
}
