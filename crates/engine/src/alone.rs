//! One step by itself, its inputs and tools handed over: for a build that keeps results of its own.
//!
//! Resolves and runs as [`Engine::build`] does. Makes no key, records nothing, confines nothing: that
//! is up to whoever calls.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use step::definition::KnownInput;
use step::worker::{self, Mode, Request};
use step::{Facts, Failure, Known, Tree, action};

use crate::capacity::threads_here;
use crate::execute::origin;
use crate::process::{self, Said};
use crate::resolve::{Node, Origin};
use crate::target::TargetId;
use crate::{Engine, Error, Event, tools};

/// What a step takes, and where it lies.
#[derive(Debug, Default)]
pub struct Given {
    pub inputs: BTreeMap<TargetId, PathBuf>,
    /// Tool → its folder, as [`tools::pinned`] lays it out.
    pub tools: BTreeMap<String, PathBuf>,
    pub worker: PathBuf,
}

impl Engine {
    /// Makes `id` and lays it out in `out`, which must not be there yet: the same files as a build
    /// would link.
    pub fn make_alone(
        &self,
        id: &TargetId,
        given: &Given,
        out: &Path,
        on: &mut dyn FnMut(Event),
    ) -> Result<Tree, Error> {
        let node = self.resolver().alone(id)?;
        let known = known(&node);
        if let Err(refusal) = (node.def.supports)(&node.params, &known) {
            return Err(Failure::input(format!("{id}: {refusal}")).into());
        }
        if node.unlocked {
            return Err(Failure::input(format!("{id} is not pinned yet"))
                .hint(format!("run `cargo xtask lock {}`", id.recipe))
                .into());
        }
        let attempt = self.store.attempt(&id.to_string())?;
        let request = Request {
            format: action::FORMAT,
            step: node.def.name.into(),
            mode: Mode::Build,
            params: node.params.clone(),
            inputs: self.handed_over(&node, given)?,
            out: attempt.folder("out")?,
            report: attempt.folder("report")?,
            scratch: attempt.folder("scratch")?,
            tools: roots(&node, given)?,
            threads: threads_here(),
        };
        let dir = attempt.path();
        process::run(&given.worker, &request, dir, &self.running, None, &mut |said| match said {
            Said::Progress(progress) => on(Event::Progress { target: id, progress }),
            Said::Note(text) => on(Event::Note { target: id, text }),
        })
        .map_err(|failure| Failure { message: format!("{id}: {}", failure.message), ..failure })?;
        let tree = self.store.ingest(&request.out)?;
        self.store.materialise(&tree, out, false)?;
        Ok(tree)
    }

    fn handed_over(
        &self,
        node: &Node,
        given: &Given,
    ) -> Result<BTreeMap<String, Vec<worker::Input>>, Error> {
        let mut inputs: BTreeMap<String, Vec<worker::Input>> = BTreeMap::new();
        for input in &node.inputs {
            let path = match &input.from {
                Origin::Target(id) => given.inputs.get(id).cloned().ok_or_else(|| {
                    Failure::input(format!("{}: its input {id} was not handed over", node.id))
                        .hint(format!("add `--input {id}=FOLDER`"))
                })?,
                Origin::Path { path, .. } => {
                    self.materialise(self.store.ingest_copy(path)?.digest())?
                }
            };
            inputs.entry(input.name.into()).or_default().push(worker::Input {
                label: input.label.clone(),
                kind: input.kind,
                path,
                origin: origin(node, input),
            });
        }
        Ok(inputs)
    }
}

/// All that is known of inputs that nobody has looked at: their kinds.
fn known(node: &Node) -> Known {
    let mut known = Known::new();
    for input in &node.inputs {
        known.entry(input.name.into()).or_default().push(KnownInput {
            label: input.label.clone(),
            kind: input.kind,
            facts: Facts::default(),
        });
    }
    known
}

fn roots(node: &Node, given: &Given) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let mut roots = BTreeMap::new();
    for name in node.def.tools {
        let place = given.tools.get(*name).ok_or_else(|| {
            Failure::input(format!("{}: its tool {name} was not handed over", node.id))
                .hint(format!("add `--tool {name}=FOLDER`"))
        })?;
        roots.insert(name.to_string(), tools::at(name, place)?.root);
    }
    Ok(roots)
}
