//! How far two models agree on what comes next.

/// Over positions: the mean of KL(expected ‖ found), and how often both find the same token most likely.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// In nats.
    pub kl: f64,
    pub top1: f64,
}

impl Agreement {
    /// Of logits \[positions, vocab\].
    pub fn of(expected: &[f32], found: &[f32], vocab: usize) -> Self {
        let positions = expected.len() / vocab;
        let (mut sum, mut same) = (0.0, 0);
        for (expected, found) in expected.chunks_exact(vocab).zip(found.chunks_exact(vocab)) {
            let [expected, found] = [expected, found].map(log_softmax);
            sum += kl(&expected, &found);
            same += usize::from(top(&expected) == top(&found));
        }
        let kl = sum / positions as f64;
        // What is below zero is rounding; what is no number stays none.
        let kl = if kl < 0.0 { 0.0 } else { kl };
        Self { kl, top1: same as f64 / positions as f64 }
    }
}

/// Over the vocabulary, summed in f64.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - highest).exp()).sum();
    let norm = highest + sum.ln();
    logits.iter().map(|&l| (f64::from(l) - norm) as f32).collect()
}

/// Σ p · (ln p − ln q), of logarithms.
pub fn kl(expected: &[f32], found: &[f32]) -> f64 {
    let term = |(&p, &q): (&f32, &f32)| match f64::from(p).exp() {
        0.0 => 0.0,
        share => share * (f64::from(p) - f64::from(q)),
    };
    expected.iter().zip(found).map(term).sum()
}

/// The most likely token, the lowest where two are equal.
pub fn top(logs: &[f32]) -> usize {
    let mut best = 0;
    for (id, &log) in logs.iter().enumerate() {
        if log > logs[best] {
            best = id;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_by_hand() {
        let even = [0.0, 0.0, 1.0, 1.0];
        let same = Agreement::of(&even, &even, 2);
        assert_eq!(same, Agreement { kl: 0.0, top1: 1.0 });
        // Half and half against three to one: ½ ln(½ / ¾) + ½ ln(½ / ¼).
        let odd = [0.0, 3.0f32.ln()];
        let found = Agreement::of(&even[..2], &odd, 2);
        assert!((found.kl - 0.143_841).abs() < 1e-6, "{}", found.kl);
        assert_eq!(found.top1, 0.0);
        assert!(Agreement::of(&even[..2], &[f32::NAN, 0.0], 2).kl.is_nan());
    }
}
