//! Makes what is stale: a target after its inputs, those that do not need each other side by side.
//!
//! Knows nothing of how one step runs.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, mpsc};

use step::{ActionKey, ActionResult, Failure, Known, Needs, TreeDigest};

use crate::capacity::{self, memory_here, threads_here};
use crate::plan::{Ready, Stale};
use crate::resolve::{Graph, Node};
use crate::schedule::{Machine, Schedule, Share};
use crate::target::TargetId;
use crate::{Engine, Error, Event, held};

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
    /// Says why a stale step may not run here: nothing is trained in CI unasked.
    pub refuse: Option<fn(&Node) -> Option<Failure>>,
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
    /// Takes in what came of a target. Returns its output, if it is made.
    fn ended(
        &mut self,
        node: &Node,
        made: Result<Built, Error>,
        stopped: bool,
        tell: &dyn Fn(Event<'_>),
    ) -> Option<TreeDigest> {
        match made {
            Ok(built) => {
                let output = built.output;
                self.built.push(built);
                Some(output)
            }
            Err(error) => {
                if let Error::Failure(failure) = &error
                    && !stopped
                {
                    tell(Event::Failed { target: &node.id, failure });
                }
                self.failed.push((node.id.clone(), error));
                None
            }
        }
    }

    /// What was built, if nothing failed; else the first failure.
    pub fn into_result(mut self) -> Result<Vec<Built>, Error> {
        match self.failed.is_empty() {
            true => Ok(self.built),
            false => Err(self.failed.swap_remove(0).1),
        }
    }
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

    pub fn threads(&self) -> usize {
        self.held.get().threads
    }

    /// Lets others have it, before the step has ended.
    pub fn free(&self) {
        let share = self.held.take();
        // The receiver lives as long as anything runs.
        self.freed.iter().for_each(|freed| _ = freed.send(Sent::Freed(share)));
    }
}

enum Looked {
    Found(Built),
    Stale(Box<Ready>, Stale, Share),
}

impl Engine {
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
        if let Some(node) = graph.nodes.iter().find(|node| node.def.acts) {
            let message = format!("{} is no artifact: `{}` acts outside", node.id, node.def.name);
            let hint = format!("say so: cargo xtask publish {}", node.id);
            return Err(Failure::input(message).hint(hint).into());
        }
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
                    let found = match self.look(node, &facts[&node.id].0, &outputs, &tell) {
                        Ok(Looked::Stale(ready, stale, share)) => {
                            match options.refuse.and_then(|refuse| refuse(node)) {
                                Some(refused) => Err(refused.into()),
                                None => {
                                    let share = machine.limit(share);
                                    line.push_back(Waiting { place, ready: *ready, stale, share });
                                    continue;
                                }
                            }
                        }
                        Ok(Looked::Found(built)) => Ok(built),
                        Err(error) => Err(error),
                    };
                    let stopped = self.running.is_stopped();
                    if let Some(output) = outcome.ended(node, found, stopped, &tell) {
                        outputs.insert(node.id.clone(), output);
                        schedule.made(place);
                    }
                }
                if !going_on {
                    line.clear();
                }
                while let Some(next) = line.pop_front_if(|next| machine.has(next.share)) {
                    let Waiting { place, ready, stale, share } = next;
                    let node = &graph.nodes[place];
                    let inputs = node.targets().map(|id| (id.clone(), outputs[id])).collect();
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
                let stopped = self.running.is_stopped();
                if let Some(output) = outcome.ended(node, made, stopped, &tell) {
                    outputs.insert(node.id.clone(), output);
                    schedule.made(place);
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
                let last = self.last(&node.id);
                let stale = self.reason(&ready, last.as_ref(), lost);
                let needs = (node.def.needs)(&node.params, known);
                if let Some(how) = capacity::too_large(&needs) {
                    return Err(Failure::input(format!("{}: {how}", node.id)).into());
                }
                let share = share(&needs, last.as_ref());
                Ok(Looked::Stale(Box::new(ready), stale, share))
            }
        }
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
}

/// What a step takes of the machine: what it says of itself, or what it took last time.
fn share(needs: &Needs, last: Option<&ActionResult>) -> Share {
    let last = last.map_or(0, |last| last.provenance.peak_memory);
    // On an accelerator it takes less of ours than this.
    let counted = needs.memory.map_or(0, |memory| memory.on_processor);
    Share {
        threads: needs.threads.unwrap_or(usize::MAX),
        memory: if last > 0 { last } else { counted },
        accelerator: needs.accelerator,
    }
}
