//! Which target may start next: one whose inputs are all made, when the machine has room for it.
//!
//! Knows the order of targets and what they take, nothing of steps or stores.

use std::collections::{BTreeSet, HashMap};

use crate::resolve::Graph;

/// The targets of a graph that are not made yet, by their place in it.
#[derive(Debug)]
pub struct Schedule {
    /// How many of each target's inputs are not made yet.
    waits_for: Vec<usize>,
    /// The targets that take it as an input.
    users: Vec<Vec<usize>>,
    /// Those that wait for nothing, in the order of the graph.
    ready: BTreeSet<usize>,
}

impl Schedule {
    pub fn new(graph: &Graph) -> Self {
        let places: HashMap<_, _> = graph.nodes.iter().map(|n| &n.id).zip(0..).collect();
        let mut waits_for = vec![0; graph.nodes.len()];
        let mut users = vec![Vec::new(); graph.nodes.len()];
        for (place, node) in graph.nodes.iter().enumerate() {
            let inputs: BTreeSet<usize> =
                node.targets().filter_map(|id| places.get(id).copied()).collect();
            waits_for[place] = inputs.len();
            inputs.into_iter().for_each(|input| users[input].push(place));
        }
        let ready = (0..waits_for.len()).filter(|place| waits_for[*place] == 0).collect();
        Self { waits_for, users, ready }
    }

    /// Takes the first target that waits for nothing.
    pub fn next(&mut self) -> Option<usize> {
        self.ready.pop_first()
    }

    /// Lets those go that waited for nothing else.
    pub fn made(&mut self, place: usize) {
        for user in &self.users[place] {
            self.waits_for[*user] -= 1;
            if self.waits_for[*user] == 0 {
                self.ready.insert(*user);
            }
        }
    }
}

/// What a step takes of the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    pub threads: usize,
    /// Bytes.
    pub memory: u64,
    /// There is one, or it is shared like one.
    pub accelerator: bool,
}

/// What of the machine nobody has taken.
#[derive(Debug)]
pub struct Machine {
    all: Share,
    free: Share,
}

impl Machine {
    pub fn new(threads: usize, memory: u64) -> Self {
        let all = Share { threads, memory, accelerator: true };
        Self { all, free: all }
    }

    /// No more than there is: a step that wants more runs alone, and may yet do.
    pub fn limit(&self, share: Share) -> Share {
        let Share { threads, memory, accelerator } = share;
        let (threads, memory) = (threads.min(self.all.threads), memory.min(self.all.memory));
        Share { threads, memory, accelerator }
    }

    pub fn has(&self, share: Share) -> bool {
        share.threads <= self.free.threads
            && share.memory <= self.free.memory
            && (self.free.accelerator || !share.accelerator)
    }

    /// Takes what it [`has`](Self::has).
    pub fn take(&mut self, share: Share) {
        self.free.threads -= share.threads;
        self.free.memory -= share.memory;
        self.free.accelerator &= !share.accelerator;
    }

    pub fn give_back(&mut self, share: Share) {
        self.free.threads += share.threads;
        self.free.memory += share.memory;
        self.free.accelerator |= share.accelerator;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_not_there_for_others() {
        let share = |threads, memory, accelerator| Share { threads, memory, accelerator };
        let mut machine = Machine::new(4, 100);
        assert_eq!(machine.limit(share(9, 900, true)), share(4, 100, true));
        let first = share(1, 60, true);
        machine.take(first);
        for (wanted, has) in [
            (share(3, 40, false), true),
            (share(4, 0, false), false),
            (share(1, 41, false), false),
            (share(1, 0, true), false),
        ] {
            assert_eq!(machine.has(wanted), has, "{wanted:?}");
        }
        machine.give_back(first);
        assert!(machine.has(share(4, 100, true)));
    }
}
