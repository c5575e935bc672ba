//! What the engine tells while it works. Whoever prints decides how it looks.

use std::time::Duration;

use step::worker::Progress;
use step::{ActionKey, ActionResult, TreeDigest};

use crate::plan::Stale;
use crate::target::TargetId;

#[derive(Debug)]
pub enum Event<'a> {
    /// A tool is fetched on first need.
    Tool {
        tool: &'a str,
        text: &'a str,
    },
    /// A worker is being compiled; `line` is what cargo says.
    Compiling {
        family: &'a str,
        line: &'a str,
    },
    /// A worker is ready.
    Compiled {
        family: &'a str,
        wall: Duration,
    },
    /// The target's result was in the store.
    Cached {
        target: &'a TargetId,
        key: ActionKey,
        output: TreeDigest,
    },
    /// Somebody else runs the same action; we wait for them.
    Waiting {
        target: &'a TargetId,
        holder: &'a store::Holder,
    },
    /// Another machine runs the same action; we wait for it.
    Held {
        target: &'a TargetId,
        holder: &'a str,
    },
    /// The target's result was in the shared cache, from which so many bytes came.
    Fetched {
        target: &'a TargetId,
        key: ActionKey,
        output: TreeDigest,
        transferred: u64,
    },
    /// The target's result went into the shared cache: so many bytes, and so many were there.
    Shared {
        target: &'a TargetId,
        key: ActionKey,
        transferred: u64,
        shared: u64,
    },
    /// Something failed that the build can do without.
    Warning {
        failure: &'a step::Failure,
    },
    Started {
        target: &'a TargetId,
        key: ActionKey,
        reason: &'a Stale,
    },
    Progress {
        target: &'a TargetId,
        progress: &'a Progress,
    },
    /// A line for people, from the worker.
    Note {
        target: &'a TargetId,
        text: &'a str,
    },
    Finished {
        target: &'a TargetId,
        result: &'a ActionResult,
        size: u64,
    },
    Failed {
        target: &'a TargetId,
        failure: &'a step::Failure,
    },
}
