//! Which rows are trained on in which order: a pure function of their lengths, the keys, a seed.
//!
//! Knows nothing of tokens or tensors.

use std::ops::Range;

use train::training::{Packing, Training};

/// The rows of one micro-batch, by their index in the split.
pub type Micro = Vec<u32>;

/// A whole training run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Rows share a sequence (else they lie under one another, padded).
    pub packed: bool,
    /// Optimiser steps, each of one or more micro-batches.
    pub steps: Vec<Vec<Micro>>,
}

/// Rows are sorted by length within windows of this many: like lengths come together, and the
/// order of the data stays random.
const WINDOW: usize = 4096;

/// `auto` packs when padding would be more than this share of all positions.
const MOST_PADDING: f64 = 0.2;

impl Plan {
    /// `lengths`: positions of each row (its tokens, less the last one, which is only predicted).
    pub fn new(lengths: &[usize], training: &Training) -> Self {
        let mut random = Random::new(training.seed);
        let epochs: Vec<Vec<u32>> = epochs(lengths.len(), training.epochs)
            .map(|rows| {
                let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
                random.shuffle(&mut order);
                order.truncate(rows);
                order
            })
            .collect();
        let packed = decide(lengths, training.packing, training.batch_tokens);
        let mut micros = Vec::new();
        for order in epochs {
            let mut batches = if packed {
                pack(order, lengths, training.batch_tokens)
            } else {
                let windows = order.chunks(WINDOW).map(<[u32]>::to_vec);
                windows.flat_map(|w| bucket(w, lengths, training.batch_tokens)).collect()
            };
            random.shuffle(&mut batches);
            micros.append(&mut batches);
        }
        let steps = micros.chunks(training.gradient_accumulation).map(<[Micro]>::to_vec).collect();
        Self { packed, steps }
    }

    /// Names the plan: two equal digests train on the same rows in the same order.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[u8::from(self.packed)]);
        for step in &self.steps {
            hasher.update(&(step.len() as u64).to_le_bytes());
            for micro in step {
                hasher.update(&(micro.len() as u64).to_le_bytes());
                micro.iter().for_each(|row| _ = hasher.update(&row.to_le_bytes()));
            }
        }
        hasher.finalize()
    }
}

/// Every row once, for measuring: in batches by length, without chance.
pub fn once(lengths: &[usize], batch_tokens: usize) -> Vec<Micro> {
    bucket((0..lengths.len() as u32).collect(), lengths, batch_tokens)
}

/// A seed for the random numbers of one micro-batch, so that a run can start again anywhere.
pub fn seed_of(seed: u64, step: usize, micro: usize) -> u64 {
    let mut random = Random::new(seed ^ 0x6472_6f70_6f75_7400); // "dropout"
    for part in [step as u64, micro as u64] {
        random = Random::new(random.next() ^ part);
    }
    random.next()
}

/// Rows to take in each epoch: all of them, and in the last one perhaps a part, never none.
fn epochs(rows: usize, epochs: f64) -> impl Iterator<Item = usize> {
    let whole = epochs.floor() as usize;
    let part = (epochs.fract() * rows as f64).round() as usize;
    let part = if whole == 0 { part.max(1) } else { part };
    std::iter::repeat_n(rows, whole).chain(Some(part.min(rows)).filter(|part| *part > 0))
}

fn decide(lengths: &[usize], packing: Packing, batch_tokens: usize) -> bool {
    match packing {
        Packing::Always => true,
        Packing::Never => false,
        Packing::Auto => {
            let padded: usize = once(lengths, batch_tokens)
                .iter()
                .map(|rows| {
                    rows.len() * rows.iter().map(|r| lengths[*r as usize]).max().unwrap_or(0)
                })
                .sum();
            let real: usize = lengths.iter().sum();
            (padded - real) as f64 > MOST_PADDING * padded as f64
        }
    }
}

/// Rows of like length under one another, as many as fit once padded to the longest.
fn bucket(mut rows: Vec<u32>, lengths: &[usize], batch_tokens: usize) -> Vec<Micro> {
    rows.sort_by_key(|row| lengths[*row as usize]);
    // Sorted: the row at hand is the longest of its batch.
    split(rows, |batch, row| (batch.len() + 1) * lengths[row as usize] <= batch_tokens)
}

/// Rows end to end, in the order they come in.
fn pack(rows: Vec<u32>, lengths: &[usize], batch_tokens: usize) -> Vec<Micro> {
    split(rows, |batch, row| {
        let used: usize = batch.iter().map(|r| lengths[*r as usize]).sum();
        used + lengths[row as usize] <= batch_tokens
    })
}

/// Cuts where the next row no longer `fits`. A row that never fits stands alone.
fn split(rows: Vec<u32>, fits: impl Fn(&[u32], u32) -> bool) -> Vec<Micro> {
    let mut batches: Vec<Micro> = Vec::new();
    for row in rows {
        match batches.last_mut() {
            Some(batch) if fits(batch, row) => batch.push(row),
            _ => batches.push(vec![row]),
        }
    }
    batches
}

/// SplitMix64 (Steele, Lea & Flood, 2014): small, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fisher and Yates's.
    fn shuffle<T>(&mut self, items: &mut [T]) {
        let steps: Range<usize> = 1..items.len();
        for i in steps.rev() {
            // The product's high half: uniform but for a bias of 2⁻⁶⁴ · i.
            let j = ((u128::from(self.next()) * (i as u128 + 1)) >> 64) as usize;
            items.swap(i, j);
        }
    }
}
