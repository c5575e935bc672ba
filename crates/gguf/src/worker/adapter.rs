//! The work of `gguf/adapter`: each A and B by the name of the matrix that they change, as
//! convert_lora_to_gguf.py writes them.
//!
//! llama.cpp multiplies B·A by alpha / rank, of one alpha for all. Where modules have others, or
//! alpha is divided by the root of the rank, what is left over goes into B.

use std::collections::BTreeMap;

use anyhow::Result;
use checkpoint::adapter::{Adapter, Delta};
use checkpoint::config::Config;
use gguf::adapter::{Adapter as Params, Dtype};
use gguf::export::Quant;
use step::Failure;
use step::worker::Job;

use crate::encode::{self, Wrong};
use crate::format::{Info, Type, Value, Writer};
use crate::keys;
use crate::tensors::{self, Tensor};

pub fn run(job: &Job) -> Result<()> {
    let params: Params = job.params()?;
    let (input, base) = (job.input("adapter")?, job.input("base")?);
    let config = Config::read(&base.path).map_err(|e| e.called(&base.path, &base.origin))?;
    keys::refuse(&config, &base.path.join("config.json"))?;
    let adapter = Adapter::read(&input.path).map_err(|e| e.called(&input.path, &input.origin))?;
    adapter.check(&config).map_err(|e| e.called(&input.path, &input.origin))?;
    let (kind, quant) = match params.dtype {
        Dtype::Float32 => (Type::F32, Quant::F32),
        Dtype::Float16 => (Type::F16, Quant::F16),
    };
    let changed: Vec<(Tensor, &Delta)> = tensors::plan(&config, quant)
        .into_iter()
        .filter_map(|tensor| {
            let delta = adapter.deltas.get(&tensor.source)?;
            Some((tensor, delta))
        })
        .collect();

    let alpha = alpha(changed.iter().map(|(_, delta)| *delta));
    let text = |text: &str| Value::Text(text.into());
    let keys = [
        ("general.architecture", text(keys::architecture(&config))),
        ("general.type", text("adapter")),
        ("general.file_type", Value::U32(crate::mix::file_type(quant))),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha as f32)),
    ]
    .map(|(key, value)| (key.to_string(), value));
    let infos = changed.iter().flat_map(|(tensor, delta)| {
        let [out, width] = delta.shape();
        let info = |part, shape| {
            let name = format!("{}.lora_{part}", tensor.info.name);
            Info { name, shape, kind }
        };
        [info('a', vec![delta.rank, width]), info('b', vec![out, delta.rank])]
    });
    let path = job.out().join(format!("adapter-{}.gguf", kind.name()));
    let mut writer = Writer::create(&path, &keys, infos.collect())?;
    let mut folded = 0;
    for (tensor, delta) in &changed {
        let left = (own(delta) / alpha) as f32;
        folded += usize::from(left != 1.0);
        let rows = (0..delta.shape()[0]).map(|row| tensor.rows.source(row) * delta.rank);
        let b = rows.flat_map(|at| &delta.b[at..at + delta.rank]).map(|x| x * left);
        for values in [delta.a.clone(), b.collect()] {
            let mut bytes = vec![0; values.len() * kind.row_bytes(1)];
            encode::rows(&values, kind, &mut bytes).map_err(|wrong| failure(tensor, wrong))?;
            writer.write(&bytes)?;
        }
    }
    let bytes = writer.finish()?;
    if folded > 0 {
        job.note(format!(
            "llama.cpp knows one alpha, {alpha}, divided by the rank: in {folded} of {} modules B \
             holds the rest of the scale",
            changed.len()
        ));
    }
    if adapter.untrained() {
        job.note("the adapter was never trained: all of its B matrices are zero");
    }
    job.metric("modules", changed.len() as f64);
    job.metric("bytes", bytes as f64);
    Ok(())
}

/// The alpha that would give a change its scale.
fn own(delta: &Delta) -> f64 {
    delta.scale * delta.rank as f64
}

/// What most changes have, the first of them where several do.
fn alpha<'a>(deltas: impl Iterator<Item = &'a Delta>) -> f64 {
    // Count, and the place of the first from the end.
    let mut counts: BTreeMap<u32, (usize, usize, f64)> = BTreeMap::new();
    for (at, delta) in deltas.enumerate() {
        let alpha = own(delta);
        let entry = counts.entry((alpha as f32).to_bits());
        entry.or_insert((0, usize::MAX - at, alpha)).0 += 1;
    }
    let most = counts.into_values().max_by_key(|(count, place, _)| (*count, *place));
    // For llama.cpp an alpha of zero is none, and then the scale is one.
    most.map(|(_, _, alpha)| alpha).filter(|alpha| *alpha != 0.0).unwrap_or(1.0)
}

fn failure(tensor: &Tensor, wrong: Wrong) -> Failure {
    let (Wrong::TooLarge { value, .. } | Wrong::NotFinite { value, .. }) = wrong;
    Failure::input(format!("the change of `{}` holds {value}", tensor.source))
        .hint("write it with dtype = \"float32\"; if it is no number there, training diverged")
}

#[cfg(test)]
pub mod tests {
    use std::path::{Path, PathBuf};

    use serde_json::json;
    use step::Kind;
    use step::worker::{Input, Mode, Request};

    use super::*;
    use crate::read::Written;

    const MERGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../merge/tests/golden");
    const TRAIN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../train/src/worker/golden");

    /// A golden adapter: its base's config, itself, and the file of it.
    pub fn golden(architecture: &str, which: &str, dir: &Path) -> (Config, Adapter, PathBuf) {
        let folder = Path::new(MERGE).join(architecture).join(which);
        let mut base = Path::new(TRAIN).join(architecture);
        if architecture == "gemma3" {
            // llama.cpp divides by √16 alone.
            let text = std::fs::read_to_string(base.join("config.json")).unwrap();
            let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
            config["query_pre_attn_scalar"] = json!(16);
            base = dir.join("base");
            std::fs::create_dir(&base).unwrap();
            std::fs::write(base.join("config.json"), config.to_string()).unwrap();
        }
        let input = |kind, path: &Path| {
            vec![Input { label: "x".into(), kind, path: path.into(), origin: "x".into() }]
        };
        let inputs = [
            ("adapter".to_string(), input(Kind::Adapter, &folder)),
            ("base".to_string(), input(Kind::Model, &base)),
        ];
        let request = Request {
            format: 1,
            step: "gguf/adapter".into(),
            mode: Mode::Build,
            params: json!({"dtype": "float32"}),
            inputs: inputs.into(),
            out: dir.into(),
            report: dir.into(),
            scratch: dir.into(),
            tools: BTreeMap::new(),
            threads: 1,
        };
        run(&Job::new(request, std::io::sink())).unwrap();
        let adapter = Adapter::read(&folder).unwrap();
        (Config::read(&base).unwrap(), adapter, dir.join("adapter-F32.gguf"))
    }

    /// `second` has other ranks and alphas for some modules, and divides by the root of the rank.
    #[test]
    fn each_change_is_that_of_peft() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"] {
            for which in ["first", "second"] {
                let dir = tempfile::tempdir().unwrap();
                let (config, adapter, path) = golden(architecture, which, dir.path());
                let plan = tensors::plan(&config, Quant::F32);
                let changed = plan.iter().filter_map(|t| adapter.deltas.get(&t.source));
                let alpha = super::alpha(changed);
                assert!(which == "second" || alpha == 6.0, "{alpha}");
                let file = Written::open(&path).unwrap();
                let mut seen = 0;
                for tensor in &plan {
                    let Some(delta) = adapter.deltas.get(&tensor.source) else { continue };
                    seen += 1;
                    let [out, _] = delta.shape();
                    let (mut a, mut b) = (vec![0.0; delta.a.len()], vec![0.0; delta.b.len()]);
                    let name = &tensor.info.name;
                    file.rows(&format!("{name}.lora_a"), 0..delta.rank, &mut a).unwrap();
                    file.rows(&format!("{name}.lora_b"), 0..out, &mut b).unwrap();
                    assert_eq!(a, delta.a, "{architecture} {name}");
                    let scale = alpha / delta.rank as f64;
                    for (row, found) in b.chunks(delta.rank).enumerate() {
                        let at = tensor.rows.source(row) * delta.rank;
                        for (found, x) in found.iter().zip(&delta.b[at..]) {
                            let (found, x) =
                                (f64::from(*found) * scale, f64::from(*x) * delta.scale);
                            assert!((found - x).abs() <= 1e-6 * x.abs(), "{architecture} {name}");
                        }
                    }
                }
                assert_eq!(seen, adapter.deltas.len());
            }
        }
    }
}
