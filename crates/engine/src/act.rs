//! Has a worker do something outside: publish, look at what is live.
//!
//! Nothing of it is kept: no key, no result. The worker is not confined, since credentials come from
//! files and programs of the user's.

use std::collections::BTreeMap;

use serde_json::Value;
use step::worker::{self, Mode, Request};
use step::{Failure, action};

use crate::capacity::threads_here;
use crate::process::{self, Said};
use crate::resolve::Origin;
use crate::{Engine, Error, Event, Node, TargetId, cannot};

/// What is done, and with what.
#[derive(Debug)]
pub struct Errand<'a> {
    /// Under which name its progress is told.
    pub target: &'a TargetId,
    /// `publish/s3`
    pub step: &'a str,
    pub act: worker::Act,
    pub inputs: BTreeMap<String, Vec<worker::Input>>,
}

impl Engine {
    /// The inputs of a target, as they were built last.
    pub fn inputs_of(&self, node: &Node) -> Result<BTreeMap<String, Vec<worker::Input>>, Error> {
        let mut inputs: BTreeMap<String, Vec<worker::Input>> = BTreeMap::new();
        for input in &node.inputs {
            let tree = match &input.from {
                Origin::Target(id) => {
                    let last = self.last(id).ok_or_else(|| {
                        Failure::input(format!("{id} was not built yet"))
                            .hint(format!("cargo xtask build {id}"))
                    })?;
                    last.output
                }
                Origin::Path { path, .. } => self.store.ingest_copy(path)?.digest(),
            };
            inputs.entry(input.name.into()).or_default().push(worker::Input {
                label: input.label.clone(),
                kind: input.kind,
                path: self.materialise(tree)?,
                origin: input.label.clone(),
            });
        }
        Ok(inputs)
    }

    /// What its worker answers.
    pub fn act(&self, errand: Errand<'_>, on: &mut dyn FnMut(Event)) -> Result<Value, Error> {
        let Errand { target, step, act, inputs } = errand;
        let family = self.registry.families.iter().find(|f| step.split('/').next() == Some(f.name));
        let family = family.ok_or_else(|| Failure::bug(format!("no family has `{step}`")))?;
        let worker = self.worker_of(family, on)?;
        let attempt = self.store.attempt("act")?;
        let folder = |name: &str| attempt.path().join(name);
        let request = Request {
            format: action::FORMAT,
            step: step.into(),
            mode: Mode::Act,
            params: serde_json::to_value(act).expect("parameters serialise to JSON"),
            inputs,
            out: folder("out"),
            report: folder("report"),
            scratch: folder("scratch"),
            tools: BTreeMap::new(),
            threads: threads_here(),
        };
        for dir in [&request.out, &request.report, &request.scratch] {
            std::fs::create_dir_all(dir).map_err(cannot("create", dir))?;
        }
        process::run(
            &worker,
            &request,
            attempt.path(),
            &self.running,
            None,
            &mut |said| match said {
                Said::Progress(progress) => on(Event::Progress { target, progress }),
                Said::Note(text) => on(Event::Note { target, text }),
            },
        )?;
        let answer = std::fs::read(request.out.join("answer.json")).ok();
        let answer = answer.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(answer
            .ok_or_else(|| Failure::bug(format!("{step}: its worker wrote no answer.json")))?)
    }
}
