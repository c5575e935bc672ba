//! Pins what lies outside: asks each locked source what its revision means today, and writes the
//! answer beside the recipe.

use std::collections::BTreeMap;

use recipe::Lock;
use serde_json::Value;
use step::Failure;
use step::worker::Mode;

use crate::process::{self, Said};
use crate::resolve::Graph;
use crate::target::TargetId;
use crate::{Engine, Error, Event};

/// A target's pin before and after.
#[derive(Debug)]
pub struct Locked {
    pub id: TargetId,
    pub before: Option<Value>,
    pub after: Value,
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
            let path = self.root().join("recipes").join(&target.recipe).with_extension("lock");
            let mut lock = Lock::load(&path)?;
            lock.set(&target.target, &params, &after);
            lock.save(&path)?;
            all.push(Locked { id: target.clone(), before, after });
        }
        Ok(all)
    }
}
