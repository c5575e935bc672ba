//! Makes what is stale: a target after its inputs, those that do not need each other side by side.
//!
//! Knows nothing of how one step runs.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};

use step::{ActionKey, ActionResult, Failure, Known, Needs, TreeDigest};

use crate::capacity::{self, memory_here, threads_here};
use crate::plan::{Ready, Stale};
use crate::remote::Leave;
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
    /// Take what the store or the shared cache has, and make nothing.
    pub only_fetch: bool,
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
    /// Bytes that came for it, if it was found in the shared cache.
    pub fetched: Option<u64>,
}

/// A stale target in line, by its place in the graph.
struct Waiting {
    place: usize,
    ready: Ready,
    stale: Stale,
    share: Share,
    /// Why it cannot run on this machine.
    too_large: Option<Failure>,
}

/// What the thread of a step sends.
enum Sent {
    /// Its worker has done its part: others may have what it took.
    Freed(Share),
    /// The step at this place has ended, and holds this no longer.
    Ended(usize, Result<Built, Error>, Share),
    /// It came from the shared cache.
    Fetched(usize, Result<Built, Error>),
    /// It is not in the shared cache, or nobody makes it any more: it is to run here.
    Missed(Waiting),
    /// Another machine runs it, and it holds this no longer.
    Held(Waiting, Share),
}

/// How many results are asked for in the shared cache at once.
const FETCHES: usize = 16;

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
    Stale(Box<Ready>, Stale, Share, Option<Failure>),
}

/// What came of a target that was to run.
enum Made {
    Built(Built),
    /// Another machine runs it.
    Elsewhere,
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
        let wait_no_more = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            // Whoever is first in line is started first.
            let mut line: VecDeque<Waiting> = VecDeque::new();
            // Those that the shared cache is to be asked for, and those that another machine runs.
            let mut asked: VecDeque<Waiting> = VecDeque::new();
            let (mut running, mut fetching) = (0, 0);
            loop {
                let going_on = outcome.failed.is_empty() || options.keep_going;
                while let Some(place) = schedule.next().filter(|_| going_on) {
                    let node = &graph.nodes[place];
                    let found = match self.look(node, &facts[&node.id].0, &outputs, &tell) {
                        Ok(Looked::Stale(ready, stale, share, too_large)) => {
                            let (ready, share) = (*ready, machine.limit(share));
                            let waiting = Waiting { place, ready, stale, share, too_large };
                            if self.has_remote(&tell) {
                                asked.push_back(waiting);
                                continue;
                            }
                            match refused(node, &waiting, &options) {
                                None => {
                                    line.push_back(waiting);
                                    continue;
                                }
                                Some(refused) => Err(refused),
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
                    asked.clear();
                    wait_no_more.store(true, Ordering::Relaxed);
                }
                while fetching < FETCHES
                    && let Some(next) = asked.pop_front()
                {
                    fetching += 1;
                    let (sender, tell) = (sender.clone(), &tell);
                    scope.spawn(move || {
                        let node = &graph.nodes[next.place];
                        let place = next.place;
                        let sent = caught(node, || self.fetch(node, &next.ready, tell));
                        let _ = sender.send(match sent {
                            Ok(Some(built)) => Sent::Fetched(place, Ok(built)),
                            Ok(None) => Sent::Missed(next),
                            Err(error) => Sent::Fetched(place, Err(error)),
                        });
                    });
                }
                while let Some(next) = line.pop_front_if(|next| machine.has(next.share)) {
                    let (place, share) = (next.place, next.share);
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
                        let make =
                            || self.make(node, &next.ready, &next.stale, &slot, &inputs, tell);
                        let (made, ran) = match caught(node, make) {
                            Ok(Made::Built(built)) => {
                                let ran = built.ran.then_some(built.key);
                                (Ok(built), ran)
                            }
                            Ok(Made::Elsewhere) => {
                                _ = sender.send(Sent::Held(next, slot.held.get()));
                                return;
                            }
                            Err(error) => (Err(error), None),
                        };
                        _ = sender.send(Sent::Ended(place, made, slot.held.get()));
                        // What hangs on it need not wait until others have it too.
                        ran.into_iter().for_each(|key| self.give(&node.id, key, tell));
                    });
                }
                if running == 0 && fetching == 0 {
                    break;
                }
                let (place, made) = match receiver.recv().expect("a sender is kept") {
                    Sent::Freed(share) => {
                        machine.give_back(share);
                        continue;
                    }
                    Sent::Missed(next) => {
                        fetching -= 1;
                        let node = &graph.nodes[next.place];
                        match refused(node, &next, &options) {
                            None => {
                                line.push_back(next);
                                continue;
                            }
                            Some(refused) => (next.place, Err(refused)),
                        }
                    }
                    Sent::Held(next, share) => {
                        machine.give_back(share);
                        running -= 1;
                        fetching += 1;
                        let (sender, tell) = (sender.clone(), &tell);
                        scope.spawn(move || {
                            let node = &graph.nodes[next.place];
                            let place = next.place;
                            let key = next.ready.key;
                            let stopped = || wait_no_more.load(Ordering::Relaxed);
                            let waited = caught(node, || {
                                let made = self.wait_for(&node.id, key, &stopped, tell);
                                let take = |(result, transferred): (Box<ActionResult>, u64)| {
                                    self.fetched(&node.id, &result, transferred, tell)
                                };
                                made.map(take).transpose()
                            });
                            let _ = sender.send(match waited {
                                Ok(Some(built)) => Sent::Fetched(place, Ok(built)),
                                Ok(None) => Sent::Missed(next),
                                Err(error) => Sent::Fetched(place, Err(error)),
                            });
                        });
                        continue;
                    }
                    Sent::Fetched(place, made) => {
                        fetching -= 1;
                        (place, made)
                    }
                    Sent::Ended(place, made, share) => {
                        machine.give_back(share);
                        running -= 1;
                        (place, made)
                    }
                };
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
                let too_large = capacity::too_large(&needs);
                let too_large = too_large.map(|how| Failure::input(format!("{}: {how}", node.id)));
                let share = share(&needs, last.as_ref());
                Ok(Looked::Stale(Box::new(ready), stale, share, too_large))
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
        tell: &dyn Fn(Event<'_>),
    ) -> Result<Made, Error> {
        let mut on = |event: Event<'_>| tell(event);
        let target = &node.id;
        let _guard = self.store.lock(ready.key, &mut |holder| {
            on(Event::Waiting { target, holder });
        })?;
        // Whoever held the lock may have made it meanwhile.
        if let Ok(result) = self.find(ready)? {
            return self.found(target, result, on).map(Made::Built);
        }
        match self.leave(target, ready.key, tell) {
            Leave::Go => {}
            Leave::Held => return Ok(Made::Elsewhere),
            Leave::Made(result, transferred) => {
                return self.fetched(target, &result, transferred, tell).map(Made::Built);
            }
        }
        let mut run = || -> Result<ActionResult, Error> {
            let worker = self.worker(node, &mut on)?;
            on(Event::Started { target, key: ready.key, reason: stale });
            let result = self.run(node, ready, &worker, slot, outputs, &mut on)?;
            let result = self.store.actions().record(&result)?;
            self.store.clear_scratch(ready.key)?;
            self.point(target, &result)?;
            let size = self.store.tree(result.output)?.size();
            on(Event::Finished { target, result: &result, size });
            Ok(result)
        };
        let ActionResult { key, output, .. } =
            run().inspect_err(|_| self.release(target, ready.key, tell))?;
        Ok(Made::Built(Built { id: target.clone(), key, output, ran: true, fetched: None }))
    }

    /// The target's result from the shared cache, unless another build of this store is faster.
    fn fetch(
        &self,
        node: &Node,
        ready: &Ready,
        tell: &dyn Fn(Event<'_>),
    ) -> Result<Option<Built>, Error> {
        let target = &node.id;
        let _guard = self.store.lock(ready.key, &mut |holder| {
            tell(Event::Waiting { target, holder });
        })?;
        if let Ok(result) = self.find(ready)? {
            return self.found(target, result, tell).map(Some);
        }
        match self.pull(target, ready.key, tell) {
            Some((result, transferred)) => {
                self.fetched(target, &result, transferred, tell).map(Some)
            }
            None => Ok(None),
        }
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
        Ok(Built { id: target.clone(), key, output, ran: false, fetched: None })
    }
}

/// Why a target whose result is nowhere is not to run here.
fn refused(node: &Node, waiting: &Waiting, options: &Options) -> Option<Error> {
    let absent = || {
        Failure::environment(format!("{}: the shared cache has no result for it", node.id))
            .hint("build it, or let CI build it")
    };
    let too_large = || waiting.too_large.clone();
    let asked = || options.refuse.and_then(|refuse| refuse(node));
    options.only_fetch.then(absent).or_else(too_large).or_else(asked).map(Error::from)
}

/// What `work` comes to; a panic in it is a failure of the target's.
fn caught<T>(node: &Node, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let message = format!("{}: a panic, with its message above", node.id);
        Err(Failure::bug(message).into())
    })
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
