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

/// The fewest windows that an epoch of rising difficulty has.
const LEVELS: usize = 16;

/// `auto` packs when padding would be more than this share of all positions.
const MOST_PADDING: f64 = 0.2;

impl Plan {
    /// `lengths`: positions of each row (its tokens, less the last one, which is only predicted).
    /// `difficulty`: of each row, where the first epoch begins with easy ones.
    pub fn new(lengths: &[usize], difficulty: Option<&[f64]>, training: &Training) -> Self {
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
        let batches = |window: &[u32]| match packed {
            true => pack(window.to_vec(), lengths, training.batch_tokens),
            false => bucket(window.to_vec(), lengths, training.batch_tokens),
        };
        for (epoch, mut order) in epochs.into_iter().enumerate() {
            if let Some(difficulty) = difficulty.filter(|_| epoch == 0) {
                let of = |row: &u32| difficulty[*row as usize];
                order.sort_by(|a, b| of(a).total_cmp(&of(b))); // stable: equal ones by chance
                let window = order.len().div_ceil(LEVELS).clamp(1, WINDOW);
                for level in order.chunks(window) {
                    let mut level = batches(level);
                    random.shuffle(&mut level);
                    micros.append(&mut level);
                }
                continue;
            }
            let window = if packed { usize::MAX } else { WINDOW };
            let mut epoch: Vec<Micro> = order.chunks(window).flat_map(batches).collect();
            random.shuffle(&mut epoch);
            micros.append(&mut epoch);
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

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::{Value, json};
    use step::StepDef;

    use super::*;

    const ROWS: usize = 200;

    fn lengths() -> Vec<usize> {
        (0..ROWS).map(|row| 3 + row * 37 % 61).collect()
    }

    fn training(packing: &str, seed: u64, epochs: f64) -> Training {
        let params = json!({
            "packing": packing, "seed": seed, "epochs": epochs, "batch_tokens": 128,
            "gradient_accumulation": 1,
        });
        let Value::Object(params) = params else { unreachable!("an object") };
        let params = (StepDef::of::<train::Lora>().resolve)(params).unwrap();
        train::Lora::deserialize(&params).unwrap().training()
    }

    fn rows(plan: &Plan) -> Vec<usize> {
        plan.steps.iter().flatten().flatten().map(|row| *row as usize).collect()
    }

    /// A change of these makes other models of old recipes.
    #[test]
    fn plans_by_chance_are_what_they_were() {
        let runs = [("never", 0, 1.0), ("never", 7, 2.25), ("always", 0, 1.5)];
        let digests = runs.map(|(packing, seed, epochs)| {
            let training = training(packing, seed, epochs);
            let plan = Plan::new(&lengths(), None, &training);
            plan.digest().to_hex()[..16].to_string()
        });
        assert_eq!(digests, ["df6bf601081790b6", "7748f8ae182195c3", "df6cf9f8f1b0631e"]);
    }

    #[test]
    fn an_epoch_sees_each_row_once_the_easiest_window_first() {
        let difficulty: Vec<f64> = (0..ROWS).map(|row| (row * 71 % ROWS) as f64).collect();
        for packing in ["never", "always"] {
            let plan = |seed, epochs| {
                Plan::new(&lengths(), Some(&difficulty), &training(packing, seed, epochs))
            };
            let two = rows(&plan(0, 2.0));
            for epoch in two.chunks(ROWS) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..ROWS).collect::<Vec<_>>(), "{packing}");
            }
            let rises = |rows: &[usize]| {
                let levels = rows.chunks(rows.len().div_ceil(LEVELS));
                let levels = levels.map(|level| level.iter().map(|row| difficulty[*row]));
                let ends = levels.flat_map(|level| {
                    [level.clone().fold(f64::MAX, f64::min), level.fold(0.0, f64::max)]
                });
                ends.is_sorted()
            };
            let half = rows(&plan(0, 0.5));
            assert_eq!(half.len(), ROWS / 2);
            for (rows, easiest_first) in
                [(&two[..ROWS], true), (&two[ROWS..], false), (&half, true)]
            {
                assert_eq!(rises(rows), easiest_first, "{packing}");
            }
            assert_eq!(plan(3, 1.0), plan(3, 1.0));
            assert_ne!(plan(3, 1.0), plan(4, 1.0));
        }
    }
}
