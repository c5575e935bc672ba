//! Going on from a prompt, token by token.
//!
//! Knows nothing of graphs. One prompt at a time with sampling, or many greedily; the many give
//! the tokens that one by one would give.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use crate::sample::{Random, greedy, sample};
use crate::{Error, Model};

/// How an answer is drawn. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most so many new tokens.
    pub max_new: usize,
    /// 0 takes the most likely token each time.
    pub temperature: f32,
    /// Of the so many most likely; 0 of all.
    pub top_k: usize,
    /// Of the smallest set that holds this share of the probability; 1 of all.
    pub top_p: f32,
    pub seed: u64,
    /// Tokens that end the answer. They are not part of it.
    pub stop_ids: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new: 256, temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, stop_ids: vec![] }
    }
}

/// A batch holds at most so many prompts, and so many tokens of prompt: it is where the memory
/// goes, and beyond this a bigger one is no faster.
const MAX_BATCH: usize = 64;
const MAX_BATCH_TOKENS: usize = 4096;

impl Model {
    /// The answer to a prompt, without the token that ended it. `on_token` sees each token as it
    /// comes, and may break off. An answer also ends where the model's positions do.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>, Error> {
        let mut random = Random::new(options.seed);
        let mut answer = Vec::new();
        let mut cache = self.cache(1)?;
        let mut logits = self.forward(prompt, &mut cache, 1)?;
        while answer.len() < options.max_new {
            let token = sample(&logits, options, &mut random);
            if options.stop_ids.contains(&token) {
                break;
            }
            answer.push(token);
            let room = self.max_positions().is_none_or(|most| cache.len() < most);
            if on_token(token).is_break() || !room || answer.len() == options.max_new {
                break;
            }
            logits = self.forward(&[token], &mut cache, 1)?;
        }
        Ok(answer)
    }

    /// The greedy answers to many prompts, in their order, without the tokens that ended them.
    ///
    /// Prompts of one length are read together, so no row is padded and none sees another.
    pub fn generate_batch(
        &mut self,
        prompts: &[Vec<u32>],
        max_new: usize,
        stop_ids: &[u32],
    ) -> Result<Vec<Vec<u32>>, Error> {
        let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (index, prompt) in prompts.iter().enumerate() {
            by_length.entry(prompt.len()).or_default().push(index);
        }
        let mut answers = vec![Vec::new(); prompts.len()];
        for (length, indices) in by_length {
            let most = (MAX_BATCH_TOKENS / length.max(1)).clamp(1, MAX_BATCH);
            for batch in indices.chunks(most) {
                let rows: Vec<&[u32]> = batch.iter().map(|&i| prompts[i].as_slice()).collect();
                let done = self.generate_rows(&rows, max_new, stop_ids)?;
                for (&index, answer) in batch.iter().zip(done) {
                    answers[index] = answer;
                }
            }
        }
        Ok(answers)
    }

    /// One batch of prompts of one length.
    fn generate_rows(
        &mut self,
        rows: &[&[u32]],
        max_new: usize,
        stop_ids: &[u32],
    ) -> Result<Vec<Vec<u32>>, Error> {
        let mut answers = vec![Vec::new(); rows.len()];
        // Rows still going on: the n-th of them is the n-th of the cache.
        let mut going: Vec<usize> = (0..rows.len()).collect();
        let mut cache = self.cache(rows.len())?;
        let mut logits = self.forward(&rows.concat(), &mut cache, 1)?;
        for made in 1..=max_new {
            let room = self.max_positions().is_none_or(|most| cache.len() < most);
            let mut kept = Vec::new();
            let mut next = Vec::new();
            for (n, row) in logits.chunks_exact(self.vocab_size()).enumerate() {
                let token = greedy(row);
                if stop_ids.contains(&token) {
                    continue;
                }
                answers[going[n]].push(token);
                kept.push(n);
                next.push(token);
            }
            if made == max_new || !room || kept.is_empty() {
                break;
            }
            if kept.len() < going.len() {
                going = kept.iter().map(|&n| going[n]).collect();
                cache.keep(&kept)?;
            }
            logits = self.forward(&next, &mut cache, 1)?;
        }
        Ok(answers)
    }
}
