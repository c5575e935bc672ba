//! `eval/perplexity`: reads a split's tokens with every model, and compares what each expects.
//!
//! Knows nothing of answers: nothing is generated here.
//!
//! Over the supervised tokens x of all rows, each given the tokens before it:
//! nll = mean(−ln p(x)); perplexity = exp(nll); bits per token = nll / ln 2;
//! KL = mean(Σ_v p_ref(v) · (ln p_ref(v) − ln p(v))) against the reference model;
//! top-1 agreement = share of tokens where both find the same token most likely.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use eval::perplexity::Perplexity;
use reference::{kl, log_softmax, top};
use step::Failure;
use step::worker::{Input, Job, Progress};

use crate::chart::{Bar, Chart};
use crate::dataset::{Row, Split, Tokens, batches};
use crate::gates;
use crate::report::{Column, Measured, Report, percent, rounded};
use crate::scored::{self, Scored};

/// Tokens that are run together: logits of all of them are held at once.
const BATCH_TOKENS: usize = 1024;

pub fn run(job: &Job) -> Result<()> {
    let params: Perplexity = job.params()?;
    let models = scored::models(job);
    gates::check(&params.require, &models)?;
    let reference = gates::reference(params.reference.as_deref(), &models)?;
    let dataset = job.input("dataset")?;
    let split = Split::of(dataset, &params.split, params.max_rows)?;
    let data = Data { rows: split.rows()?, tokens: split.tokens()? };
    if data.rows.len() != data.tokens.len() {
        let what = "is not as long as the tokenised rows";
        return Err(split.broken("jsonl", data.rows.len(), what));
    }
    if data.targets().next().is_none() {
        let what = "no token of this split is supervised: there is nothing to measure";
        return Err(split.broken("safetensors", 0, what));
    }

    // The reference comes first: the others are held against what it wrote down.
    let notes = Notes { path: job.scratch().join("reference.f32"), vocab: 0 };
    let (measured, notes) = measure(job, models[reference], &data, Side::Reference(notes))?;
    let mut all: Vec<Option<Measured>> = models.iter().map(|_| None).collect();
    all[reference] = Some(measured);
    for (slot, model) in all.iter_mut().zip(&models) {
        if slot.is_none() {
            *slot = Some(measure(job, model, &data, Side::Other(notes.clone()))?.0);
        }
    }
    std::fs::remove_file(&notes.path)
        .with_context(|| format!("cannot remove {}", notes.path.display()))?;

    let measured: Vec<Measured> = all.into_iter().flatten().collect();
    let reference = models[reference].label.clone();
    report(&params, &data, reference, measured).finish(job, &params.require)
}

/// A split, row by row.
struct Data {
    rows: Vec<Row>,
    tokens: Vec<Tokens>,
}

impl Data {
    /// (row, position) of each token that is asked for. The first of a row has nothing before it.
    fn targets(&self) -> impl Iterator<Item = (usize, usize)> {
        self.tokens.iter().enumerate().flat_map(|(row, t)| t.targets().map(move |at| (row, at)))
    }
}

impl Tokens {
    fn targets(&self) -> impl Iterator<Item = usize> {
        (1..self.ids.len()).filter(|&at| self.supervised[at])
    }
}

/// What the reference expected: ln p of the whole vocabulary for each target, in f32, in the order
/// in which all models read them. On disk, because it may be larger than any model.
#[derive(Clone)]
struct Notes {
    path: PathBuf,
    vocab: usize,
}

enum Side {
    Reference(Notes),
    Other(Notes),
}

/// Sums over the targets of one row.
#[derive(Clone, Default)]
struct Sums {
    nll: f64,
    kl: f64,
    agreed: usize,
}

fn measure(job: &Job, input: &Input, data: &Data, side: Side) -> Result<(Measured, Notes)> {
    let mut model = scored::open(job, input)?;
    let start = Instant::now();
    let vocab = model.vocab_size();
    let (mut writer, mut reader, notes) = match side {
        Side::Reference(notes) => {
            let file = File::create(&notes.path).with_context(|| shown("write", &notes.path))?;
            (Some(BufWriter::new(file)), None, Notes { vocab, ..notes })
        }
        Side::Other(notes) if notes.vocab == vocab => {
            let file = File::open(&notes.path).with_context(|| shown("read", &notes.path))?;
            (None, Some(BufReader::new(file)), notes)
        }
        Side::Other(notes) => {
            return Err(Failure::input(format!(
                "model `{}` has {vocab} tokens, the reference has {}: they cannot be compared",
                input.label, notes.vocab
            ))
            .hint("compare models of one tokenizer, or name another `reference`")
            .into());
        }
    };

    let lengths: Vec<usize> = data.tokens.iter().map(|t| t.ids.len()).collect();
    let mut sums = vec![Sums::default(); lengths.len()];
    let mut bytes = vec![0u8; vocab * 4];
    let (mut rows_done, mut tokens_done) = (0, 0);
    for batch in batches(&lengths, BATCH_TOKENS) {
        let rows: Vec<&[u32]> = batch.iter().map(|&r| data.tokens[r].ids.as_slice()).collect();
        let logits = model.logits(&rows).with_context(|| format!("model `{}`", input.label))?;
        let width = rows[0].len() * vocab;
        for (&row, logits) in batch.iter().zip(logits.chunks_exact(width.max(1))) {
            for at in data.tokens[row].targets() {
                let logs = log_softmax(&logits[(at - 1) * vocab..][..vocab]);
                let sum = &mut sums[row];
                sum.nll -= f64::from(logs[data.tokens[row].ids[at] as usize]);
                match (&mut writer, &mut reader) {
                    (Some(writer), _) => {
                        put(&logs, &mut bytes);
                        writer.write_all(&bytes).with_context(|| shown("write", &notes.path))?;
                        sum.agreed += 1;
                    }
                    (_, Some(reader)) => {
                        reader
                            .read_exact(&mut bytes)
                            .with_context(|| shown("read", &notes.path))?;
                        let expected = get(&bytes);
                        sum.kl += kl(&expected, &logs);
                        sum.agreed += usize::from(top(&expected) == top(&logs));
                    }
                    (None, None) => {}
                }
            }
        }
        rows_done += batch.len();
        tokens_done += batch.len() * rows[0].len();
        job.progress(Progress {
            phase: input.label.clone(),
            done: rows_done as u64,
            total: lengths.len() as u64,
            unit: "rows".into(),
            values: speed(tokens_done, start),
        });
    }
    if let Some(mut writer) = writer {
        writer.flush().with_context(|| shown("write", &notes.path))?;
    }

    let targets = data.targets().count() as f64;
    // In the order of the rows, whatever order they were run in.
    let nll = sums.iter().map(|s| s.nll).sum::<f64>() / targets;
    let figures = [
        ("nll", nll),
        ("perplexity", nll.exp()),
        ("bits_per_token", nll / std::f64::consts::LN_2),
        // What is below zero is rounding.
        ("kl", (sums.iter().map(|s| s.kl).sum::<f64>() / targets).max(0.0)),
        ("top1_agreement", sums.iter().map(|s| s.agreed).sum::<usize>() as f64 / targets),
        ("same_tokens", same_tokens(job, input, model.as_ref(), data)?),
    ];
    let seconds = start.elapsed().as_secs_f64();
    let measured = Measured {
        label: input.label.clone(),
        kind: input.kind,
        size: scored::size(&input.path)?,
        figures: figures.into_iter().map(|(name, v)| (name.into(), rounded(v))).collect(),
        tokens: tokens_done,
        seconds,
    };
    Ok((measured, notes))
}

/// The share of rows whose prompt, by the model's own template and tokenizer, is the tokens that
/// the dataset has.
fn same_tokens(job: &Job, input: &Input, model: &dyn Scored, data: &Data) -> Result<f64> {
    let mut differ = Vec::new();
    for (n, (row, tokens)) in data.rows.iter().zip(&data.tokens).enumerate() {
        let text = match row {
            Row::Chat(messages) => {
                let last = messages.iter().rposition(|m| m.role == "assistant");
                model.prompt(&messages[..last.unwrap_or(messages.len())])?
            }
            Row::Text(text) => text.clone(),
        };
        let ids = model.encode(&text)?;
        if ids.iter().zip(&tokens.ids).any(|(a, b)| a != b) {
            differ.push(n + 1);
        }
    }
    if let Some(first) = differ.first() {
        job.note(format!(
            "{}: {} of {} rows are other tokens to the model than to the dataset, the first is row {first}",
            input.label,
            differ.len(),
            data.rows.len()
        ));
    }
    Ok(1.0 - differ.len() as f64 / data.rows.len() as f64)
}

fn report(
    params: &Perplexity,
    data: &Data,
    reference: String,
    mut models: Vec<Measured>,
) -> Report {
    let base = models.iter().find(|m| m.label == reference).map_or(f64::NAN, |m| m.figures["nll"]);
    for model in &mut models {
        let ratio = rounded((model.figures["nll"] - base).exp());
        model.figures.insert("perplexity_ratio".into(), ratio);
    }
    let column = |figure: &str, title: &str, show| Column {
        figure: figure.into(),
        title: title.into(),
        show,
    };
    let targets = data.targets().count();
    let split = &params.split;
    let about = format!(
        "{} rows of `{split}`, {targets} supervised tokens. Ratio, KL and top-1 agreement are against `{reference}`.",
        data.rows.len(),
    );
    let bars: Vec<Bar> = models
        .iter()
        .map(|m| Bar {
            label: m.label.clone(),
            kind: m.kind,
            value: m.figures["perplexity"],
            shown: format!("{:.3}", m.figures["perplexity"]),
            interval: None,
            size: m.size,
        })
        .collect();
    Report {
        step: "eval/perplexity",
        split: split.clone(),
        rows: data.rows.len(),
        columns: vec![
            column("perplexity", "perplexity", |v| format!("{v:.3}")),
            column("perplexity_ratio", "ratio", |v| format!("{v:.4}")),
            column("bits_per_token", "bits/token", |v| format!("{v:.3}")),
            column("kl", "KL", |v| format!("{v:.5}")),
            column("top1_agreement", "top-1 agreement", percent),
            column("same_tokens", "same tokens", percent),
        ],
        chart: Chart {
            title: "Perplexity".into(),
            subtitle: format!("{targets} supervised tokens of {split}; shorter is better"),
            figure: "perplexity".into(),
            full: bars.iter().map(|b| b.value).fold(1.0, f64::max),
            bars,
        },
        about,
        reference,
        models,
        examples: Vec::new(),
    }
}

fn put(values: &[f32], bytes: &mut [u8]) {
    for (value, slot) in values.iter().zip(bytes.as_chunks_mut::<4>().0) {
        *slot = value.to_le_bytes();
    }
}

fn get(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn speed(tokens: usize, start: Instant) -> BTreeMap<String, f64> {
    let rate = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
    BTreeMap::from([("tokens/s".into(), rate)])
}

fn shown(what: &str, path: &Path) -> String {
    format!("cannot {what} {}", path.display())
}
