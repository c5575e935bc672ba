//! Runs one step: its worker, its request, its rules, and its output into the store.
//!
//! A result is recorded once all its bytes are in the store and its inputs are what they were
//! before it ran. Killed at any moment, the store holds finished results only.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use step::worker::{self, Mode, Request};
use step::{ActionResult, Failure, Family, Provenance, TreeDigest, action};

use crate::build::Slot;
use crate::capacity::threads_here;
use crate::compiled::Compiled;
use crate::plan::Ready;
use crate::process::{self, Said};
use crate::resolve::{Input, Node, Origin};
use crate::sandbox::{self, Allowed};
use crate::target::TargetId;
use crate::{Engine, Error, Event, Workers, cannot, held, tools};

/// The name of this machine.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

impl Engine {
    /// Runs the worker and takes its output in; records nothing.
    pub(crate) fn run(
        &self,
        node: &Node,
        ready: &Ready,
        worker: &Path,
        slot: &Slot,
        outputs: &BTreeMap<TargetId, TreeDigest>,
        on: &mut dyn FnMut(Event),
    ) -> Result<ActionResult, Error> {
        let target = &node.id;
        let attempt = self.store.attempt(&target.to_string())?;
        let mut request = self.request(node, ready, attempt.path(), outputs, Mode::Build, on)?;
        request.threads = slot.threads();
        let started = SystemTime::now();
        let clock = Instant::now();
        let rules = self.rules(node, worker, &request, attempt.path())?;
        let outcome =
            process::run(worker, &request, attempt.path(), &self.running, rules, &mut |said| {
                match said {
                    Said::Progress(progress) => on(Event::Progress { target, progress }),
                    Said::Note(text) => on(Event::Note { target, text }),
                }
            })
            .map_err(|failure| Failure {
                message: format!("{target}: {}", failure.message),
                ..failure
            })?;
        let wall_seconds = clock.elapsed().as_secs_f64();
        // Whoever runs next need not wait until the output is in the store.
        slot.free();
        self.unchanged(node, ready)?;

        let output = self.store.ingest(&request.out)?.digest();
        let report = self.store.ingest(&request.report)?.digest();
        let log = self.store.put_bytes(&outcome.log)?;
        let mut versions = outcome.versions;
        let device = versions.remove("device").unwrap_or_else(|| "cpu".into());
        let (git_commit, git_dirty) = self.commit().clone();
        let provenance = Provenance {
            started: started.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            wall_seconds,
            cpu_seconds: outcome.cpu_seconds,
            peak_memory: outcome.peak_memory,
            host: host(),
            device,
            versions,
            git_commit,
            git_dirty,
            vouched_from: None,
        };
        Ok(ActionResult {
            format: action::FORMAT,
            key: ready.key,
            step: node.def.name.into(),
            kind: node.kind,
            output,
            report,
            log,
            metrics: outcome.metrics,
            provenance,
        })
    }

    pub(crate) fn commit(&self) -> &(Option<String>, bool) {
        self.commit.get_or_init(|| git(&self.root))
    }

    /// What the worker of `request` may touch; none where it may touch anything.
    pub(crate) fn rules(
        &self,
        node: &Node,
        worker: &Path,
        request: &Request,
        attempt: &Path,
    ) -> Result<Option<OwnedFd>, Failure> {
        if !self.confined {
            return Ok(None);
        }
        let mut allowed = Allowed { network: node.def.network, ..Allowed::default() };
        allowed.read.insert(worker.to_path_buf());
        allowed.read.extend(request.inputs.values().flatten().map(|input| input.path.clone()));
        // A tool's libraries find each other beyond the folder that a worker is told of: pinned
        // ones in their own, the user's beside it.
        let pinned = self.store.tools_dir();
        for path in request.tools.values() {
            let own = path.strip_prefix(&pinned).ok().and_then(|rest| rest.iter().next());
            let folder =
                own.map_or_else(|| path.parent().map(Into::into), |own| Some(pinned.join(own)));
            allowed.read.extend(folder);
        }
        for name in (node.def.programs)(&node.params) {
            tools::on_path(&name).iter().for_each(|path| allowed.program(path));
        }
        allowed.write.extend([attempt.to_path_buf(), request.scratch.clone()]);
        sandbox::rules(&allowed)
            .map_err(|e| Failure::environment(format!("cannot confine the step: {e}")))
    }

    pub(crate) fn request(
        &self,
        node: &Node,
        ready: &Ready,
        attempt: &Path,
        outputs: &BTreeMap<TargetId, TreeDigest>,
        mode: Mode,
        on: &mut dyn FnMut(Event),
    ) -> Result<Request, Error> {
        let mut inputs: BTreeMap<String, Vec<worker::Input>> = BTreeMap::new();
        for input in &node.inputs {
            let tree = match &input.from {
                Origin::Target(id) => outputs[id],
                Origin::Path { path, .. } => {
                    let now = self.store.ingest_copy(path)?.digest();
                    if now != ready.inputs[&input.field] {
                        return Err(moved(node, input).into());
                    }
                    now
                }
            };
            let path = self.materialise(tree)?;
            inputs.entry(input.name.into()).or_default().push(worker::Input {
                label: input.label.clone(),
                kind: input.kind,
                path,
                origin: origin(node, input),
            });
        }
        let mut tool_paths = BTreeMap::new();
        for tool in node.def.tools {
            let found = self.tool(tool, on)?;
            tool_paths.insert(tool.to_string(), found.root);
        }
        let scratch = self.store.scratch(ready.key)?;
        let request = Request {
            format: action::FORMAT,
            step: node.def.name.into(),
            mode,
            params: ready.action.params.clone(),
            inputs,
            out: attempt.join("out"),
            report: attempt.join("report"),
            scratch,
            tools: tool_paths,
            threads: threads_here(),
        };
        for dir in [&request.out, &request.report] {
            std::fs::create_dir_all(dir).map_err(cannot("create", dir))?;
        }
        Ok(request)
    }

    /// Inputs are checked after a step too: if they moved, nobody knows what it read.
    fn unchanged(&self, node: &Node, ready: &Ready) -> Result<(), Error> {
        for input in &node.inputs {
            if let Origin::Path { path, .. } = &input.from
                && self.store.hash_path(path)?.digest() != ready.inputs[&input.field]
            {
                return Err(moved(node, input).into());
            }
        }
        Ok(())
    }

    /// The family's worker, compiled if need be.
    pub(crate) fn worker(&self, node: &Node, on: &mut dyn FnMut(Event)) -> Result<PathBuf, Error> {
        self.worker_of(node.family, on)
    }

    pub(crate) fn worker_of(
        &self,
        family: &Family,
        on: &mut dyn FnMut(Event),
    ) -> Result<PathBuf, Error> {
        if let Workers::Fixed(path) = &self.workers {
            return Ok(path.clone());
        }
        self.compiled_worker(family.name, family.build_tools, on)
    }

    /// The worker of a package that is compiled with these tools.
    pub(crate) fn compiled_worker(
        &self,
        family: &str,
        tools: &[&str],
        on: &mut dyn FnMut(Event),
    ) -> Result<PathBuf, Error> {
        // Held while cargo runs: whoever needs the same worker waits for it here.
        let mut compiled = held(&self.compiled);
        if let Some(path) = compiled.get(family) {
            return Ok(path.clone());
        }
        let mut env = BTreeMap::new();
        for tool in tools {
            env.extend(self.tool(tool, on)?.env);
        }
        let code = self.family_code(family)?;
        let record = self.store.root().join("workers").join(format!("{family}.json"));
        let path = match Compiled::still(&record, code, &env) {
            Some(path) => path,
            None => {
                let path = self.compile(family, &env, on)?;
                Compiled::new(&path, code, env).write(&record);
                path
            }
        };
        compiled.insert(family.into(), path.clone());
        Ok(path)
    }

    /// The worker of a package, compiled if need be.
    pub fn compile(
        &self,
        family: &str,
        env: &BTreeMap<String, String>,
        on: &mut dyn FnMut(Event),
    ) -> Result<PathBuf, Error> {
        let clock = Instant::now();
        let path = process::compile(&self.root, family, env, &mut |line| {
            on(Event::Compiling { family, line });
        })?;
        on(Event::Compiled { family, wall: clock.elapsed() });
        Ok(path)
    }

    /// A pinned tool, fetched if need be.
    pub fn tool(&self, name: &str, on: &mut dyn FnMut(Event)) -> Result<tools::ToolPaths, Error> {
        let dir = self.store.tools_dir();
        let found = tools::ensure(name, &self.root, &dir, &mut |text: &str| {
            on(Event::Tool { tool: name, text });
        })?;
        Ok(found)
    }
}

fn moved(node: &Node, input: &Input) -> Failure {
    let origin = origin(node, input);
    Failure::input(format!(
        "{}: {origin} changed while the step ran; its result is not kept",
        node.id
    ))
    .hint("build again once the file is at rest")
}

pub(crate) fn origin(node: &Node, input: &Input) -> String {
    match &input.from {
        Origin::Target(id) if id.recipe == node.id.recipe => id.target.clone(),
        Origin::Target(id) => id.to_string(),
        Origin::Path { shown, .. } => shown.clone(),
    }
}

/// The commit of the workspace and whether it was changed since.
fn git(root: &Path) -> (Option<String>, bool) {
    let ask = |args: &[&str]| {
        let output =
            std::process::Command::new("git").args(args).current_dir(root).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_string())
    };
    let dirty = ask(&["status", "--porcelain"]).is_some_and(|s| !s.is_empty());
    (ask(&["rev-parse", "HEAD"]), dirty)
}
