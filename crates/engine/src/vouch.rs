//! "Same result": somebody's word that what changed cannot change what a step gives.
//!
//! The last result gets the new key too, and its provenance keeps where it came from.

use std::collections::BTreeMap;

use step::{ActionKey, Failure, Provenance, TreeDigest};

use crate::plan::{Stale, Status};
use crate::resolve::Graph;
use crate::target::TargetId;
use crate::why::Difference;
use crate::{Engine, Error};

/// A result that was taken over.
#[derive(Debug)]
pub struct Vouched {
    pub id: TargetId,
    /// The key that it was made under.
    pub from: ActionKey,
    pub key: ActionKey,
    /// What somebody said does not matter.
    pub differences: Vec<Difference>,
}

impl Engine {
    /// Takes over the last result of each stale target that was asked for. Differences in inputs or
    /// parameters are refused unless `anyway`: those are there to change results.
    pub fn vouch(&self, graph: &Graph, anyway: bool) -> Result<Vec<Vouched>, Error> {
        let mut outputs: BTreeMap<TargetId, TreeDigest> = BTreeMap::new();
        let mut all = Vec::new();
        // One at a time: what is vouched for is an input of the next.
        for node in &graph.nodes {
            let wanted = graph.wanted.contains(&node.id);
            let last = self.last(&node.id);
            let (ready, differences) = match self.status(node, &outputs, last.as_ref())? {
                (Status::Cached(result), _) => {
                    outputs.insert(node.id.clone(), result.output);
                    continue;
                }
                (Status::Stale(Stale::Changed(differences)), Some(ready)) if wanted => {
                    (ready, differences)
                }
                (Status::Stale(why), _) if wanted => {
                    return Err(Failure::input(format!(
                        "{} has no result to vouch for: {why}",
                        node.id
                    ))
                    .hint(format!("run `cargo xtask build {}`", node.id))
                    .into());
                }
                _ => continue,
            };
            let telling = |d: &&Difference| {
                ["inputs.", "params."].iter().any(|part| d.field.starts_with(part))
            };
            if let Some(difference) = differences.iter().find(telling).filter(|_| !anyway) {
                return Err(Failure::input(format!("{}: {difference}", node.id))
                    .hint("inputs and parameters are there to change results; say `--anyway` if this one does not")
                    .into());
            }
            let Some(last) = last else { continue };
            self.remember(&ready);
            let provenance = Provenance { vouched_from: Some(last.key), ..last.provenance.clone() };
            let from = last.key;
            let result = step::ActionResult { key: ready.key, provenance, ..last };
            let result = self.store().actions().record(&result)?;
            self.point(&node.id, &result)?;
            outputs.insert(node.id.clone(), result.output);
            all.push(Vouched { id: node.id.clone(), from, key: result.key, differences });
        }
        Ok(all)
    }

    /// Takes a vouched result away: the target stands for the one it was made as. `None` if
    /// nobody vouched for it.
    pub fn unvouch(&self, id: &TargetId) -> Result<Option<ActionKey>, Error> {
        let Some(last) = self.last(id) else { return Ok(None) };
        let Some(from) = last.provenance.vouched_from else { return Ok(None) };
        self.store().actions().forget(last.key)?;
        if let Some(made) = self.result(from) {
            self.point(id, &made)?;
        }
        Ok(Some(from))
    }
}
