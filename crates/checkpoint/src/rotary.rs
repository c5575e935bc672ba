//! How fast the pairs of a head turn from one position to the next (Su et al., 2021), as
//! transformers' modeling_rope_utils.py has it, in f32.

use std::f32::consts::PI;

use crate::config::{Config, Llama3, RopeScaling};

/// Angles are position × frequency; cosines and sines are multiplied by `factor`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// One for each pair: [R/2].
    pub frequencies: Vec<f32>,
    /// LongRope's, of rows that are no longer than so many positions.
    pub short: Option<(Vec<f32>, usize)>,
    pub factor: f32,
}

impl Config {
    /// Of the layers whose positions turn by `theta`: `rope_theta`, or `rope_theta_near`.
    pub fn rotary(&self, theta: f64) -> Rotary {
        let pairs = self.rotary_dim / 2;
        let exponent = |pair: usize| (2 * pair) as f32 / self.rotary_dim as f32;
        let wavelengths: Vec<f32> =
            (0..pairs).map(|pair| (theta as f32).powf(exponent(pair))).collect();
        let plain = wavelengths.iter().map(|wave| 1.0 / wave);
        match &self.rope_scaling {
            None => Rotary { frequencies: plain.collect(), short: None, factor: 1.0 },
            Some(RopeScaling::Llama3(scaling)) => {
                let frequencies = plain.map(|frequency| stretched(frequency, scaling)).collect();
                Rotary { frequencies, short: None, factor: 1.0 }
            }
            Some(RopeScaling::LongRope(scaling)) => {
                let by = |factors: &[f64]| -> Vec<f32> {
                    let waves = wavelengths.iter().zip(factors);
                    waves.map(|(wave, factor)| 1.0 / (*factor as f32 * wave)).collect()
                };
                Rotary {
                    frequencies: by(&scaling.long_factor),
                    short: Some((by(&scaling.short_factor), scaling.original_max_positions)),
                    factor: scaling.attention_factor as f32,
                }
            }
        }
    }
}

/// Llama 3.1's: long waves are stretched by a factor, short ones are not, and those in between are
/// blended.
fn stretched(frequency: f32, scaling: &Llama3) -> f32 {
    let [factor, low, high, original] = [
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_positions,
    ]
    .map(|x| x as f32);
    let wave = 2.0 * PI / frequency;
    if wave < original / high {
        return frequency;
    }
    if wave > original / low {
        return frequency / factor;
    }
    let smooth = (original / wave - low) / (high - low);
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// From `ROPE_INIT_FUNCTIONS` of transformers 5.23.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let shape = r#""hidden_size":24,"num_hidden_layers":1,"num_attention_heads":4,"head_dim":8,
            "intermediate_size":40,"vocab_size":48,"max_position_embeddings":64"#;
        let llama3 = r#""model_type":"llama","rope_parameters":{"rope_type":"llama3",
            "rope_theta":100.0,"factor":4.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":16}"#;
        let longrope = r#""model_type":"phi3","original_max_position_embeddings":16,
            "rope_parameters":{"rope_type":"longrope","rope_theta":100.0,
            "partial_rotary_factor":0.75,"short_factor":[1.0,1.25,1.5],
            "long_factor":[1.5,3.0,4.5]}"#;
        for (rope, expected, short, factor) in [
            (r#""model_type":"llama","rope_theta":100.0"#, LLAMA, None, 1.0),
            (llama3, LLAMA_3, None, 1.0),
            (longrope, LONG, Some(SHORT), LONG_FACTOR),
        ] {
            let json = format!("{{{shape},{rope}}}");
            let config = Config::parse(&json, Path::new("config.json")).unwrap();
            let rotary = config.rotary(config.rope_theta);
            close(&rotary.frequencies, expected);
            assert_eq!(rotary.short.is_some(), short.is_some());
            if let (Some((found, most)), Some(expected)) = (&rotary.short, short) {
                close(found, expected);
                assert_eq!(*most, 16);
            }
            assert!((rotary.factor - factor).abs() < 1e-6, "{}", rotary.factor);
        }
    }

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{found} for {expected}");
        }
    }

    const LLAMA: &[f32] = &[1.0, 0.316_227_76, 0.1, 0.031_622_776];
    const LLAMA_3: &[f32] = &[0.636_619_75, 0.079_056_94, 0.025, 0.007_905_695];
    const SHORT: &[f32] = &[1.0, 0.172_354_76, 0.030_943_92];
    const LONG: &[f32] = &[0.666_666_7, 0.071_814_485, 0.010_314_64];
    const LONG_FACTOR: f32 = 1.224_744_9;
}
