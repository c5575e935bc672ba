//! A cache that machines share: results and their files in S3, signed.
//!
//! This half is what the engine and the worker say to each other, and nothing heavy: the engine
//! writes a [`Setup`] and then [`Asked`] lines to the worker's standard input, and reads [`Answer`]
//! lines from its standard output. Requests run side by side; the engine tells their answers apart by
//! their numbers. When its standard input ends, the worker gives its leases back and ends too.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use step::{ActionKey, ActionResult, Failure};

/// The version of the protocol, and of what lies in the bucket: the first part of names there.
pub const FORMAT: u32 = 1;

/// The variables with the key that results are signed by, and with the path of a file that holds it.
pub const SIGNING_KEY: &str = "ANNEAL_SIGNING_KEY";
pub const SIGNING_KEY_FILE: &str = "ANNEAL_SIGNING_KEY_FILE";

/// The first line: which cache, for whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    pub format: u32,
    pub location: s3::Location,
    pub settings: s3::Settings,
    /// The local store.
    pub store: PathBuf,
    /// Whether results are given to the cache, or only taken from it.
    pub write: bool,
    /// Whose results are believed: `name:base64` of a public key.
    pub trusted: Vec<String>,
    /// For how long a lease holds that nobody renews.
    pub lease_seconds: f64,
}

/// A line of the engine's.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    pub id: u64,
    pub request: Request,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How much is there, and whether this process may write.
    Status,
    /// Fetch the result of an action with all its files.
    Pull { key: ActionKey },
    /// Before an action runs here: nobody else is to run it meanwhile.
    Lease { key: ActionKey, who: String },
    /// Wait until its result is there, or nobody runs it any more.
    Await { key: ActionKey },
    /// Give a result that lies in the local store, and its lease back if there is one.
    Push { key: ActionKey },
    /// Give a lease back: there will be no result.
    Release { key: ActionKey },
    /// Give the Nix archive of a pinned result, by its SHA-256: `nix build` takes it from there. Without
    /// a file, only tell whether it is there.
    Archive { sha256: String, file: Option<PathBuf> },
}

/// A line of the worker's.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub id: u64,
    pub said: Said,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// Bytes so far, and in all: more lines follow.
    Progress { done: u64, total: u64 },
    /// What a person should know: more lines follow.
    Note(String),
    /// The last line of this number.
    Done(Done),
    /// The last line of this number.
    Failed(Failure),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Done {
    Status(Status),
    /// Its files are in the local store; the result is not recorded there yet.
    Pulled {
        result: Box<ActionResult>,
        transferred: u64,
    },
    /// There is none that can be used; why, if there is one.
    Absent {
        why: Option<String>,
    },
    /// Ours to run.
    Leased,
    /// Theirs.
    Held {
        holder: String,
    },
    /// Nobody's any more: ask for the lease again.
    Free,
    Pushed {
        transferred: u64,
        shared: u64,
    },
    Released,
}

/// What there is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    pub results: u64,
    pub chunks: u64,
    pub leases: u64,
    /// Bytes.
    pub size: u64,
    /// Whether the store holds to conditions; unknown unless this process may write.
    pub conditional: Option<bool>,
    /// By which key this process signs, if it has one, and whether the workspace believes it.
    pub signs_as: Option<String>,
    pub believed: bool,
}
