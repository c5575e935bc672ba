//! What the model's matrices are multiplied with when it reads rows of the training data, for
//! `quality = "calibrated"`.
//!
//! Knows nothing of quantisation. The forward pass is `reference`'s, of the checkpoint as it is.

use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype, Weights};
use graph::Calibration;
use serde::Deserialize;
use step::Failure;
use step::digest::BlobDigest;
use step::worker::{Input, Job, Progress};

/// Tokens that are read.
const TOKENS: usize = 8192;

/// What is seen over rows from all parts of the split `train` of the job's `dataset`, if it has one.
pub fn run(job: &Job, config: &Config, max_positions: usize) -> Result<Option<Calibration>> {
    let Some(dataset) = job.inputs("dataset").first() else { return Ok(None) };
    let model = job.input("model")?;
    same_tokenizer(dataset, model)?;
    let rows = rows(dataset, config.vocab_size, max_positions)?;
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let tokens: usize = rows.iter().map(|row| row.len()).sum();
    job.note(format!("calibrated with {tokens} tokens of {} rows", rows.len()));
    let weights = Weights::open(&model.path).map_err(Failure::from)?;
    let dir = job.scratch().join("calibration");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut calibration = Calibration::new(&dir);
    let mut added = Ok(());
    let mut see = |name: &str, x: &[f32]| {
        if added.is_ok() && calibration.wants(name) {
            let columns = x.len() / tokens;
            added = match names::is_linear(name) {
                true => calibration.add(name, &reference::products(x, columns)),
                false => calibration.add_diagonal(name, &squares(x, columns)),
            };
        }
    };
    let mut progress = |done: usize, total: usize| {
        job.progress(Progress {
            phase: "calibrating".into(),
            done: done as u64,
            total: total as u64,
            unit: "layers".into(),
            values: Default::default(),
        });
    };
    reference::inputs(config, &weights, &rows, &mut see, &mut progress).map_err(Failure::from)?;
    added.map_err(Failure::from)?;
    Ok(Some(calibration))
}

/// The mean square of each column of \[T, in\].
fn squares(x: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0f64; columns];
    for x in x.chunks_exact(columns) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(x * x));
    }
    sums.iter().map(|sum| (sum * columns as f64 / x.len() as f64) as f32).collect()
}

/// Fails if `dataset` was tokenised by another tokenizer than the one that lies in `model`.
fn same_tokenizer(dataset: &Input, model: &Input) -> Result<()> {
    #[derive(Deserialize)]
    struct About {
        tokenizer: BlobDigest,
    }
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let path = dataset.path.join("dataset.json");
    let about: About = serde_json::from_slice(&read(&path)?)
        .map_err(|e| Failure::bug(format!("{} does not parse: {e}", path.display())))?;
    if about.tokenizer == BlobDigest::of(&read(&model.path.join("tokenizer.json"))?) {
        return Ok(());
    }
    Err(Failure::input(format!(
        "{} was tokenised with another tokenizer.json than that of {}",
        dataset.origin, model.origin
    ))
    .hint("name the dataset that the model was trained on")
    .into())
}

/// At most [`TOKENS`] tokens, of rows that lie evenly in the split.
fn rows(dataset: &Input, vocab: usize, max_positions: usize) -> Result<Vec<Vec<u32>>> {
    let path = dataset.path.join("train.safetensors");
    let none = || {
        Failure::input(format!("{} has no rows to train on", dataset.origin))
            .hint("give its `split` a share for `train`")
    };
    if !path.exists() {
        return Err(none().into());
    }
    let wrong = |what: &str| Failure::bug(format!("{}: {what}", path.display()));
    let file = Weights::open_file(&path).map_err(Failure::from)?;
    let [ids, offsets] =
        [("input_ids", Dtype::I32), ("offsets", Dtype::I64)].map(|(name, kind)| {
            let tensor = file.get(name).map_err(Failure::from)?;
            if tensor.dtype == kind {
                Ok(tensor.data)
            } else {
                Err(wrong("tensors of other types"))
            }
        });
    let ids = ids?.as_chunks::<4>().0;
    let offsets: Vec<usize> =
        offsets?.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as usize).collect();
    if !offsets.is_sorted() || offsets.last().is_none_or(|last| *last != ids.len()) {
        return Err(wrong("`offsets` do not cut `input_ids`").into());
    }
    let count = offsets.len() - 1;
    let wanted = (TOKENS * count).div_ceil(ids.len().max(1)).clamp(1, count.max(1));
    let mut rows = Vec::new();
    let mut left = TOKENS;
    for row in (0..wanted).map(|i| i * count / wanted) {
        let all = &ids[offsets[row]..offsets[row + 1]];
        let most = left.min(max_positions);
        let row: Vec<u32> = all.iter().take(most).map(|b| i32::from_le_bytes(*b) as u32).collect();
        if row.iter().any(|id| *id as usize >= vocab) {
            return Err(wrong("a token that the model does not know").into());
        }
        left -= row.len();
        rows.push(row);
    }
    rows.retain(|row| !row.is_empty());
    if rows.is_empty() { Err(none().into()) } else { Ok(rows) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use checkpoint::weights::{Spec, Writer};
    use graph::{Meant, Options};
    use reference::{Agreement, Source};
    use serde_json::json;
    use step::Kind;

    use super::*;
    use crate::export::options;
    use crate::export::tests::job_of;
    use crate::parity::Rounded;

    const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}"#;

    fn golden(architecture: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/golden").join(architecture)
    }

    /// Rows of a language in which each word is likely to be followed by one of four.
    fn text(rows: usize, vocab: usize, seed: u32) -> Vec<Vec<u32>> {
        let mut x = seed;
        let mut next = |n: u32| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) % n
        };
        let row = |_| {
            let mut word = next(vocab as u32);
            let mut step = || {
                word = (word * 5 + 1 + next(4)) % vocab as u32;
                word
            };
            (0..24).map(|_| step()).collect()
        };
        (0..rows).map(row).collect()
    }

    /// A dataset of `rows` for the model in `dir/model`.
    fn dataset(dir: &Path, rows: &[Vec<u32>]) -> PathBuf {
        let folder = dir.join("dataset");
        std::fs::create_dir_all(&folder).unwrap();
        let about =
            json!({"format": 1, "tokenizer": BlobDigest::of(TOKENIZER.as_bytes()).to_string()});
        std::fs::write(folder.join("dataset.json"), about.to_string()).unwrap();
        let ids: Vec<u32> = rows.concat();
        let mut ends = vec![0i64];
        for row in rows {
            ends.push(ends[ends.len() - 1] + row.len() as i64);
        }
        let specs = vec![
            Spec::new("input_ids", Dtype::I32, &[ids.len()]),
            Spec::new("offsets", Dtype::I64, &[ends.len()]),
        ];
        let mut writer = Writer::create(&folder.join("train.safetensors"), specs).unwrap();
        for spec in writer.order() {
            let bytes: Vec<u8> = match spec.name.as_str() {
                "input_ids" => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
                _ => ends.iter().flat_map(|end| end.to_le_bytes()).collect(),
            };
            writer.write(&spec.name, &bytes).unwrap();
        }
        writer.finish().unwrap();
        folder
    }

    /// A copy of a golden model, with a tokenizer.
    fn model(dir: &Path, architecture: &str) -> PathBuf {
        let folder = dir.join("model");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden(architecture).join(name), folder.join(name)).unwrap();
        }
        std::fs::write(folder.join("tokenizer.json"), TOKENIZER).unwrap();
        folder
    }

    /// The mean divergence of rows that it was not calibrated with.
    fn loss(
        config: &Config,
        weights: &Weights,
        options: Options,
        seen: Option<&Calibration>,
    ) -> f64 {
        let rounded = Rounded(Meant::new(weights, config.hidden_size, options, seen).unwrap());
        let rows = text(32, config.vocab_size, 2);
        let kl = |row: &Vec<u32>| {
            let of =
                |source: &dyn Source| reference::logits(config, source, row, 0..row.len()).unwrap();
            Agreement::of(&of(weights), &of(&rounded), config.vocab_size).kl
        };
        rows.iter().map(kl).sum::<f64>() / rows.len() as f64
    }

    #[test]
    fn calibrated_loses_less_on_rows_that_it_has_not_seen() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-short"] {
            let dir = tempfile::tempdir().unwrap();
            let model = model(dir.path(), architecture);
            let config = Config::read(&model).unwrap();
            let weights = Weights::open(&model).unwrap();
            let rows = dataset(dir.path(), &text(100, config.vocab_size, 1));
            for symmetric in [true, false] {
                let [nearest, searched, calibrated] =
                    ["nearest", "searched", "calibrated"].map(|quality| {
                        let params = json!({
                            "dtype": "q4", "head_bits": 4, "symmetric": symmetric,
                            "quality": quality,
                        });
                        let mut given = vec![("model", Kind::Model, model.as_path())];
                        if quality == "calibrated" {
                            given.push(("dataset", Kind::Dataset, &rows));
                        }
                        let job = job_of(dir.path(), &given, params, "out", 1);
                        let options = options(&job.params().unwrap(), &config);
                        let seen = super::run(&job, &config, 64).unwrap();
                        loss(&config, &weights, options, seen.as_ref())
                    });
                // Random weights have nothing to spare; of trained ones half of the loss goes.
                assert!(
                    calibrated < 0.9 * searched.min(nearest),
                    "{architecture} {symmetric}: {nearest:.5} {searched:.5} {calibrated:.5}"
                );
            }
        }
    }

    #[test]
    fn the_folder_is_held_to_what_was_rounded() {
        for dtype in ["q4", "q4f16"] {
            let dir = tempfile::tempdir().unwrap();
            let model = model(dir.path(), "gemma3");
            let rows = dataset(dir.path(), &text(100, 40, 1));
            let params = json!({"dtype": dtype, "quality": "calibrated"});
            let [a, b] = ["once", "again"].map(|out| {
                let given = [("model", Kind::Model, &*model), ("dataset", Kind::Dataset, &*rows)];
                let job = job_of(dir.path(), &given, params.clone(), out, 1);
                crate::export::run(&job).unwrap();
                std::fs::read(job.out().join(format!("onnx/model_{dtype}.onnx_data"))).unwrap()
            });
            assert_eq!(a, b);
        }
    }

    #[test]
    fn rows_lie_evenly_and_are_no_more_than_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dataset(dir.path(), &text(3000, 40, 1));
        let path = folder.clone();
        let input = Input { label: "d".into(), kind: Kind::Dataset, path, origin: "d".into() };
        let all = text(3000, 40, 1);
        let taken = rows(&input, 40, 20).unwrap();
        assert_eq!(taken.len(), TOKENS.div_ceil(24));
        assert_eq!((&taken[0], &taken[1]), (&all[0][..20].to_vec(), &all[8][..20].to_vec()));
        assert!(taken.concat().len() <= TOKENS);
        let error = rows(&input, 39, 20).unwrap_err().to_string();
        assert!(error.contains("a token that the model does not know"), "{error}");
        std::fs::remove_file(folder.join("train.safetensors")).unwrap();
        let error = rows(&input, 40, 20).unwrap_err().to_string();
        assert!(error.contains("d has no rows to train on"), "{error}");
    }

    #[test]
    fn another_tokenizers_rows_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "llama");
        std::fs::write(model.join("tokenizer.json"), "another").unwrap();
        let rows = dataset(dir.path(), &text(1, 40, 1));
        let given = [("model", Kind::Model, &*model), ("dataset", Kind::Dataset, &*rows)];
        let params = json!({"dtype": "q4", "quality": "calibrated"});
        let error = crate::export::run(&job_of(dir.path(), &given, params, "out", 1)).unwrap_err();
        assert!(error.to_string().contains("another tokenizer.json"), "{error}");
    }
}
