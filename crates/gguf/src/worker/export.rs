//! The work of `gguf/export`: keys from the folder's JSON, then tensor by tensor over mmap.
//!
//! Each row is encoded by one thread, so the bytes do not depend on how many there are. In memory
//! are the keys and some MiB of rows, whatever the size of the model. Tensors come in the order of
//! the checkpoint's layers, as from llama.cpp's converter; llama-quantize sorts them by name.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result};
use checkpoint::config::Config;
use checkpoint::weights::{TensorRef, Weights};
use gguf::export::{Export, Quant};
use rayon::prelude::*;
use release::Licence;
use serde_json::Value as Json;
use step::Failure;
use step::worker::{Job, Progress};

use crate::encode::{self, Wrong};
use crate::format::{Info, Type, Value, Writer};
use crate::keys;
use crate::mix::Mix;
use crate::modelfile;
use crate::parity;
use crate::report;
use crate::tensors::{self, Tensor};
use crate::tokenizer;

/// Values that are encoded before they are written, few enough to be in the cache still, and those of
/// them that one thread takes at a time.
const PIECE: usize = 1 << 19;
const SHARE: usize = 1 << 14;
/// Bytes that are encoded while the tokenizer is read, which stands before them in the file: a large
/// one takes as long as they do.
const AHEAD: usize = 96 << 20;
/// Pieces that are written while one is encoded, at most.
const TOGETHER: usize = 8;
/// The values at hand, of each thread.
type Values = [Mutex<Vec<f32>>];

pub fn run(job: &Job) -> Result<()> {
    let params: Export = job.params()?;
    let dir = &job.input("model")?.path;
    let config = Config::read(dir).map_err(Failure::from)?;
    keys::refuse(&config, &dir.join("config.json"))?;
    let weights = Weights::open(dir).map_err(Failure::from)?;
    weights.check(&config).map_err(Failure::from)?;
    let tensors = tensors::plan(&config, params.quant);
    let threads = rayon::ThreadPoolBuilder::new().num_threads(job.threads()).build()?;
    let values: Vec<Mutex<Vec<f32>>> = (0..job.threads()).map(|_| Mutex::default()).collect();
    let mut encoding = tensors
        .iter()
        .enumerate()
        .flat_map(|(at, tensor)| pieces(tensor).map(move |rows| (at, rows)));
    let encode_piece = |at: usize, rows: Range<usize>, mut out: Vec<u8>| -> Result<Vec<u8>> {
        let tensor: &Tensor = &tensors[at];
        let source = weights.get(&tensor.source).map_err(Failure::from)?;
        encode(tensor, &source, rows, &values, &mut out)?;
        weights.let_go(&tensor.source);
        Ok(out)
    };
    let has_begun = AtomicBool::new(false);
    let (begun, ahead) = threads.join(
        || {
            let begun = Begun::new(job, &config, &tensors, params.quant);
            has_begun.store(true, Relaxed);
            begun
        },
        || -> Result<VecDeque<Vec<u8>>> {
            let (mut ahead, mut bytes) = (VecDeque::new(), 0);
            while !has_begun.load(Relaxed)
                && bytes < AHEAD
                && let Some((at, rows)) = encoding.next()
            {
                let encoded = encode_piece(at, rows, Vec::new())?;
                bytes += encoded.len();
                ahead.push_back(encoded);
            }
            Ok(ahead)
        },
    );
    let Begun { file, keys, mut notes, mut writer } = begun?;
    let mut waiting = ahead?;
    let progress = |done: usize| {
        job.progress(Progress {
            phase: "export".into(),
            done: done as u64,
            total: tensors.len() as u64,
            unit: "tensors".into(),
            ..Progress::default()
        });
    };
    // While a piece is encoded, some before it are written.
    let mut written = Vec::new();
    for (at, rows) in encoding {
        let some: Vec<_> = waiting.drain(..waiting.len().min(TOGETHER)).collect();
        let (encoded, wrote) = threads.join(
            || encode_piece(at, rows, written),
            || some.iter().try_for_each(|piece| writer.write(piece)),
        );
        wrote?;
        waiting.push_back(encoded?);
        written = some.into_iter().next().unwrap_or_default();
        progress(at);
    }
    for piece in waiting {
        writer.write(&piece)?;
    }
    progress(tensors.len());
    let bytes = writer.finish()?;

    checkpoint::copy_legal(dir, job.out()).map_err(Failure::from)?;
    notes.extend(modelfile::write(dir, job.out(), &file, &keys)?);
    if params.parity {
        let check = || {
            parity::check(&job.out().join(&file), dir, &config, &weights, &tensors, params.quant)
        };
        let (agreement, unreached) = threads.install(check)?;
        job.metric("kl", agreement.kl);
        job.metric("top1_agreement", agreement.top1);
        notes.extend(unreached);
    }
    notes.extend(fallbacks(&tensors, &Mix::new(&config, params.quant)));
    for note in &notes {
        job.note(note);
    }
    let of_tensors: usize = tensors.iter().map(|t| t.info.bytes()).sum();
    let bits = of_tensors as f64 * 8.0 / config.parameters() as f64;
    job.metric("bytes", bytes as f64);
    job.metric("bits_per_weight", bits);
    std::fs::write(
        job.report().join("report.md"),
        report::write(&config, &tensors, (bytes, bits), &notes),
    )?;
    Ok(())
}

/// A file that was begun: all before the checkpoint's tensors is in it.
struct Begun {
    /// Its name.
    file: String,
    keys: Vec<(String, Value)>,
    notes: Vec<String>,
    writer: Writer,
}

impl Begun {
    fn new(job: &Job, config: &Config, tensors: &[Tensor], quant: Quant) -> Result<Self> {
        let dir = &job.input("model")?.path;
        let tokenizer = tokenizer::read(dir, config)?;
        let name = model_name(dir)?;
        let licence = Licence::read(dir)?;
        let mut keys = keys::model(config, &tokenizer.name(&name), quant, licence.as_ref())?;
        keys.extend(tokenizer.keys);
        let file = format!("{name}-{}.gguf", quant.name());
        let factors = tensors::factors(config);
        let infos = factors.iter().map(|(info, _)| info).chain(tensors.iter().map(|t| &t.info));
        let mut writer = Writer::create(&job.out().join(&file), &keys, infos.cloned().collect())?;
        for (_, values) in &factors {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.write(&bytes)?;
        }
        let mut notes = keys::notes(config);
        notes.extend(tokenizer.notes);
        Ok(Self { file, keys, notes, writer })
    }
}

/// The rows of a tensor, a few at a time.
fn pieces(tensor: &Tensor) -> impl Iterator<Item = Range<usize>> {
    let (rows, columns) = tensor.rows_and_columns();
    let at_a_time = (PIECE / columns).max(1);
    (0..rows).step_by(at_a_time).map(move |from| from..rows.min(from + at_a_time))
}

/// Encodes `rows` of the file's tensor into `out`, in place of what is there.
fn encode(
    tensor: &Tensor,
    source: &TensorRef,
    rows: Range<usize>,
    values: &Values,
    out: &mut Vec<u8>,
) -> Result<()> {
    let (_, columns) = tensor.rows_and_columns();
    let row_bytes = tensor.info.kind.row_bytes(columns);
    let share = (SHARE / columns).max(1);
    out.resize(rows.len() * row_bytes, 0);
    let shares = out.par_chunks_mut(share * row_bytes).enumerate();
    let wrong = shares.map(|(at, out)| {
        let thread = rayon::current_thread_index().unwrap_or_default();
        let mut values = values[thread].lock().expect("no thread panicked");
        let from = rows.start + at * share;
        values.resize(out.len() / row_bytes * columns, 0.0);
        for (at, row) in values.chunks_exact_mut(columns).enumerate() {
            let row_there = tensor.rows.source(from + at);
            // The type was checked when the folder was opened.
            source.read_f32(row_there * columns, row).expect("a type of the checkpoint's");
        }
        if tensor.plus != 0.0 {
            values.iter_mut().for_each(|x| *x += tensor.plus);
        }
        encode::rows(&values, tensor.info.kind, out).err().map(|wrong| (from, wrong))
    });
    match wrong.flatten().min_by_key(|(from, _)| *from) {
        Some((from, wrong)) => Err(failure(tensor, from, wrong).into()),
        None => Ok(()),
    }
}

/// What is wrong with values of the rows from `from` on.
fn failure(tensor: &Tensor, from: usize, wrong: Wrong) -> Failure {
    let name = &tensor.source;
    let place = |at: usize| match tensor.info.rows() {
        _ if tensor.info.shape.len() == 1 => format!("[{}]", from + at),
        (_, columns) => {
            format!("[{}, {}]", tensor.rows.source(from + at / columns), at % columns)
        }
    };
    match wrong {
        Wrong::NotFinite { at, value } => {
            Failure::input(format!("`{name}` is {value} at {}", place(at)))
                .hint("the model is broken: look at the loss of the step that trained it")
        }
        Wrong::TooLarge { at, value } => Failure::input(format!(
            "`{name}` is {value} at {}: {} cannot hold it",
            place(at),
            tensor.info.kind.name()
        ))
        .hint("export with quant = \"F32\" or \"BF16\""),
    }
}

/// What to say of tensors that are not in the type that the mix has for them.
fn fallbacks(tensors: &[Tensor], mix: &Mix) -> Vec<String> {
    let mut kinds: BTreeMap<(Type, Type), Vec<&Info>> = BTreeMap::new();
    for Tensor { info, .. } in tensors {
        let wanted = mix.wanted(&info.name, &info.shape);
        if wanted != info.kind {
            kinds.entry((wanted, info.kind)).or_default().push(info);
        }
    }
    let note = |((wanted, kind), infos): (&(Type, Type), &Vec<&Info>)| {
        format!(
            "{} of {} tensors are {}: {} has rows of {} values, and {} packs them by {}",
            infos.len(),
            tensors.len(),
            kind.name(),
            infos[0].name,
            infos[0].rows().1,
            wanted.name(),
            wanted.block().0
        )
    };
    kinds.iter().map(note).collect()
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
