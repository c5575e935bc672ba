//! What would run, and why: the status of each target, without running anything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::MutexGuard;

use serde::Serialize;
use step::definition::TFLOP;
use step::{
    Action, ActionKey, ActionResult, CodeDigest, Facts, Failure, Known, Memory, Platform, Refusal,
    Tree, TreeDigest, action, canonical,
};

use crate::capacity::{self, TooLarge};
use crate::resolve::{Graph, Node, Origin};
use crate::target::TargetId;
use crate::why::{self, Difference};
use crate::{Engine, Error, code, execute, held, tools};

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
    /// What it would take now, by its own numbers and an earlier run's speed.
    pub seconds: Option<f64>,
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
    /// The step will not do what the recipe declares.
    Refused(Refusal),
    /// An outside source without its pin.
    NotLocked(TargetId),
    /// It takes more memory than there is.
    TooLarge(TooLarge),
    /// An input that is blocked itself.
    On(TargetId),
}

impl std::fmt::Display for Blocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Blocked::Refused(what) => write!(f, "{what}"),
            Blocked::NotLocked(id) => {
                write!(f, "not pinned yet: run `cargo xtask lock {}`", id.recipe)
            }
            Blocked::TooLarge(how) => write!(f, "{how}"),
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

impl Engine {
    /// The status of every target of `graph`. Runs nothing, writes nothing but caches.
    pub fn plan(&self, graph: &Graph) -> Result<Plan, Error> {
        let mut targets: Vec<Planned> = Vec::new();
        let mut outputs: BTreeMap<TargetId, TreeDigest> = BTreeMap::new();
        let facts = self.facts(graph);
        let mut stuck = BTreeSet::new();
        for node in &graph.nodes {
            let last = self.last(&node.id);
            let known = &facts[&node.id].0;
            let needs = (node.def.needs)(&node.params, known);
            let status = match self.blocked(node, &stuck, known) {
                Some(blocked) => Status::Blocked(blocked),
                None => match self.status(node, &outputs, last.as_ref())?.0 {
                    Status::Stale(stale) => match capacity::too_large(&needs) {
                        Some(how) => Status::Blocked(Blocked::TooLarge(how)),
                        None => Status::Stale(stale),
                    },
                    status => status,
                },
            };
            match &status {
                Status::Cached(result) => _ = outputs.insert(node.id.clone(), result.output),
                Status::Blocked(_) => _ = stuck.insert(&node.id),
                Status::Stale(_) => {}
            }
            let seconds = match (&status, needs.tflop) {
                (Status::Stale(_), Some(tflop)) => self.seconds(node, tflop, last.as_ref()),
                _ => None,
            };
            let (id, step, memory) = (node.id.clone(), node.def.name, needs.memory);
            targets.push(Planned { id, step, status, last, memory, seconds });
        }
        self.finish_caches();
        Ok(Plan { targets })
    }

    /// The status of one target, given the outputs of those before it that are made; its action,
    /// where that can be known.
    pub(crate) fn status(
        &self,
        node: &Node,
        outputs: &BTreeMap<TargetId, TreeDigest>,
        last: Option<&ActionResult>,
    ) -> Result<(Status, Option<Ready>), Error> {
        let waits: Vec<TargetId> =
            node.targets().filter(|id| !outputs.contains_key(id)).cloned().collect();
        if !waits.is_empty() {
            return Ok((Status::Stale(Stale::Waits(waits)), None));
        }
        let ready = self.ready(node, outputs)?;
        let status = match self.find(&ready)? {
            Ok(result) => Status::Cached(Box::new(result)),
            Err(lost) => Status::Stale(self.reason(&ready, last, lost)),
        };
        Ok((status, Some(ready)))
    }

    /// What is known of each target before it is built, or of models and datasets, from what was
    /// built last.
    pub(crate) fn facts(&self, graph: &Graph) -> BTreeMap<TargetId, (Known, Facts)> {
        graph.facts(&|id, path| {
            let tree = self.store.tree(self.last(id)?.output).ok()?;
            let file = tree.entries().iter().find(|entry| entry.path == path)?;
            serde_json::from_slice(&self.store.blob(file.digest).ok()?).ok()
        })
    }

    /// Seconds that so many floating-point operations take by what a run took: the target's last, else
    /// the latest of its family on this machine.
    fn seconds(&self, node: &Node, tflop: f64, last: Option<&ActionResult>) -> Option<f64> {
        let took = |result: &ActionResult| {
            let done = *result.metrics.get(TFLOP)?;
            (done > 0.0).then(|| result.provenance.wall_seconds * tflop / done)
        };
        if let Some(seconds) = last.and_then(took) {
            return Some(seconds);
        }
        let here = execute::host();
        let all = self.store.actions().all().ok()?.into_iter();
        let family = |step: &str| step.split('/').next() == Some(node.family.name);
        let like = all.filter(|result| family(&result.step) && result.provenance.host == here);
        let timed = like.filter_map(|result| Some((result.provenance.started, took(&result)?)));
        timed.max_by_key(|(started, _)| *started).map(|(_, seconds)| seconds)
    }

    /// The action of a node whose inputs are made, and its key.
    pub(crate) fn ready(
        &self,
        node: &Node,
        outputs: &BTreeMap<TargetId, TreeDigest>,
    ) -> Result<Ready, Error> {
        let mut inputs = BTreeMap::new();
        let mut files = BTreeMap::new();
        for input in &node.inputs {
            let digest = match &input.from {
                Origin::Target(id) => outputs[id],
                Origin::Path { path, .. } => {
                    let tree = self.store.hash_path(path)?;
                    let digest = tree.digest();
                    files.insert(input.field.clone(), tree);
                    digest
                }
            };
            inputs.insert(input.field.clone(), digest);
        }
        let code = self.family_code(node.family.name)?;
        let mut tools = BTreeMap::new();
        for tool in node.def.tools {
            tools.insert(tool.to_string(), tools::version_and_hash(tool, &self.root)?);
        }
        for name in (node.def.programs)(&node.params) {
            let digest = self.program(&name)?;
            tools.insert(format!("program {name}"), digest);
        }
        let action = Action {
            format: action::FORMAT,
            step: node.def.name.into(),
            params: node.params.clone(),
            inputs: inputs.clone(),
            code,
            tools,
            platform: platform(node.def.platform),
        };
        let key = action.key();
        Ok(Ready { action, key, inputs, files })
    }

    /// The digest of the program that `PATH` finds under this name. One that is missing fails when
    /// it is to run.
    fn program(&self, name: &str) -> Result<String, Error> {
        let mut known = held(&self.programs);
        if let Some(digest) = known.get(name) {
            return Ok(digest.clone());
        }
        let digest = match tools::on_path(name) {
            Some(path) => self.store.hash_path(&path)?.digest().to_string(),
            None => "not found".into(),
        };
        known.insert(name.into(), digest.clone());
        Ok(digest)
    }

    pub(crate) fn family_code(&self, family: &str) -> Result<CodeDigest, Failure> {
        if let Some(code) = self.code_remembered(family) {
            return Ok(code);
        }
        self.code()?.as_mut().expect("it was read").family(family)
    }

    /// The workspace's code, read the first time.
    fn code(&self) -> Result<MutexGuard<'_, Option<code::CodeBase>>, Failure> {
        let mut code = held(&self.code);
        if code.is_none() {
            let tokens = self.store.root().join("token-cache.json");
            *code = Some(code::CodeBase::open(&self.root, &tokens)?);
        }
        Ok(code)
    }

    /// The recorded result, or why there is none (`None`: there never was).
    pub(crate) fn find(
        &self,
        ready: &Ready,
    ) -> Result<Result<ActionResult, Option<String>>, Error> {
        Ok(match self.store.actions().lookup(ready.key)? {
            store::Lookup::Found(result) => Ok(*result),
            store::Lookup::Lost(reason) => Err(Some(reason)),
            store::Lookup::Never => Err(None),
        })
    }

    /// Why `ready` has no result, as against what was built last under its name.
    pub(crate) fn reason(
        &self,
        ready: &Ready,
        last: Option<&ActionResult>,
        lost: Option<String>,
    ) -> Stale {
        if let Some(lost) = lost {
            return Stale::Lost(lost);
        }
        self.remember(ready);
        match last.and_then(|last| self.action(last.key)) {
            Some(before) => Stale::Changed(why::differences(&self.store, &before, &ready.action)),
            None => Stale::NeverBuilt,
        }
    }

    /// Keeps what stands behind a key, so that `why` can compare it: the action, the trees of its
    /// files, the parts of its code. All of them lie under their own digests.
    pub(crate) fn remember(&self, ready: &Ready) {
        let code = held(&self.code);
        let parts = code.as_ref().and_then(|code| code.parts_of(ready.action.code));
        // Only explanations hang on these, so failing to write them stops nothing.
        let _ = self.store.put_action(&ready.action);
        for tree in ready.files.values() {
            let _ = self.store.put_bytes(&canonical::to_vec(tree));
        }
        if let Some(parts) = parts {
            let _ = self.store.put_bytes(&canonical::to_vec(parts));
        }
    }

    pub(crate) fn blocked(
        &self,
        node: &Node,
        stuck: &BTreeSet<&TargetId>,
        known: &Known,
    ) -> Option<Blocked> {
        if let Err(unsupported) = (node.def.supports)(&node.params, known) {
            return Some(Blocked::Refused(unsupported));
        }
        if node.unlocked {
            return Some(Blocked::NotLocked(node.id.clone()));
        }
        node.targets().find(|id| stuck.contains(id)).cloned().map(Blocked::On)
    }

    pub(crate) fn finish_caches(&self) {
        held(&self.code).iter().for_each(code::CodeBase::save);
        self.store.save_stat_cache();
    }
}

/// As much of this machine as `policy` asks for.
fn platform(policy: Platform) -> Option<String> {
    let arch = || format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    match policy {
        Platform::Any => None,
        Platform::Arch => Some(arch()),
        Platform::Exact => {
            Some(format!("{} {}", arch(), processor().as_deref().unwrap_or("unknown")))
        }
    }
}

/// The processor's model, where the system tells.
pub(crate) fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name"))?;
    Some(model.trim_start_matches([' ', '\t', ':']).to_string())
}
