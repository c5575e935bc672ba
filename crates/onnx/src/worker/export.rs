//! `onnx/export`: the graph, and around it the folder that Transformers.js expects.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::chat;
use checkpoint::config::Config;
use graph::Sizes;
use onnx::export::{Dtype, Export, Quality};
use serde_json::{Value, json};
use step::Failure;
use step::worker::{Job, Progress};

use crate::{calibration, parity};

pub fn run(job: &Job) -> Result<()> {
    let params: Export = job.params()?;
    let model = &job.input("model")?.path;
    let config = Config::read(model).map_err(Failure::from)?;
    let options = options(&params, &config);
    let max_positions = options.max_positions;
    if max_positions < config.max_positions {
        job.note(format!(
            "the graph reads {max_positions} positions, the model {}; `max_positions` sets it",
            config.max_positions
        ));
    }

    let onnx = job.out().join("onnx");
    std::fs::create_dir(&onnx).with_context(|| format!("cannot create {}", onnx.display()))?;
    let seen = calibration::run(job, &config, max_positions)?;
    let seen = seen.as_ref();
    let written = graph::write_for(model, &onnx, options, seen, &mut |done, total| {
        job.progress(Progress {
            phase: format!("writing {}", params.dtype.name()),
            done: done as u64,
            total: total as u64,
            unit: "layers".into(),
            values: Default::default(),
        });
    })
    .map_err(Failure::from)?;

    checkpoint::copy_companions(model, job.out()).map_err(Failure::from)?;
    let graph_name = written.graph.file_name().expect("a graph has a name").to_string_lossy();
    write_config(model, job.out(), params.dtype, &graph_name, written.chunks, max_positions)?;
    let ends = ends(model)?;
    write_generation_config(model, job.out(), &ends)?;
    write_genai_config(job.out(), &config, &graph_name, max_positions, &ends)?;

    if params.parity {
        parity::check(job, &config, options, seen)?;
    }

    let Sizes { embedding, linear, other } = written.sizes;
    let total = written.sizes.all() as f64;
    job.metric("bytes", total);
    job.metric("bits_per_weight", total * 8.0 / config.parameters() as f64);
    for (part, bytes) in [("embedding", embedding), ("linear", linear), ("other", other)] {
        job.metric(&format!("bytes_{part}"), bytes as f64);
    }
    let report = report(&config, written.sizes, options)?;
    Ok(std::fs::write(job.report().join("report.md"), report)?)
}

/// Where the bytes are, and what the model would weigh in other types.
fn report(config: &Config, sizes: Sizes, options: graph::Options) -> Result<String, Failure> {
    let all = sizes.all();
    let mut text = format!("# ONNX\n\n{all} bytes of tensors.\n\n| part | bytes | share |\n");
    text += "|---|---:|---:|\n";
    let parts = [
        (if config.tied { "embedding and head" } else { "embedding" }, sizes.embedding),
        (if config.tied { "linear layers" } else { "linear layers and head" }, sizes.linear),
        ("norms, biases, rotary tables", sizes.other),
    ];
    for (part, bytes) in parts {
        let share = bytes as f64 / all as f64 * 100.0;
        _ = writeln!(text, "| {part} | {bytes} | {share:.1} % |");
    }
    text += "\nThey would weigh\n\n| dtype | bytes | bits a weight |\n|---|---:|---:|\n";
    for (dtype, ours) in DTYPES {
        let bytes = Sizes::of(config, graph::Options { dtype: ours, ..options })?.all();
        let bits = bytes as f64 * 8.0 / config.parameters() as f64;
        _ = writeln!(text, "| {} | {bytes} | {bits:.2} |", dtype.name());
    }
    Ok(text)
}

/// The largest first.
const DTYPES: [(Dtype, graph::Dtype); 5] = [
    (Dtype::Fp32, graph::Dtype::Fp32),
    (Dtype::Fp16, graph::Dtype::Fp16),
    (Dtype::Int8, graph::Dtype::Int8),
    (Dtype::Q4, graph::Dtype::Q4),
    (Dtype::Q4f16, graph::Dtype::Q4f16),
];

pub(crate) fn options(params: &Export, config: &Config) -> graph::Options {
    let known = DTYPES.iter().find(|(dtype, _)| *dtype == params.dtype);
    let dtype = known.expect("each has a graph's").1;
    let quantisation = graph::Quantisation {
        block: params.block_size as usize,
        symmetric: params.symmetric,
        head_bits: params.head_bits,
        search: params.quality != Quality::Nearest,
    };
    let max_positions = config.max_positions.min(params.max_positions as usize);
    graph::Options { dtype, quantisation, max_positions, chunk: graph::CHUNK }
}

/// The model's own config.json, with what Transformers.js wants to know of the graph beside it.
fn write_config(
    model: &Path,
    out: &Path,
    dtype: Dtype,
    graph: &str,
    chunks: usize,
    max_positions: usize,
) -> Result<()> {
    let mut config = read(&model.join("config.json"))?;
    config["max_position_embeddings"] = json!(max_positions);
    config["transformers.js_config"] =
        json!({ "dtype": dtype.name(), "use_external_data_format": { graph: chunks } });
    write(&out.join("config.json"), &config)
}

/// Every token that ends an answer: the base's, and the end of a turn by the chat template.
fn ends(model: &Path) -> Result<Vec<u32>> {
    match model.join("tokenizer.json").exists() {
        true => Ok(chat::end_ids(model).map_err(Failure::from)?),
        false => Ok(Vec::new()),
    }
}

/// The model's own generation_config.json, in which every token that ends an answer is named.
fn write_generation_config(model: &Path, out: &Path, ends: &[u32]) -> Result<()> {
    let path = model.join("generation_config.json");
    let mut config = if path.exists() { read(&path)? } else { json!({}) };
    if !ends.is_empty() {
        config["eos_token_id"] = json!(ends);
    }
    write(&out.join("generation_config.json"), &config)
}

/// What onnxruntime-genai wants to know, so that it runs the folder as it is.
fn write_genai_config(
    out: &Path,
    config: &Config,
    graph: &str,
    max_positions: usize,
    ends: &[u32],
) -> Result<()> {
    let ends = if ends.is_empty() { &config.eos_token_ids } else { ends };
    let mut model = json!({
        "type": config.architecture.model_type(),
        "vocab_size": config.vocab_size,
        "context_length": max_positions,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id.or(ends.first().copied()).unwrap_or(0),
        "decoder": {
            "filename": format!("onnx/{graph}"),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_size": config.head_dim,
            "session_options": {},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    });
    if let Some(bos) = config.bos_token_id {
        model["bos_token_id"] = json!(bos);
    }
    let search = json!({ "max_length": max_positions, "past_present_share_buffer": true });
    let path = out.join("genai_config.json");
    write(&path, &json!({ "model": model, "search": search }))
}

fn read(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value = serde_json::from_slice(&bytes);
    Ok(value.map_err(|e| Failure::input(format!("{} is no JSON: {e}", path.display())))?)
}

fn write(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use checkpoint::names;
    use checkpoint::weights::{Dtype as Stored, Spec, Writer};
    use step::Kind;
    use step::worker::{Input, Mode, Request};

    use super::*;

    /// A model folder whose weights are `value(i)`.
    fn model(dir: &Path, value: impl Fn(usize) -> f32) -> PathBuf {
        let dir = dir.join("model");
        std::fs::create_dir_all(&dir).unwrap();
        let config = json!({
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "intermediate_size": 64, "vocab_size": 50, "tie_word_embeddings": true,
            "max_position_embeddings": 128, "eos_token_id": 2
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        std::fs::write(dir.join("LICENSE"), "none").unwrap();
        let config = Config::read(&dir).unwrap();
        let specs = names::expected(&config)
            .into_iter()
            .map(|(name, shape)| Spec::new(name, Stored::F32, &shape))
            .collect();
        let mut writer = Writer::create(&dir.join("model.safetensors"), specs).unwrap();
        for spec in writer.order() {
            let data: Vec<u8> = (0..spec.size() / 4).flat_map(|i| value(i).to_le_bytes()).collect();
            writer.write(&spec.name, &data).unwrap();
        }
        writer.finish().unwrap();
        dir
    }

    /// A job that exports `model` to the folder `out` in `dir`.
    pub(crate) fn job(dir: &Path, model: &Path, params: Value, out: &str) -> Job {
        job_of(dir, &[("model", Kind::Model, model)], params, out, 1)
    }

    /// A job with these inputs and so many threads.
    pub(crate) fn job_of(
        dir: &Path,
        inputs: &[(&str, Kind, &Path)],
        params: Value,
        out: &str,
        threads: usize,
    ) -> Job {
        let folder = |name: &str| {
            let path = dir.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let library = std::env::var_os("ORT_DYLIB_PATH")
            .expect("ORT_DYLIB_PATH: libonnxruntime, or the folder that it lies in");
        let inputs = inputs.iter().map(|(name, kind, path)| {
            let path = path.to_path_buf();
            let input =
                Input { label: "merged".into(), kind: *kind, path, origin: "merged".into() };
            (name.to_string(), vec![input])
        });
        let request = Request {
            format: 1,
            step: "onnx/export".into(),
            mode: Mode::Build,
            params,
            inputs: inputs.collect(),
            out: folder(out),
            report: folder("report"),
            scratch: folder("scratch"),
            tools: BTreeMap::from([("onnxruntime".into(), library.into())]),
            threads,
        };
        Job::new(request, std::io::sink())
    }

    fn export(dir: &Path, model: &Path, params: Value, out: &str) -> Result<PathBuf, String> {
        let job = job(dir, model, params, out);
        run(&job).map_err(|e| format!("{e:#}"))?;
        Ok(job.out().into())
    }

    fn wave(i: usize) -> f32 {
        (i as f32 * 0.37).sin()
    }

    #[test]
    fn the_folder_is_what_transformers_js_expects() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), wave);
        let params = json!({"dtype": "q4", "max_positions": 64});
        let out = export(dir.path(), &model, params.clone(), "out").unwrap();
        let config = read(&out.join("config.json")).unwrap();
        assert_eq!(
            config["transformers.js_config"]["use_external_data_format"],
            json!({"model_q4.onnx": 1})
        );
        assert_eq!(config["max_position_embeddings"], 64);
        assert!(out.join("LICENSE").exists());
        let again = export(dir.path(), &model, params, "again").unwrap();
        for name in ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "generation_config.json"] {
            let [a, b] = [&out, &again].map(|d| std::fs::read(d.join(name)).unwrap());
            assert_eq!(a, b, "{name}");
        }
    }

    #[test]
    fn each_type_has_the_name_that_transformers_js_looks_for() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), wave);
        for (dtype, suffix) in
            [("fp32", ""), ("fp16", "_fp16"), ("q4", "_q4"), ("q4f16", "_q4f16"), ("int8", "_int8")]
        {
            let out =
                export(dir.path(), &model, json!({"dtype": dtype, "max_positions": 64}), dtype);
            let out = out.unwrap();
            for end in ["onnx", "onnx_data"] {
                assert!(out.join(format!("onnx/model{suffix}.{end}")).exists(), "{dtype}");
            }
            let genai = read(&out.join("genai_config.json")).unwrap();
            assert_eq!(genai["model"]["decoder"]["filename"], format!("onnx/model{suffix}.onnx"));
            assert_eq!(genai["model"]["eos_token_id"], json!([2]));
        }
    }

    #[test]
    fn infinite_weights_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), |i| if i == 7 { f32::INFINITY } else { 0.1 });
        let error = export(dir.path(), &model, json!({"dtype": "q4", "max_positions": 64}), "out");
        assert_eq!(
            error.unwrap_err(),
            "tensor `model.embed_tokens.weight` holds a value that is no number, or infinite: it cannot be exported"
        );
    }

    #[test]
    fn what_no_16_bits_hold_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), |i| if i == 7 { 1e5 } else { 0.1 });
        let params = |dtype| json!({"dtype": dtype, "max_positions": 64});
        let error = export(dir.path(), &model, params("fp16"), "fp16").unwrap_err();
        let named = "tensor `model.embed_tokens.weight` holds a value of more than 65504";
        assert!(error.contains(named), "{error}");
        assert!(export(dir.path(), &model, params("int8"), "int8").is_ok());
    }
}
