//! What is done, exactly enough to be done again: the action, its key, its result.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::canonical;
use crate::digest::{ActionKey, BlobDigest, CodeDigest, TreeDigest};
use crate::kind::Kind;

/// The version of the action's encoding. It is part of every key.
pub const FORMAT: u32 = 1;

/// Everything that decides the result of a step, and nothing else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    pub format: u32,
    /// `merge/lora`.
    pub step: String,
    /// Parameters with presets resolved and defaults filled in.
    pub params: Value,
    /// Input name → tree. Where an input takes several artifacts, `models.merged`: the label is
    /// part of the key because it is part of the result.
    pub inputs: BTreeMap<String, TreeDigest>,
    pub code: CodeDigest,
    /// Tool name → version and hash of its pin.
    pub tools: BTreeMap<String, String>,
    /// As much of the platform as the step's policy asks for.
    pub platform: Option<String>,
}

impl Action {
    /// The bytes that are kept in the store, and whose digest is the key.
    pub fn to_canonical(&self) -> Vec<u8> {
        canonical::to_vec(self)
    }

    pub fn key(&self) -> ActionKey {
        ActionKey::of(&self.to_canonical())
    }
}

/// What an action gave. Written once: the first result wins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionResult {
    pub format: u32,
    pub key: ActionKey,
    pub step: String,
    pub kind: Kind,
    /// The artifact.
    pub output: TreeDigest,
    /// What people read beside it (loss curve, metrics over time, tables). Never an input.
    pub report: TreeDigest,
    /// What the worker printed.
    pub log: BlobDigest,
    /// Final figures, by name.
    pub metrics: BTreeMap<String, f64>,
    pub provenance: Provenance,
}

/// How a result came to be. Never part of a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Seconds since 1970, UTC.
    pub started: u64,
    pub wall_seconds: f64,
    pub cpu_seconds: f64,
    /// Bytes.
    pub peak_memory: u64,
    pub host: String,
    /// `cpu`, or the accelerator's name.
    pub device: String,
    /// Library → version, as the worker saw them.
    pub versions: BTreeMap<String, String>,
    pub git_commit: Option<String>,
    pub git_dirty: bool,
    /// Set when somebody said "same result" for another key.
    pub vouched_from: Option<ActionKey>,
}
