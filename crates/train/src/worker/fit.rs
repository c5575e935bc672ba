//! The training loop: batches in, smaller loss out.
//!
//! Knows nothing of which parameters are trained, nor of what becomes of them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use step::Failure;
use step::worker::{Job, Progress};
use tch::{Device, Kind, Tensor};
use train::training::Training;

use crate::curve;
use crate::data::{Dataset, Rows};
use crate::decoder::Decoder;
use crate::optimiser::{Optimiser, Trainable, rate, warmup_steps};
use crate::plan::{self, Micro, Plan};
use crate::resume::Checkpoint;

/// One optimiser step: a line of metrics.jsonl.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Steps done, this one included.
    pub step: usize,
    /// A mean over what the targets count.
    pub loss: f64,
    pub learning_rate: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Seen so far, padding not counted.
    pub tokens: u64,
    pub tokens_per_second: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
}

/// What a run came to.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Over the last twentieth of the steps.
    pub loss: f64,
    pub validation_loss: Option<f64>,
    pub steps: usize,
    pub tokens: u64,
}

/// How often a checkpoint is written where `checkpoint_every` does not say.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(30);

/// Trains `trainables`, which are part of `model`, on the dataset's rows. Writes metrics.jsonl and
/// loss.svg to the report, and goes on from a checkpoint in the scratch folder.
pub fn fit(
    job: &Job,
    training: &Training,
    model: &Decoder,
    trainables: Vec<Trainable>,
    data: &Dataset,
    device: Device,
) -> Result<Outcome> {
    let plan = Plan::new(&data.train.lengths(), training);
    let steps = plan.steps.len();
    let warmup = warmup_steps(training, steps);
    if training.warmup >= 1.0 && (warmup as f64) < training.warmup {
        job.note(format!("{steps} steps in all: the warm-up is cut to {warmup}"));
    }
    let eval_every = match training.eval_every {
        0 => steps.div_ceil(10),
        n => n as usize,
    };

    let mut optimiser = Optimiser::new(trainables, training);
    let checkpoint = Checkpoint::of(job.scratch(), plan.digest().to_string());
    let history = job.scratch().join("metrics.jsonl");
    let done = checkpoint.load(&mut optimiser)?.unwrap_or(0);
    let mut records = read_records(&history, done)?;
    if done > 0 {
        job.note(format!("going on after step {done} of {steps}"));
    }

    let started = Instant::now();
    let mut saved = Instant::now();
    let mut tokens = records.last().map_or(0, |r: &Record| r.tokens);
    let tokens_before = tokens;
    for (step, micros) in plan.steps.iter().enumerate().skip(done) {
        let learning_rate = rate(training, step, steps);
        let loss = gradients(model, &data.train, &plan, step, training, device)?;
        let norm = optimiser.step(learning_rate)?;
        let (loss, grad_norm) = (loss.double_value(&[]), norm.double_value(&[]));
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(diverged(step, loss, grad_norm, micros, data).into());
        }

        tokens += micros.iter().map(|rows| data.train.tokens(rows) as u64).sum::<u64>();
        let tokens_per_second =
            (tokens - tokens_before) as f64 / started.elapsed().as_secs_f64().max(1e-9);
        let step = step + 1;
        let validation_loss = match &data.validation {
            Some(rows) if step % eval_every == 0 || step == steps => {
                Some(validate(model, rows, training, device))
            }
            _ => None,
        };
        records.push(Record {
            step,
            loss,
            learning_rate,
            grad_norm,
            tokens,
            tokens_per_second,
            validation_loss,
        });
        let values = [("loss", loss), ("tokens/s", tokens_per_second)];
        job.progress(Progress {
            phase: "train".into(),
            done: step as u64,
            total: steps as u64,
            unit: "steps".into(),
            values: values.map(|(name, value)| (name.into(), value)).into(),
        });

        let due = match training.checkpoint_every {
            0 => saved.elapsed() >= CHECKPOINT_EVERY,
            every => (step as u64).is_multiple_of(every),
        };
        if due && step < steps {
            // The records first: those past the checkpoint are dropped when they are read.
            write_records(&history, &records)?;
            checkpoint.save(step, &optimiser)?;
            saved = Instant::now();
        }
    }

    write_records(&job.report().join("metrics.jsonl"), &records)?;
    let svg = job.report().join("loss.svg");
    fs::write(&svg, curve::svg(&records))
        .with_context(|| format!("cannot write {}", svg.display()))?;
    let last = &records[records.len() - records.len().div_ceil(20)..];
    let outcome = Outcome {
        loss: last.iter().map(|r| r.loss).sum::<f64>() / last.len() as f64,
        validation_loss: records.iter().rev().find_map(|r| r.validation_loss),
        steps,
        tokens,
    };
    job.metric("loss", outcome.loss);
    if let Some(loss) = outcome.validation_loss {
        job.metric("validation_loss", loss);
    }
    job.metric("steps", steps as f64);
    job.metric("tokens", tokens as f64);
    Ok(outcome)
}

/// Leaves the gradient of a step's loss in the parameters. Returns that loss: the mean over all
/// targets of all its micro-batches, so that it does not matter how they are cut.
pub fn gradients(
    model: &Decoder,
    rows: &Rows,
    plan: &Plan,
    step: usize,
    training: &Training,
    device: Device,
) -> Result<Tensor> {
    let micros = &plan.steps[step];
    let weight: f64 = micros.iter().map(|m| rows.weight(m, training.prompt_weight)).sum();
    let mut total = Tensor::zeros([0_i64; 0], (Kind::Float, device));
    for (i, micro) in micros.iter().enumerate() {
        let batch = rows.batch(micro, plan.packed, training.prompt_weight, device);
        let dropout = Some(plan::seed_of(training.seed, step, i));
        total += model.backward(&batch, weight, dropout, training.gradient_checkpointing)?;
    }
    Ok(total)
}

/// The mean loss over every target of `rows`.
fn validate(model: &Decoder, rows: &Rows, training: &Training, device: Device) -> f64 {
    let batches: Vec<Micro> = plan::once(&rows.lengths(), training.batch_tokens);
    let (mut loss, mut weight) = (0.0, 0.0);
    tch::no_grad(|| {
        for batch in &batches {
            weight += rows.weight(batch, training.prompt_weight);
            let batch = rows.batch(batch, false, training.prompt_weight, device);
            loss += model.loss(&batch, 1.0, None).double_value(&[]);
        }
    });
    loss / weight
}

fn diverged(step: usize, loss: f64, grad_norm: f64, micros: &[Micro], data: &Dataset) -> Failure {
    const SHOWN: usize = 12;
    let rows: Vec<_> = micros.iter().flatten().map(|row| (row + 1).to_string()).collect();
    let more = match rows.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!(" and {more} more"),
        _ => String::new(),
    };
    Failure::input(format!(
        "training diverged at step {}: loss {loss}, gradient norm {grad_norm}; rows {}{more} of {}",
        step + 1,
        rows.into_iter().take(SHOWN).collect::<Vec<_>>().join(", "),
        data.train.place(),
    ))
    .hint("lower `learning_rate`, lengthen `warmup`, or set `compute = \"float32\"`")
}

/// The records of the first `steps` steps; fewer if the file has fewer.
fn read_records(path: &Path, steps: usize) -> Result<Vec<Record>> {
    if steps == 0 {
        return Ok(Vec::new());
    }
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let records = text.lines().map(serde_json::from_str::<Record>);
    let records: Result<Vec<_>, _> = records.collect();
    let mut records = records.with_context(|| format!("cannot read {}", path.display()))?;
    records.retain(|r| r.step <= steps);
    Ok(records)
}

fn write_records(path: &Path, records: &[Record]) -> Result<()> {
    let mut text = String::new();
    for record in records {
        text.push_str(&serde_json::to_string(record)?);
        text.push('\n');
    }
    let new = path.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
