//! Makes what is stale: keys, workers, results, links.
//!
//! A result is recorded once all its bytes are in the store and its inputs are what they were
//! before it ran. Killed at any moment, the store holds finished results only.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, mpsc};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use step::worker::{self, Mode, Request};
use step::{
    Action, ActionKey, ActionResult, CodeDigest, Facts, Failure, Known, Platform, Provenance,
    TreeDigest, action, canonical,
};
use store::StoreError;

use crate::compiled::Compiled;
use crate::plan::{Blocked, Plan, Planned, Ready, Stale, Status};
use crate::process::{self, Said};
use crate::resolve::{Graph, Input, Node, Origin};
use crate::sandbox::{self, Allowed};
use crate::schedule::{Machine, Schedule, Share};
use crate::target::TargetId;
use crate::{Engine, Error, Event, Workers, code, held, tools, why};

/// How to build.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// After a failure, go on with what does not hang on it.
    pub keep_going: bool,
    /// How many threads steps may use together; all that the machine has, if not said.
    pub threads: Option<usize>,
    /// The words that the targets were asked for with: [`Engine::remembered`] may then answer the
    /// same question next time. None: nothing is remembered.
    pub words: Vec<String>,
}

/// What a build came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// In the order of the graph.
    pub built: Vec<Built>,
    /// In the order in which they failed.
    pub failed: Vec<(TargetId, Error)>,
    /// What was not made because of those.
    pub lost: Vec<TargetId>,
}

impl Outcome {
    fn fail(&mut self, node: &Node, error: Error, stopped: bool, tell: &dyn Fn(Event<'_>)) {
        if let Error::Failure(failure) = &error
            && !stopped
        {
            tell(Event::Failed { target: &node.id, failure });
        }
        self.failed.push((node.id.clone(), error));
    }

    /// What was built, if nothing failed; else the first failure.
    pub fn into_result(mut self) -> Result<Vec<Built>, Error> {
        match self.failed.is_empty() {
            true => Ok(self.built),
            false => Err(self.failed.swap_remove(0).1),
        }
    }
}

/// A stale target in line, by its place in the graph.
struct Waiting {
    place: usize,
    ready: Ready,
    stale: Stale,
    share: Share,
}

/// What the thread of a step sends.
enum Sent {
    /// Its worker has done its part: others may have what it took.
    Freed(Share),
    /// The step at this place has ended, and holds this no longer.
    Ended(usize, Result<Built, Error>, Share),
}

/// What a step's worker holds of the machine.
pub(crate) struct Slot {
    held: Cell<Share>,
    freed: Option<mpsc::Sender<Sent>>,
}

impl Slot {
    /// All threads, with nobody beside.
    pub fn alone() -> Self {
        let all = Share { threads: threads_here(), ..Share::default() };
        Self { held: Cell::new(all), freed: None }
    }

    fn free(&self) {
        let share = self.held.take();
        // The receiver lives as long as anything runs.
        self.freed.iter().for_each(|freed| _ = freed.send(Sent::Freed(share)));
    }
}

enum Looked {
    Found(Built),
    Stale(Box<Ready>, Stale),
}

/// A target that was made, or found.
#[derive(Debug)]
pub struct Built {
    pub id: TargetId,
    pub key: ActionKey,
    pub output: TreeDigest,
    /// Whether it ran now, or was found.
    pub ran: bool,
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
            let status = match self.blocked(node, &stuck, known) {
                Some(blocked) => {
                    stuck.insert(&node.id);
                    Status::Blocked(blocked)
                }
                None => self.status(node, &outputs, last.as_ref())?.0,
            };
            if let Status::Cached(result) = &status {
                outputs.insert(node.id.clone(), result.output);
            }
            let memory = (node.def.needs)(&node.params, known).memory;
            let (id, step) = (node.id.clone(), node.def.name);
            targets.push(Planned { id, step, status, last, memory });
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

    /// Makes every target of `graph` that is stale, those that do not need each other side by side
    /// as far as the machine has room for them, and links all of them for people.
    ///
    /// After a failure nothing more is started, unless `options` say to go on with what does not
    /// hang on it. What was made until then is kept.
    pub fn build(
        &self,
        graph: &Graph,
        options: Options,
        on: &mut (dyn FnMut(Event) + Send),
    ) -> Result<Outcome, Error> {
        self.recall(&options.words);
        let on = Mutex::new(on);
        let tell = |event: Event<'_>| held(&on)(event);
        let facts = self.facts(graph);
        let threads = options.threads.unwrap_or_else(threads_here).max(1);
        let mut machine = Machine::new(threads, memory_here());
        let mut schedule = Schedule::new(graph);
        let mut outputs = BTreeMap::new();
        let mut outcome = Outcome::default();
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            // Whoever is first in line is started first.
            let mut line: VecDeque<Waiting> = VecDeque::new();
            let mut running = 0;
            loop {
                let going_on = outcome.failed.is_empty() || options.keep_going;
                while let Some(place) = schedule.next().filter(|_| going_on) {
                    let node = &graph.nodes[place];
                    let known = &facts[&node.id].0;
                    match self.look(node, known, &outputs, &tell) {
                        Ok(Looked::Found(built)) => {
                            outputs.insert(node.id.clone(), built.output);
                            outcome.built.push(built);
                            schedule.made(place);
                        }
                        Ok(Looked::Stale(ready, stale)) => {
                            let share = machine.limit(self.share(node, known));
                            line.push_back(Waiting { place, ready: *ready, stale, share });
                        }
                        Err(error) => {
                            outcome.fail(node, error, self.running.is_stopped(), &tell);
                        }
                    }
                }
                if !going_on {
                    line.clear();
                }
                while let Some(next) = line.pop_front_if(|next| machine.has(next.share)) {
                    let Waiting { place, ready, stale, share } = next;
                    let node = &graph.nodes[place];
                    let inputs = self.inputs_of(node, &outputs);
                    let (sender, tell) = (sender.clone(), &tell);
                    let slot = Slot { held: Cell::new(share), freed: Some(sender.clone()) };
                    running += 1;
                    machine.take(share);
                    if self.commit.get().is_none() {
                        // Asked while the first step runs.
                        scope.spawn(|| self.commit());
                    }
                    scope.spawn(move || {
                        let mut on = |event: Event<'_>| tell(event);
                        let make = || self.make(node, &ready, &stale, &slot, &inputs, &mut on);
                        let made = catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|_| {
                            let message = format!("{}: a panic, with its message above", node.id);
                            Err(Failure::bug(message).into())
                        });
                        let _ = sender.send(Sent::Ended(place, made, slot.held.get()));
                    });
                }
                if running == 0 {
                    break;
                }
                let (place, made) = match receiver.recv().expect("a sender is kept") {
                    Sent::Freed(share) => {
                        machine.give_back(share);
                        continue;
                    }
                    Sent::Ended(place, made, share) => {
                        machine.give_back(share);
                        (place, made)
                    }
                };
                running -= 1;
                let node = &graph.nodes[place];
                match made {
                    Ok(built) => {
                        outputs.insert(node.id.clone(), built.output);
                        outcome.built.push(built);
                        schedule.made(place);
                    }
                    Err(error) => {
                        outcome.fail(node, error, self.running.is_stopped(), &tell);
                    }
                }
            }
        });
        self.finish_caches();
        let places: BTreeMap<_, _> = graph.nodes.iter().map(|n| &n.id).zip(0..).collect();
        outcome.built.sort_by_key(|built| places[&built.id]);
        if outcome.failed.is_empty() && !options.words.is_empty() {
            self.remember_fresh(&options.words, graph, &outcome.built, self.opened);
        }
        let failed = outcome.failed.iter().map(|(id, _)| id);
        let done: BTreeSet<_> = outcome.built.iter().map(|b| &b.id).chain(failed).collect();
        let ids = graph.nodes.iter().map(|node| &node.id);
        outcome.lost = ids.filter(|id| !done.contains(id)).cloned().collect();
        Ok(outcome)
    }

    /// What is known of each target before it is built, or of models, from what was built last.
    pub(crate) fn facts(&self, graph: &Graph) -> BTreeMap<TargetId, (Known, Facts)> {
        graph.facts(&|id| {
            let tree = self.store.tree(self.last(id)?.output).ok()?;
            let config = tree.entries().iter().find(|entry| entry.path == "config.json")?;
            serde_json::from_slice(&self.store.blob(config.digest).ok()?).ok()
        })
    }

    /// What a step takes of the machine: what it says of itself, or what it took last time.
    fn share(&self, node: &Node, known: &Known) -> Share {
        let needs = (node.def.needs)(&node.params, known);
        let last = self.last(&node.id).map_or(0, |last| last.provenance.peak_memory);
        // On an accelerator it takes less of ours than this.
        let counted = needs.memory.map_or(0, |memory| memory.on_processor);
        Share {
            threads: needs.threads.unwrap_or(usize::MAX),
            memory: if last > 0 { last } else { counted },
            accelerator: needs.accelerator,
        }
    }

    /// Whether a target whose inputs are made is made itself.
    fn look(
        &self,
        node: &Node,
        known: &Known,
        outputs: &BTreeMap<TargetId, TreeDigest>,
        tell: &dyn Fn(Event<'_>),
    ) -> Result<Looked, Error> {
        if let Some(built) = self.still_made(node, outputs) {
            tell(Event::Cached { target: &built.id, key: built.key, output: built.output });
            return Ok(Looked::Found(built));
        }
        if let Some(blocked) = self.blocked(node, &BTreeSet::new(), known) {
            return Err(Failure::input(format!("{}: {blocked}", node.id)).into());
        }
        let ready = self.ready(node, outputs)?;
        let mut found = self.find(&ready)?;
        if let Ok(result) = found {
            match self.found(&node.id, result, tell) {
                Ok(built) => return Ok(Looked::Found(built)),
                // A file that turns out damaged when it is laid out is lost from then on.
                Err(_) => found = self.find(&ready)?,
            }
        }
        match found {
            Ok(result) => Ok(Looked::Found(self.found(&node.id, result, tell)?)),
            Err(lost) => {
                let stale = self.reason(&ready, self.last(&node.id).as_ref(), lost);
                Ok(Looked::Stale(Box::new(ready), stale))
            }
        }
    }

    /// The outputs that a node takes as inputs.
    fn inputs_of(
        &self,
        node: &Node,
        outputs: &BTreeMap<TargetId, TreeDigest>,
    ) -> BTreeMap<TargetId, TreeDigest> {
        node.targets().map(|id| (id.clone(), outputs[id])).collect()
    }

    /// Makes one target, `stale` says why.
    fn make(
        &self,
        node: &Node,
        ready: &Ready,
        stale: &Stale,
        slot: &Slot,
        outputs: &BTreeMap<TargetId, TreeDigest>,
        on: &mut dyn FnMut(Event),
    ) -> Result<Built, Error> {
        let target = &node.id;
        let _guard = self.store.lock(ready.key, &mut |holder| {
            on(Event::Waiting { target, holder });
        })?;
        // Whoever held the lock may have made it meanwhile.
        if let Ok(result) = self.find(ready)? {
            return self.found(target, result, on);
        }
        let worker = self.worker(node, on)?;
        on(Event::Started { target, key: ready.key, reason: stale });
        let result = self.run(node, ready, &worker, slot, outputs, on)?;
        let result = self.store.actions().record(&result)?;
        self.store.clear_scratch(ready.key)?;
        self.point(target, &result)?;
        let size = self.store.tree(result.output)?.size();
        on(Event::Finished { target, result: &result, size });
        Ok(Built { id: target.clone(), key: result.key, output: result.output, ran: true })
    }

    fn found(
        &self,
        target: &TargetId,
        result: ActionResult,
        mut tell: impl FnMut(Event<'_>),
    ) -> Result<Built, Error> {
        self.point(target, &result)?;
        let ActionResult { key, output, .. } = result;
        tell(Event::Cached { target, key, output });
        Ok(Built { id: target.clone(), key, output, ran: false })
    }

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
        request.threads = slot.held.get().threads;
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
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
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

    fn commit(&self) -> &(Option<String>, bool) {
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
    fn find(&self, ready: &Ready) -> Result<Result<ActionResult, Option<String>>, Error> {
        Ok(match self.store.actions().lookup(ready.key)? {
            store::Lookup::Found(result) => Ok(*result),
            store::Lookup::Lost(reason) => Err(Some(reason)),
            store::Lookup::Never => Err(None),
        })
    }

    /// Why `ready` has no result, as against what was built last under its name.
    fn reason(&self, ready: &Ready, last: Option<&ActionResult>, lost: Option<String>) -> Stale {
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

    fn blocked(&self, node: &Node, stuck: &BTreeSet<&TargetId>, known: &Known) -> Option<Blocked> {
        if let Err(unsupported) = (node.def.supports)(&node.params, known) {
            return Some(Blocked::Unsupported(unsupported));
        }
        if node.unlocked {
            return Some(Blocked::NotLocked(node.id.clone()));
        }
        node.targets().find(|id| stuck.contains(id)).cloned().map(Blocked::On)
    }

    /// The family's worker, compiled if need be.
    pub(crate) fn worker(&self, node: &Node, on: &mut dyn FnMut(Event)) -> Result<PathBuf, Error> {
        if let Workers::Fixed(path) = &self.workers {
            return Ok(path.clone());
        }
        // Held while cargo runs: whoever needs the same worker waits for it here.
        let mut compiled = held(&self.compiled);
        let family = node.family.name;
        if let Some(path) = compiled.get(family) {
            return Ok(path.clone());
        }
        let mut env = BTreeMap::new();
        for tool in node.family.build_tools {
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

    /// A read-only folder with the files of `tree`. Made once; held to its digest each time (the
    /// stat cache makes that cheap), and made again if somebody changed it.
    pub fn materialise(&self, tree: TreeDigest) -> Result<PathBuf, Error> {
        let path = self.store.root().join("trees").join(tree.to_string());
        let aside = || self.store.root().join("tmp").join(format!("tree-{}", unique()));
        if path.is_dir() {
            if self.is_intact(&path, tree) {
                return Ok(path);
            }
            // Somebody else may be quicker.
            let altered = aside();
            if std::fs::rename(&path, &altered).is_ok() {
                remove(&altered)?;
            }
        }
        let partial = aside();
        let laid_out = self.store.materialise(&self.store.tree(tree)?, &partial, true);
        let done = laid_out.map_err(Error::from).and_then(|()| Ok(rename(&partial, &path)?));
        if partial.exists() {
            let _ = remove(&partial);
        }
        done.map(|()| path)
    }

    fn is_intact(&self, folder: &Path, tree: TreeDigest) -> bool {
        const TRIES: usize = 100;
        // While it is looked at, another builder may give a file of it another name.
        let mut looks = (0..TRIES).map(|_| self.store.hash_path(folder));
        let now = looks.find(|now| !matches!(now, Err(StoreError::Moved { .. })));
        now.is_some_and(|now| now.is_ok_and(|now| now.digest() == tree))
    }

    /// Makes the target's name stand for `result`: links, and the pointer last. Whoever finds the
    /// pointer as it should be need not look at what was made before it.
    pub(crate) fn point(&self, target: &TargetId, result: &ActionResult) -> Result<(), Error> {
        let pointer = self.pointer(target);
        let text = serde_json::to_vec(&result.key).expect("a key serialises to JSON");
        let link = self.link(target);
        // Made again if somebody changed what it leads to.
        let folder = self.materialise(result.output)?;
        let leads_there =
            std::fs::read_link(&link).is_ok_and(|to| to.file_name() == folder.file_name());
        if leads_there && std::fs::read(&pointer).is_ok_and(|old| old == text) {
            return Ok(());
        }
        symlink(&folder, &link)?;
        let report = link.with_file_name(format!("{}.report", target.target));
        if self.store.tree(result.report)?.entries().is_empty() {
            let _ = std::fs::remove_file(&report);
        } else {
            symlink(&self.materialise(result.report)?, &report)?;
        }
        write_atomic(&pointer, &text)?;
        self.note_in_history(target, result.key);
        Ok(())
    }

    fn finish_caches(&self) {
        held(&self.code).iter().for_each(code::CodeBase::save);
        self.store.save_stat_cache();
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

fn origin(node: &Node, input: &Input) -> String {
    match &input.from {
        Origin::Target(id) if id.recipe == node.id.recipe => id.target.clone(),
        Origin::Target(id) => id.to_string(),
        Origin::Path { shown, .. } => shown.clone(),
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

/// How many threads this process may use at once. The answer takes a dozen files to find out.
pub(crate) fn threads_here() -> usize {
    static KNOWN: OnceLock<usize> = OnceLock::new();
    *KNOWN.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Bytes of memory that this machine could give to steps now, where the system tells.
fn memory_here() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib * 1024)
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

/// Names the act and the path of an I/O error; a full disk has its hint.
fn cannot(act: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| {
        let error = anyhow::Error::new(e).context(format!("cannot {act} {}", path.display()));
        Failure::from_anyhow(&error)
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    std::fs::remove_dir_all(path).map_err(cannot("remove", path))
}

/// Moves a finished folder to its place. Somebody else may have been there first.
fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    let parent = to.parent().expect("a place in a folder");
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::rename(from, to))
        .or_else(|e| if to.is_dir() { Ok(()) } else { Err(e) })
        .map_err(cannot("write", to))
}

pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let io = cannot("write", path);
    let partial = path.with_extension(format!("{}.tmp", unique()));
    std::fs::create_dir_all(path.parent().expect("a file in a folder")).map_err(&io)?;
    std::fs::write(&partial, bytes).map_err(&io)?;
    std::fs::rename(&partial, path).map_err(io)
}

/// A link at `at` that says `to`, put there in one move. Relative, so that the workspace may move.
fn symlink(to: &Path, at: &Path) -> Result<(), Failure> {
    let io = cannot("link", at);
    let name = to.file_name().expect("trees have names");
    let version = Path::new("..").join(format!("v{}", store::FORMAT)).join("trees").join(name);
    let partial = at.with_file_name(format!(".{}.tmp", unique()));
    std::fs::create_dir_all(at.parent().expect("a link in a folder")).map_err(&io)?;
    let _ = std::fs::remove_file(&partial);
    std::os::unix::fs::symlink(&version, &partial).map_err(&io)?;
    std::fs::rename(&partial, at).map_err(io)
}

/// A part of a file name that nobody else uses now.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
