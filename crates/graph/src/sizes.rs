//! How many bytes a graph's tensors take, by the shapes alone.

use checkpoint::config::Config;
use checkpoint::names;

use crate::quantise::{Scheme, Schemes};
use crate::{Error, Options};

/// Bytes of the embedding (with a tied head), of linear layers and a head of its own, of all else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    pub embedding: u64,
    pub linear: u64,
    pub other: u64,
}

impl Sizes {
    /// Of a graph that [`crate::write`] would write.
    pub fn of(config: &Config, options: Options) -> Result<Self, Error> {
        let Schemes { linear, head } = Schemes::new(config.hidden_size, options)?;
        let float = if options.dtype.is_half() { 2 } else { 4 };
        let matrix = |scheme: Option<Scheme>, rows: usize, columns: usize| match scheme {
            None => rows * columns * float,
            Some(scheme) => {
                let blocks = scheme.blocks(columns);
                let zeros = if scheme.symmetric { 0 } else { scheme.zeros_width(columns) };
                rows * (blocks * (scheme.width() + float) + zeros)
            }
        };
        let mut sizes = [0; 3];
        for (name, shape) in names::expected(config) {
            let (part, bytes) = match shape[..] {
                [rows, columns] if name == names::EMBED => (0, matrix(head, rows, columns)),
                [rows, columns] if name == names::LM_HEAD => (1, matrix(head, rows, columns)),
                [rows, columns] => (1, matrix(linear, rows, columns)),
                // Norms are f32 in any graph.
                _ if name.ends_with("norm.weight") => (2, 4 * shape[0]),
                _ => (2, float * shape[0]),
            };
            sizes[part] += bytes as u64;
        }
        for theta in [Some(config.rope_theta), config.rope_theta_near].into_iter().flatten() {
            let rotary = config.rotary(theta);
            let rows = match rotary.short {
                // Those for short rows stand above those for longer ones.
                Some((_, most)) if most < options.max_positions => most + options.max_positions,
                _ => options.max_positions,
            };
            sizes[2] += (2 * rows * rotary.frequencies.len() * float) as u64;
        }
        let [embedding, linear, other] = sizes;
        Ok(Self { embedding, linear, other })
    }

    pub fn all(self) -> u64 {
        self.embedding + self.linear + self.other
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{CHUNK, Dtype, Quantisation};

    #[test]
    fn sizes_are_what_is_written() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/golden");
        for name in ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-short"] {
            let model = golden.join(name);
            let config = Config::read(&model).unwrap();
            for dtype in [Dtype::Fp32, Dtype::Fp16, Dtype::Int8, Dtype::Q4, Dtype::Q4f16] {
                for (block, symmetric, head_bits) in [(32, true, 8), (128, false, 4)] {
                    let quantisation = Quantisation { block, symmetric, head_bits, search: false };
                    let options = Options { dtype, quantisation, max_positions: 20, chunk: CHUNK };
                    let dir = tempfile::tempdir().unwrap();
                    let written =
                        crate::write(&model, dir.path(), options, &mut |_, _| ()).unwrap();
                    assert_eq!(
                        written.sizes,
                        Sizes::of(&config, options).unwrap(),
                        "{name} {dtype:?}"
                    );
                }
            }
        }
    }
}
