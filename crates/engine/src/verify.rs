//! Holds the store to its digests, and steps to what they promise of a rebuild.

use std::collections::BTreeMap;

use step::{Rebuild, TreeDigest};

use crate::build::Slot;
use crate::plan::Status;
use crate::resolve::Graph;
use crate::target::TargetId;
use crate::{Engine, Error, Event};

/// How a rebuilt target compares with the one in the store.
#[derive(Debug)]
pub struct Rebuilt {
    pub id: TargetId,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    Identical,
    /// Not the same bytes, but every metric within the step's tolerance.
    WithinTolerance,
    /// The files that differ, or the metrics that are too far apart.
    Differs(Vec<String>),
    /// It needs the network: its files are checked against its lock, not made again.
    Skipped,
}

impl Engine {
    /// Runs the steps that `graph` was asked for again, from their recorded inputs, and compares.
    /// Records nothing.
    pub fn rebuild(&self, graph: &Graph, on: &mut dyn FnMut(Event)) -> Result<Vec<Rebuilt>, Error> {
        let plan = self.plan(graph)?;
        let mut outputs: BTreeMap<TargetId, TreeDigest> = BTreeMap::new();
        let mut all = Vec::new();
        for (node, planned) in graph.nodes.iter().zip(&plan.targets) {
            let Status::Cached(old) = &planned.status else {
                return Err(step::Failure::input(format!("{} is not built", node.id))
                    .hint(format!("run `cargo xtask build {}` first", node.id))
                    .into());
            };
            outputs.insert(node.id.clone(), old.output);
            if !graph.wanted.contains(&node.id) {
                continue;
            }
            let verdict = if node.def.network {
                Verdict::Skipped
            } else {
                let ready = self.ready(node, &outputs)?;
                let worker = self.worker(node, on)?;
                on(Event::Started {
                    target: &node.id,
                    key: ready.key,
                    reason: &crate::Stale::Asked,
                });
                // A checkpoint of an earlier rebuild would spare it the work.
                self.store().clear_scratch(ready.key)?;
                let new = self.run(node, &ready, &worker, &Slot::alone(), &outputs, on)?;
                self.store().clear_scratch(ready.key)?;
                let size = self.store().tree(new.output)?.size();
                on(Event::Finished { target: &node.id, result: &new, size });
                self.compare(node.def.rebuild, old, &new)?
            };
            all.push(Rebuilt { id: node.id.clone(), verdict });
        }
        Ok(all)
    }

    fn compare(
        &self,
        promise: Rebuild,
        old: &step::ActionResult,
        new: &step::ActionResult,
    ) -> Result<Verdict, Error> {
        if old.output == new.output {
            return Ok(Verdict::Identical);
        }
        match promise {
            Rebuild::BitForBit => {
                let (old, new) = (self.store().tree(old.output)?, self.store().tree(new.output)?);
                let differing = old
                    .entries()
                    .iter()
                    .filter(|e| !new.entries().contains(e))
                    .chain(
                        new.entries()
                            .iter()
                            .filter(|e| !old.entries().iter().any(|o| o.path == e.path)),
                    )
                    .map(|e| e.path.clone());
                Ok(Verdict::Differs(differing.collect()))
            }
            Rebuild::WithinTolerance(tolerance) => {
                let far = old.metrics.iter().filter(|(name, a)| {
                    let b = new.metrics.get(*name).copied().unwrap_or(f64::NAN);
                    let within = (*a - b).abs() <= tolerance * a.abs().max(b.abs());
                    !within
                });
                let far: Vec<String> = far.map(|(name, _)| name.clone()).collect();
                Ok(if far.is_empty() { Verdict::WithinTolerance } else { Verdict::Differs(far) })
            }
        }
    }
}
