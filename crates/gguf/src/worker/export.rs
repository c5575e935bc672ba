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
use crate::format::{Info, Type, Writer};
use crate::keys;
use crate::tensors::{self, Tensor};
use crate::tokenizer;

/// Values that are encoded at a time.
const PIECE: usize = 1 << 22;

pub fn run(job: &Job) -> Result<()> {
    let params: Export = job.params()?;
    let dir = &job.input("model")?.path;
    let config = Config::read(dir).map_err(Failure::from)?;
    keys::refuse(&config, &dir.join("config.json"))?;
    let weights = Weights::open(dir).map_err(Failure::from)?;
    weights.check(&config).map_err(Failure::from)?;
    let tokenizer = tokenizer::read(dir, &config)?;
    let tensors = tensors::plan(&config, params.quant);

    let name = model_name(dir)?;
    let mut keys = keys::model(&config, &tokenizer.name(&name), params.quant)?;
    keys.extend(tokenizer.keys);
    let path = job.out().join(format!("{name}-{}.gguf", params.quant.name()));
    let factors = tensors::factors(&config);
    let infos = factors.iter().map(|(info, _)| info).chain(tensors.iter().map(|t| &t.info));
    let mut writer = Writer::create(&path, &keys, infos.cloned().collect())?;
    for (_, values) in &factors {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&bytes)?;
    }
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
    let mut notes = keys::notes(&config);
    notes.extend(tokenizer.notes);
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
    let columns = tensor.columns();
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
                let mut values = one.to_f32().expect("a type of the checkpoint's");
                if tensor.plus != 0.0 {
                    values.iter_mut().for_each(|x| *x += tensor.plus);
                }
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
        1 => format!("[{}]", row + column),
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
