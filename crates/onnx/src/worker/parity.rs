//! The finished folder held to the checkpoint: what ONNX Runtime computes of it after the same tokens.
//!
//! Two figures: how far the graph is from the checkpoint, which tells what its type loses; and how
//! far from what its own rounded weights give in plain f32, which nothing but rounding may explain.

use std::ops::Range;

use anyhow::Result;
use checkpoint::config::Config;
use checkpoint::weights::Weights;
use graph::{Calibration, Dtype, Meant};
use reference::{Agreement, Probe, Source};
use runtime::{Model, Runtime};
use step::Failure;
use step::worker::Job;

/// Tokens at the end of the row that are read one by one: on top of a cache of many tokens, and on top
/// of one that has grown. In 8 bits each costs as much as all others, for ONNX Runtime unpacks the head.
const ALONE: usize = 2;

/// Holds the folder in `job.out()` to the model that it was made of.
pub fn check(
    job: &Job,
    config: &Config,
    options: graph::Options,
    seen: Option<&Calibration>,
) -> Result<()> {
    let Found { whole, rounded } = compare(job, config, options, seen)?;
    job.metric("kl", whole.kl);
    job.metric("top1_agreement", whole.top1);
    let most = most(options.dtype);
    // A NaN is beyond any limit.
    if rounded.kl <= most {
        return Ok(());
    }
    let message = format!(
        "ONNX Runtime does not compute what the weights of {} say: KL = {:.2e}, of which rounding \
         explains {most:e}; {:.0} % of the likeliest tokens are the same",
        job.out().join(format!("onnx/model{}.onnx", options.dtype.suffix())).display(),
        rounded.kl,
        rounded.top1 * 100.0
    );
    let hint = match options.dtype {
        Dtype::Fp16 | Dtype::Q4f16 => {
            "16 bits may not hold what the model computes: export it as fp32, q4 or int8; \
             `parity = false` exports it as it is"
        }
        _ => "`parity = false` exports it as it is",
    };
    Err(Failure::bug(message).hint(hint).into())
}

/// What the graph computes beside the checkpoint, and beside the checkpoint with the graph's weights.
struct Found {
    whole: Agreement,
    rounded: Agreement,
}

fn compare(
    job: &Job,
    config: &Config,
    options: graph::Options,
    seen: Option<&Calibration>,
) -> Result<Found> {
    let dir = &job.input("model")?.path;
    let readable = Config { max_positions: options.max_positions, ..config.clone() };
    let Probe { ids, of, notes } = Probe::new(dir, &readable);
    notes.into_iter().for_each(|note| job.note(note));

    let runtime = Runtime::init(job.tool("onnxruntime")?).map_err(Failure::from)?;
    job.version("onnxruntime", runtime.version());
    let threads = job.threads_for(2 * config.parameters() as u64);
    let open = runtime::Options { threads, scratch: job.scratch() };
    let mut model = Model::open(job.out(), open).map_err(Failure::from)?;
    let alone = alone(config, ids.len());
    let found = model.logits_with_cache(&ids, of.len(), alone).map_err(Failure::from)?;
    drop(model);

    let weights = Weights::open(dir).map_err(Failure::from)?;
    let agreement = |source: &dyn Source| -> Result<Agreement> {
        let logits = reference::logits(config, source, &ids, of.clone()).map_err(Failure::from)?;
        Ok(Agreement::of(&logits, &found, config.vocab_size))
    };
    let whole = agreement(&weights)?;
    let rounded = match options.dtype {
        Dtype::Fp32 => whole,
        _ => {
            let meant = Meant::new(&weights, config.hidden_size, options, seen);
            agreement(&Rounded(meant.map_err(Failure::from)?))?
        }
    };
    Ok(Found { whole, rounded })
}

/// How many tokens to read one by one. A cache does not outlive a change of LongRope's factors.
fn alone(config: &Config, length: usize) -> usize {
    match config.rotary(config.rope_theta).short {
        Some((_, most)) if (length.saturating_sub(ALONE)..length).contains(&most) => {
            length - most - 1
        }
        _ => ALONE,
    }
}

/// Nats: what sums in another order, and in 16 bits, make of the same weights. Ten times what was seen.
const fn most(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Fp32 | Dtype::Q4 | Dtype::Int8 => 1e-5,
        Dtype::Fp16 | Dtype::Q4f16 => 1e-3,
    }
}

pub(crate) struct Rounded<'a>(pub Meant<'a>);

impl Source for Rounded<'_> {
    fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), checkpoint::Error> {
        self.0.rows(name, rows, out)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use checkpoint::names;
    use checkpoint::weights::{Dtype as Stored, Spec, Writer};
    use serde_json::json;

    use super::*;
    use crate::export::tests::job;
    use crate::export::{options, run};

    const ARCHITECTURES: [&str; 7] =
        ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-short"];

    const DTYPES: [&str; 5] = ["fp32", "fp16", "q4", "q4f16", "int8"];

    fn golden(architecture: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/golden").join(architecture)
    }

    #[test]
    fn each_architecture_is_what_its_weights_say() {
        for architecture in ARCHITECTURES {
            for dtype in DTYPES {
                let dir = tempfile::tempdir().unwrap();
                let params = json!({ "dtype": dtype });
                let job = job(dir.path(), &golden(architecture), params, "out");
                run(&job).unwrap();
                let config = Config::read(&golden(architecture)).unwrap();
                let options = options(&job.params().unwrap(), &config);
                let found = compare(&job, &config, options, None).unwrap();
                // Ten times less than what the gate lets through.
                let most = most(options.dtype) / 10.0;
                assert!(found.rounded.kl < most, "{architecture} {dtype}: {:?}", found.rounded);
                // Fewer bits mean something else, which the gate does not mistake for wrong.
                let is_quantised = matches!(dtype, "q4" | "q4f16" | "int8");
                assert_eq!(found.whole.kl > most, is_quantised, "{architecture} {dtype}");
            }
        }
    }

    /// A folder of `architecture` with another norm: what is a multiple of the first may be normed away.
    fn other(architecture: &str, dir: &Path) -> PathBuf {
        let from = golden(architecture);
        let dir = dir.join("other");
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
        let weights = Weights::open(&from).unwrap();
        let spec = |name| Spec::new(name, Stored::F32, &weights.get(name).unwrap().shape);
        let specs = weights.names().map(spec).collect();
        let mut writer = Writer::create(&dir.join("model.safetensors"), specs).unwrap();
        for spec in writer.order() {
            let is_norm = spec.name == names::layer(0, "input_layernorm");
            let mut values = weights.get(&spec.name).unwrap().to_f32().unwrap();
            if is_norm {
                values.iter_mut().step_by(2).for_each(|x| *x += 0.5);
            }
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.write(&spec.name, &bytes).unwrap();
        }
        writer.finish().unwrap();
        dir
    }

    fn checked(job: &Job) -> Result<()> {
        let config = Config::read(&job.input("model")?.path)?;
        check(job, &config, options(&job.params()?, &config), None)
    }

    #[test]
    fn another_checkpoints_norm_is_noticed() {
        for architecture in ARCHITECTURES {
            for dtype in ["fp16", "q4"] {
                let dir = tempfile::tempdir().unwrap();
                let params = json!({ "dtype": dtype });
                let other = other(architecture, dir.path());
                run(&job(dir.path(), &other, params.clone(), "out")).unwrap();
                let error = checked(&job(dir.path(), &golden(architecture), params, "out"));
                let error = error.expect_err(architecture).to_string();
                assert!(error.contains("does not compute what the weights of"), "{error}");
                assert!(error.contains("KL = "), "{error}");
            }
        }
    }

    #[test]
    fn damaged_data_is_noticed() {
        for (dtype, name) in [("fp32", "model"), ("q4", "model_q4"), ("int8", "model_int8")] {
            let dir = tempfile::tempdir().unwrap();
            let job = job(dir.path(), &golden("qwen3"), json!({ "dtype": dtype }), "out");
            run(&job).unwrap();
            let data = job.out().join(format!("onnx/{name}.onnx_data"));
            let mut bytes = std::fs::read(&data).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle..middle + 64].reverse();
            std::fs::write(&data, bytes).unwrap();
            assert!(checked(&job).is_err(), "{dtype}");
        }
    }

    /// One token more than LongRope's short factors are for, and the cache is of no use.
    #[test]
    fn nothing_is_asked_of_a_cache_that_ends() {
        let mut config = Config::read(&golden("phi3")).unwrap();
        for (length, expected) in [(16, ALONE), (17, 0), (18, 1), (19, ALONE)] {
            assert_eq!(alone(&config, length), expected, "{length}");
        }
        config.rope_scaling = None;
        assert_eq!(alone(&config, 18), ALONE);
    }
}
