//! Pins what lies outside: asks each locked source what its revision means today, and writes the
//! answer beside the recipe. Pins results, too, that cannot be made anywhere again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use recipe::{Lock, PinnedResult};
use serde_json::{Value, json};
use step::worker::Mode;
use step::{BlobDigest, Failure, Known, Rebuild, canonical};

use crate::plan::Status;
use crate::process::{self, Said};
use crate::resolve::{Graph, Node, Origin};
use crate::target::TargetId;
use crate::{Engine, Error, Event, nar};

/// A target's pin before and after.
#[derive(Debug)]
pub struct Locked {
    pub id: TargetId,
    pub before: Option<Value>,
    pub after: Value,
}

/// A target's pinned result before and after.
#[derive(Debug)]
pub struct LockedResult {
    pub id: TargetId,
    pub before: Option<PinnedResult>,
    /// None if there is no result now that could be pinned.
    pub after: Option<PinnedResult>,
}

impl Engine {
    /// Pins every locked source of `graph`, in the lock files of the recipes that declare them.
    pub fn lock(&self, graph: &Graph, on: &mut dyn FnMut(Event)) -> Result<Vec<Locked>, Error> {
        let mut all = Vec::new();
        for node in graph.nodes.iter().filter(|n| n.def.locked) {
            let mut params = node.params.clone();
            let before = params.as_object_mut().and_then(|p| p.remove("lock"));
            let mut asking = self.ready(node, &BTreeMap::new())?;
            asking.action.params = params.clone();
            let worker = self.worker(node, on)?;
            let attempt = self.store().attempt("lock")?;
            let request =
                self.request(node, &asking, attempt.path(), &BTreeMap::new(), Mode::Lock, on)?;
            let target = &node.id;
            let rules = self.rules(node, &worker, &request, attempt.path())?;
            process::run(&worker, &request, attempt.path(), &self.running, rules, &mut |said| {
                match said {
                    Said::Progress(progress) => on(Event::Progress { target, progress }),
                    Said::Note(text) => on(Event::Note { target, text }),
                }
            })?;
            let answer = request.out.join("lock.json");
            let after: Value = std::fs::read(&answer)
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok())
                .ok_or_else(|| Failure::bug(format!("{target}: its worker wrote no lock.json")))?;
            let path = self.lock_path(target);
            let mut lock = Lock::load(&path)?;
            lock.set(&target.target, &params, &after);
            lock.save(&path)?;
            all.push(Locked { id: target.clone(), before, after });
        }
        Ok(all)
    }

    /// Pins the results of `graph` that another machine could not make again, byte for byte, in the
    /// time of a build: those of steps that use the network or an accelerator, or promise a
    /// tolerance only. What is stale is forgotten.
    pub fn lock_results(&self, graph: &Graph) -> Result<Vec<LockedResult>, Error> {
        let plan = self.plan(graph)?;
        let facts = self.facts(graph);
        let declared = self.declared(graph)?;
        let mut all = Vec::new();
        for (node, planned) in graph.nodes.iter().zip(&plan.targets) {
            let id = &node.id;
            let path = self.lock_path(id);
            let mut lock = Lock::load(&path)?;
            let before = lock.result(&id.target).cloned();
            let after = match &planned.status {
                Status::Cached(result) if is_pinned(node, &facts[id].0) => Some(PinnedResult {
                    action: result.key,
                    declared: declared[id],
                    tree: result.output,
                    sha256: match &before {
                        // The same tree is the same archive.
                        Some(before) if before.tree == result.output => before.sha256.clone(),
                        _ => nar::sha256(&self.materialise(result.output)?)?,
                    },
                }),
                _ => None,
            };
            if before.is_some() || after.is_some() {
                lock.set_result(&id.target, after.clone());
                lock.save(&path)?;
                all.push(LockedResult { id: id.clone(), before, after });
            }
        }
        Ok(all)
    }

    /// The pinned result of each target of `graph` that has one, and whether recipes and files still
    /// say what they did when it was made. Makes nothing.
    pub fn locked_results(
        &self,
        graph: &Graph,
    ) -> Result<Vec<(TargetId, PinnedResult, bool)>, Error> {
        let declared = self.declared(graph)?;
        let mut all = Vec::new();
        for node in &graph.nodes {
            let lock = Lock::load(&self.lock_path(&node.id))?;
            if let Some(result) = lock.result(&node.id.target) {
                let current = result.declared == declared[&node.id];
                all.push((node.id.clone(), result.clone(), current));
            }
        }
        Ok(all)
    }

    /// A digest of what recipes and files say of each target and of all that it is made of. Knows
    /// neither code nor machines, so that it can be had where nothing was made.
    fn declared(&self, graph: &Graph) -> Result<BTreeMap<TargetId, BlobDigest>, Error> {
        let mut all: BTreeMap<TargetId, BlobDigest> = BTreeMap::new();
        for node in &graph.nodes {
            let mut inputs = BTreeMap::new();
            for input in &node.inputs {
                let digest = match &input.from {
                    Origin::Target(id) => all[id].to_string(),
                    Origin::Path { path, .. } => self.store().hash_path(path)?.digest().to_string(),
                };
                inputs.insert(input.field.as_str(), digest);
            }
            let says = json!({"step": node.def.name, "params": node.params, "inputs": inputs});
            all.insert(node.id.clone(), BlobDigest::of(&canonical::to_vec(&says)));
        }
        Ok(all)
    }

    fn lock_path(&self, id: &TargetId) -> PathBuf {
        self.root().join("recipes").join(format!("{}.lock", id.recipe))
    }
}

fn is_pinned(node: &Node, known: &Known) -> bool {
    node.def.network
        || node.def.rebuild != Rebuild::BitForBit
        || (node.def.needs)(&node.params, known).accelerator
}
