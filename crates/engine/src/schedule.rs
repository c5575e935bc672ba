//! Which target may start next: one whose inputs are all made.
//!
//! Knows the order of targets, nothing of steps or stores.

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
