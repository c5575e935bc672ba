//! What lies where in the bucket, and what a result says of its files.
//!
//! ```text
//! v1/chunks/ab/<64 hex>        at most 8 MiB, named by their BLAKE3: pieces of files, packs of small files
//! v1/results/ab/<key>.json     signed: an action's result, and from which chunks each of its files is made
//! v1/leases/<key>.json         who runs an action now
//! nar/<SHA-256>.nar            the artifact of a pinned result, as Nix reads it
//! ```
//!
//! Chunks go in before the result that names them. All but leases are written once.

use serde::{Deserialize, Serialize};
use step::{ActionKey, ActionResult, BlobDigest};

pub const CHUNKS: &str = "v1/chunks/";
pub const RESULTS: &str = "v1/results/";
pub const LEASES: &str = "v1/leases/";
pub const PROBES: &str = "v1/probes";

/// A result's list of files is larger than this by mistake only.
pub const RESULT_LIMIT: u64 = 256 << 20;

pub fn chunk(digest: BlobDigest) -> String {
    let hex = digest.to_string();
    format!("{CHUNKS}{}/{hex}", &hex[..2])
}

pub fn result(key: ActionKey) -> String {
    let hex = key.to_string();
    format!("{RESULTS}{}/{hex}.json", &hex[..2])
}

pub fn lease(key: ActionKey) -> String {
    format!("{LEASES}{key}.json")
}

/// Nix holds it to its hash: nobody signs it.
pub fn archive(sha256: &str) -> String {
    format!("nar/{sha256}.nar")
}

/// What is signed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    pub key: ActionKey,
    pub result: ActionResult,
    /// All that the result stands on: the action, the parts of its code, trees, files, the log.
    pub blobs: Vec<Blob>,
}

/// A file of the store, and how it is put together.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    pub digest: BlobDigest,
    /// Bytes.
    pub size: u64,
    /// In order.
    pub parts: Vec<Part>,
}

/// A part of a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    pub chunk: BlobDigest,
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Whether the chunk is this part and nothing else.
    pub whole: bool,
}
