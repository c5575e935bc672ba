//! Picking the next token from a row of logits.
//!
//! Knows nothing of the model. The same logits, options and seed give the same token everywhere.

use crate::GenerateOptions;

/// The most likely token; the lowest id where two are equal.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// A token drawn as `options` say: the `top_k` most likely, of these the smallest set that holds
/// `top_p` of the probability, by their probabilities at `temperature`.
pub(crate) fn sample(logits: &[f32], options: &GenerateOptions, random: &mut Random) -> u32 {
    if options.temperature <= 0.0 {
        return greedy(logits);
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let likely_first =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if options.top_k > 0 && options.top_k < ids.len() {
        ids.select_nth_unstable_by(options.top_k - 1, likely_first);
        ids.truncate(options.top_k);
    }
    ids.sort_unstable_by(likely_first);

    let highest = f64::from(logits[ids[0] as usize]);
    let weight = |id: u32| {
        ((f64::from(logits[id as usize]) - highest) / f64::from(options.temperature)).exp()
    };
    let weights: Vec<f64> = ids.iter().map(|&id| weight(id)).collect();
    let mut kept: f64 = weights.iter().sum();
    let mut count = ids.len();
    if options.top_p < 1.0 {
        let wanted = kept * f64::from(options.top_p.max(0.0));
        kept = 0.0;
        count = 0;
        while count == 0 || (kept < wanted && count < ids.len()) {
            kept += weights[count];
            count += 1;
        }
    }
    let mut left = random.unit() * kept;
    for (&id, weight) in ids[..count].iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return id;
        }
    }
    ids[count - 1]
}

/// SplitMix64 (Steele, Lea and Flood 2014, figure 13): the stream belongs to the seed, whatever
/// version of whatever crate is linked.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1), with 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    /// Which tokens turn up in many draws.
    fn drawn(options: GenerateOptions) -> Vec<u32> {
        let mut random = Random::new(options.seed);
        let mut seen: Vec<u32> =
            (0..2000).map(|_| sample(&LOGITS, &options, &mut random)).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn options_limit_what_can_be_drawn() {
        let warm = GenerateOptions { temperature: 1.0, ..Default::default() };
        let cases = [
            (GenerateOptions::default(), vec![1]),
            (warm.clone(), vec![0, 1, 2, 3, 4]),
            (GenerateOptions { top_k: 1, ..warm.clone() }, vec![1]),
            (GenerateOptions { top_k: 3, ..warm.clone() }, vec![1, 2, 3]),
            // The probabilities are .397, .397, .146, .054, .007.
            (GenerateOptions { top_p: 0.5, ..warm.clone() }, vec![1, 3]),
            (GenerateOptions { top_p: 0.0, ..warm.clone() }, vec![1]),
            (GenerateOptions { temperature: 0.01, ..warm }, vec![1, 3]),
        ];
        for (options, expected) in cases {
            assert_eq!(drawn(options.clone()), expected, "{options:?}");
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let options = GenerateOptions { temperature: 1.0, ..Default::default() };
        let mut random = Random::new(7);
        let draws = 20_000;
        let hits = (0..draws).filter(|_| sample(&LOGITS, &options, &mut random) == 2).count();
        // softmax([1, 3, 2, 3, -1])[2]
        let expected = 0.1459;
        assert!((hits as f64 / f64::from(draws) - expected).abs() < 0.01, "{hits}");
    }

    /// The first outputs for seed 1234567, as published with the reference implementation.
    #[test]
    fn the_stream_is_splitmix64() {
        let mut random = Random::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            first,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }
}
