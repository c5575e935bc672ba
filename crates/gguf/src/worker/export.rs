//! The work of `gguf/export`: keys from the folder's JSON, then tensor by tensor over mmap.
//!
//! Each row is encoded by one thread, so the bytes do not depend on how many there are. In memory
//! are the keys and a few MiB of rows, whatever the size of the model.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::config::Config;
use checkpoint::weights::{TensorRef, Weights};
use gguf::export::{Export, Quant};
use rayon::prelude::*;
use serde_json::Value as Json;
use step::Failure;
use step::worker::{Job, Progress};

use crate::encode::{self, Wrong};
use crate::format::{Info, Type, Value, Writer};
use crate::tensors::{self, Tensor};
use crate::tokenizer;

/// Values that are encoded at a time.
const PIECE: usize = 1 << 22;

pub fn run(job: &Job) -> Result<()> {
    let params: Export = job.params()?;
    let dir = &job.input("model")?.path;
    let config = Config::read(dir).map_err(Failure::from)?;
    config.exportable(&dir.join("config.json")).map_err(Failure::from)?;
    let weights = Weights::open(dir).map_err(Failure::from)?;
    weights.check(&config).map_err(Failure::from)?;
    let tokenizer = tokenizer::read(dir, &config)?;
    let tensors = tensors::plan(&config, params.quant);

    let name = model_name(dir)?;
    let mut keys = model_keys(&config, &name, params.quant)?;
    keys.extend(tokenizer.keys);
    let path = job.out().join(format!("{name}-{}.gguf", params.quant.name()));
    let infos: Vec<Info> = tensors.iter().map(|t| t.info.clone()).collect();
    let mut writer = Writer::create(&path, &keys, infos)?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(job.threads()).build()?;
    for (done, tensor) in tensors.iter().enumerate() {
        let source = weights.get(&tensor.source).map_err(Failure::from)?;
        threads.install(|| write(&mut writer, tensor, &source))?;
        job.progress(Progress {
            phase: "export".into(),
            done: done as u64 + 1,
            total: tensors.len() as u64,
            unit: "tensors".into(),
            ..Progress::default()
        });
    }
    let bytes = writer.finish()?;

    let fallbacks: Vec<&Info> =
        tensors.iter().map(|t| &t.info).filter(|i| fell_back(i, &params)).collect();
    let mut notes = tokenizer.notes;
    if let Some(first) = fallbacks.first() {
        notes.push(format!(
            "{} of {} tensors are F16: {} has rows of {} values, and {} packs them by 32",
            fallbacks.len(),
            tensors.len(),
            first.name,
            first.shape.last().copied().unwrap_or_default(),
            params.quant.name()
        ));
    }
    for note in &notes {
        job.note(note);
    }
    let of_tensors: usize = tensors.iter().map(|t| t.info.bytes()).sum();
    let bits = of_tensors as f64 * 8.0 / config.parameters() as f64;
    job.metric("bytes", bytes as f64);
    job.metric("bits_per_weight", bits);
    std::fs::write(job.report().join("report.md"), report(&tensors, bytes, bits, &notes))?;
    Ok(())
}

/// One tensor, a few rows at a time.
fn write(writer: &mut Writer, tensor: &Tensor, source: &TensorRef) -> Result<()> {
    let columns = tensor.info.shape.last().copied().unwrap_or(1);
    let rows = source.len() / columns;
    let kind = tensor.info.kind;
    let (in_bytes, out_bytes) = (columns * source.dtype.bitsize() / 8, kind.row_bytes(columns));
    let at_a_time = (PIECE / columns).clamp(1, rows);
    let mut piece = vec![0; at_a_time * out_bytes];
    for from in (0..rows).step_by(at_a_time) {
        let piece = &mut piece[..at_a_time.min(rows - from) * out_bytes];
        let wrong = piece
            .par_chunks_mut(out_bytes)
            .enumerate()
            .filter_map(|(at, out)| {
                let row = tensor.rows.source(from + at);
                let mut one = source.clone();
                one.shape = vec![columns];
                one.data = &source.data[row * in_bytes..][..in_bytes];
                // The type was checked when the folder was opened.
                let values = one.to_f32().expect("a type of the checkpoint's");
                encode::row(&values, kind, out).err().map(|wrong| (row, wrong))
            })
            .min_by_key(|(row, _)| *row);
        if let Some((row, wrong)) = wrong {
            return Err(failure(tensor, row, wrong).into());
        }
        writer.write(piece)?;
    }
    Ok(())
}

fn failure(tensor: &Tensor, row: usize, wrong: Wrong) -> Failure {
    let name = &tensor.source;
    let place = |column: usize| match tensor.info.shape.len() {
        1 => format!("[{column}]"),
        _ => format!("[{row}, {column}]"),
    };
    match wrong {
        Wrong::NotFinite { column, value } => {
            Failure::input(format!("`{name}` is {value} at {}", place(column)))
                .hint("the model is broken: look at the loss of the step that trained it")
        }
        Wrong::TooLarge { column, value } => Failure::input(format!(
            "`{name}` is {value} at {}: {} cannot hold it",
            place(column),
            tensor.info.kind.name()
        ))
        .hint("export with quant = \"F32\" or \"BF16\""),
    }
}

fn fell_back(info: &Info, params: &Export) -> bool {
    params.quant == Quant::Q8 && info.kind == Type::F16
}

/// The keys that say what the model is and how it computes.
fn model_keys(config: &Config, name: &str, quant: Quant) -> Result<Vec<(String, Value)>> {
    let architecture = config.architecture.model_type();
    let number = |what: usize| u32::try_from(what).map(Value::U32).context("beyond 32 bits");
    let file_type = match quant {
        Quant::F32 => 0,
        Quant::F16 => 1,
        Quant::Q8 => 7,
        Quant::BF16 => 32,
        other => anyhow::bail!(Failure::bug(format!("{} is not built", other.name()))),
    };
    let general = [
        ("architecture", Value::Text(architecture.into())),
        ("type", Value::Text("model".into())),
        ("name", Value::Text(name.into())),
        ("size_label", Value::Text(size_label(config.parameters()))),
        ("file_type", Value::U32(file_type)),
        ("quantization_version", Value::U32(2)),
    ];
    let own = [
        ("block_count", number(config.num_layers)?),
        ("context_length", number(config.max_positions)?),
        ("embedding_length", number(config.hidden_size)?),
        ("feed_forward_length", number(config.intermediate_size)?),
        ("attention.head_count", number(config.num_heads)?),
        ("attention.head_count_kv", number(config.num_kv_heads)?),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("attention.key_length", number(config.head_dim)?),
        ("attention.value_length", number(config.head_dim)?),
        ("rope.freq_base", Value::F32(config.rope_theta as f32)),
        ("rope.dimension_count", number(config.head_dim)?),
        ("vocab_size", number(config.vocab_size)?),
    ];
    let general = general.into_iter().map(|(key, value)| (format!("general.{key}"), value));
    let own = own.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
    Ok(general.chain(own).collect())
}

/// `135M`, `3.1M`, `1.1B`: two digits at least, as llama.cpp's converter labels models.
fn size_label(parameters: usize) -> String {
    let (scaled, unit) = match parameters as f64 {
        n if n > 1e9 => (n / 1e9, "B"),
        n if n > 1e6 => (n / 1e6, "M"),
        n => (n / 1e3, "K"),
    };
    if scaled.round() < 10.0 { format!("{scaled:.1}{unit}") } else { format!("{scaled:.0}{unit}") }
}

/// The name that config.json gives the model, made fit for a file; `model` if it has none.
fn model_name(dir: &Path) -> Result<String> {
    let path = dir.join("config.json");
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: Json = serde_json::from_slice(&bytes)?;
    let full = config["_name_or_path"].as_str().unwrap_or_default();
    // `organisation/name`: a path on somebody's disk is no name.
    let named = full.split_once('/').map(|(_, name)| name);
    let fits = |name: &&str| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    Ok(named.filter(fits).unwrap_or("model").to_string())
}

fn report(tensors: &[Tensor], bytes: usize, bits: f64, notes: &[String]) -> String {
    let mut text = format!("# GGUF\n\n{bytes} bytes, {bits:.2} bits a weight.\n\n");
    for note in notes {
        let _ = writeln!(text, "- {note}");
    }
    let _ = writeln!(text, "\n| tensor | shape | type |\n|---|---|---|");
    for Tensor { info, .. } in tensors {
        let _ = writeln!(text, "| {} | {:?} | {} |", info.name, info.shape, info.kind.name());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_two_digits() {
        for (parameters, label) in [
            (99_104, "99K"),
            (3_141_592, "3.1M"),
            (134_515_008, "135M"),
            (999_600_000, "1000M"),
            (1_100_048_384, "1.1B"),
        ] {
            assert_eq!(size_label(parameters), label);
        }
    }
}
