//! What would run, and why: the status of each target, without running anything.

use std::collections::BTreeMap;

use serde::Serialize;
use step::{Action, ActionKey, ActionResult, Memory, Tree, TreeDigest, Unsupported};

use crate::target::TargetId;
use crate::why::Difference;

/// The status of each target of a graph, inputs before what uses them.
#[derive(Debug)]
pub struct Plan {
    pub targets: Vec<Planned>,
}

#[derive(Debug)]
pub struct Planned {
    pub id: TargetId,
    pub step: &'static str,
    pub status: Status,
    /// What was built last under this name: what it cost then is the estimate for now.
    pub last: Option<ActionResult>,
    /// What it needs by its own numbers, where it says so.
    pub memory: Option<Memory>,
}

#[derive(Debug)]
pub enum Status {
    /// The result is in the store.
    Cached(Box<ActionResult>),
    Stale(Stale),
    Blocked(Blocked),
}

/// Why a target has to run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "reason", content = "detail")]
pub enum Stale {
    /// Nothing was ever built under this name.
    NeverBuilt,
    /// The action is not the one that was built last.
    Changed(Vec<Difference>),
    /// It was built, but the store has lost a file of it.
    Lost(String),
    /// These inputs run first; if they give the same bytes, this target stays as it is.
    Waits(Vec<TargetId>),
    /// Somebody asked for it.
    Asked,
}

impl std::fmt::Display for Stale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stale::NeverBuilt => f.write_str("never built"),
            Stale::Changed(differences) => match differences.as_slice() {
                [] => f.write_str("changed"),
                [one] => write!(f, "{one}"),
                [first, rest @ ..] => write!(f, "{first} (and {} more)", rest.len()),
            },
            Stale::Lost(what) => write!(f, "{what}"),
            Stale::Waits(on) => {
                let names: Vec<_> = on.iter().map(|id| id.target.as_str()).collect();
                write!(f, "after {}", names.join(", "))
            }
            Stale::Asked => f.write_str("asked for"),
        }
    }
}

/// Why a target cannot run.
#[derive(Debug, Clone, PartialEq)]
pub enum Blocked {
    /// This version cannot build what the recipe declares.
    Unsupported(Unsupported),
    /// An outside source without its pin.
    NotLocked(TargetId),
    /// An input that is blocked itself.
    On(TargetId),
}

impl std::fmt::Display for Blocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Blocked::Unsupported(what) => write!(f, "{what}"),
            Blocked::NotLocked(id) => {
                write!(f, "not pinned yet: run `cargo xtask lock {}`", id.recipe)
            }
            Blocked::On(id) => write!(f, "needs {id}, which is blocked"),
        }
    }
}

/// An action with what is needed to run it.
#[derive(Debug, Clone)]
pub struct Ready {
    pub action: Action,
    pub key: ActionKey,
    /// Tree of each input, by its name in the action.
    pub inputs: BTreeMap<String, TreeDigest>,
    /// Those that lie outside the store.
    pub files: BTreeMap<String, Tree>,
}

impl Plan {
    pub fn up_to_date(&self) -> bool {
        self.targets.iter().all(|t| matches!(t.status, Status::Cached(_)))
    }

    pub fn get(&self, id: &TargetId) -> Option<&Planned> {
        self.targets.iter().find(|t| t.id == *id)
    }
}
