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
use train::training::{Keep, Training};

use crate::curve;
use crate::data::{Dataset, Rows};
use crate::decoder::Decoder;
use crate::device::peak_memory;
use crate::optimiser::{Optimiser, Trainable, rate, warmup_steps};
use crate::plan::{self, Micro, Plan};
use crate::resume::Checkpoint;
use crate::stop;

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
    /// Bytes, of the device that trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    pub seconds_left: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
}

/// What a run came to.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Over the last twentieth of the steps.
    pub loss: f64,
    /// Of the weights that are kept.
    pub validation_loss: Option<f64>,
    /// The step whose weights are kept, where it was chosen.
    pub kept: Option<usize>,
    pub steps: usize,
    pub tokens: u64,
    /// Of the steps, that this attempt made: it may have gone on from a checkpoint.
    pub share: f64,
}

/// How often a checkpoint is written where `checkpoint_every` does not say.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(30);

/// Trains `trainables`, which are part of `model`, on the dataset's rows. Writes metrics.jsonl and
/// loss.svg to the report, and goes on from a checkpoint in the scratch folder. Asked to end, it
/// does so after the step at hand, which a checkpoint then keeps.
pub fn fit(
    job: &Job,
    training: &Training,
    model: &Decoder,
    trainables: Vec<Trainable>,
    data: &Dataset,
    device: Device,
) -> Result<Outcome> {
    if training.keep == Keep::Best && data.validation.is_none() {
        return Err(Failure::input(format!(
            "`keep = \"best\"` goes by the validation loss, and there is no split `validation` beside {}",
            data.train.place()
        ))
        .hint("give the dataset's `split` a share for `validation`, or set `keep = \"last\"`")
        .into());
    }
    let difficulty = data.difficulty(&training.order)?;
    let plan = Plan::new(&data.train.lengths(), difficulty.as_deref(), training);
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
        if training.keep == Keep::Best && best(&records) == Some(done) {
            checkpoint.keep_as_best()?;
        }
    }
    stop::listen();

    let started = Instant::now();
    let (mut saved, mut saved_at) = (Instant::now(), done);
    let mut tokens = records.last().map_or(0, |r: &Record| r.tokens);
    let tokens_before = tokens;
    for (step, micros) in plan.steps.iter().enumerate().skip(done) {
        let learning_rate = rate(training, step, steps);
        let loss = gradients(model, &data.train, &plan, step, training, device)?;
        let norm = optimiser.step(learning_rate)?;
        let (loss, grad_norm) = (loss.double_value(&[]), norm.double_value(&[]));
        if !loss.is_finite() || !grad_norm.is_finite() {
            let at = Divergence { step: step + 1, loss, grad_norm, micros, saved_at };
            return Err(diverged(job, at, data, &history, &records)?.into());
        }

        tokens += micros.iter().map(|rows| data.train.tokens(rows) as u64).sum::<u64>();
        let elapsed = started.elapsed().as_secs_f64().max(1e-9);
        let tokens_per_second = (tokens - tokens_before) as f64 / elapsed;
        let step = step + 1;
        let seconds_left = elapsed / (step - done) as f64 * (steps - step) as f64;
        let peak_memory = peak_memory(device);
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
            peak_memory,
            seconds_left,
            validation_loss,
        });
        let values = [
            ("loss", loss),
            ("tokens/s", tokens_per_second),
            ("learning_rate", learning_rate),
            ("grad_norm", grad_norm),
            ("seconds_left", seconds_left),
        ];
        let memory = peak_memory.map(|bytes| ("peak_memory", bytes as f64));
        job.progress(Progress {
            phase: "train".into(),
            done: step as u64,
            total: steps as u64,
            unit: "steps".into(),
            values: values.into_iter().chain(memory).map(|(k, v)| (k.into(), v)).collect(),
        });

        let asked = stop::asked();
        let is_best = training.keep == Keep::Best
            && validation_loss.is_some()
            && best(&records) == Some(step);
        let due = match training.checkpoint_every {
            0 => saved.elapsed() >= CHECKPOINT_EVERY,
            every => (step as u64).is_multiple_of(every),
        };
        if asked || (due || is_best) && step < steps {
            // The records first: those past the checkpoint are dropped when they are read.
            write_records(&history, &records)?;
            checkpoint.save(step, &optimiser)?;
            if is_best {
                checkpoint.keep_as_best()?;
            }
            (saved, saved_at) = (Instant::now(), step);
        }
        if asked {
            let what = format!("stopped after step {step} of {steps}, which a checkpoint keeps");
            let hint = "build again: the training goes on from there";
            return Err(Failure::environment(what).hint(hint).into());
        }
    }

    let kept = best(&records).filter(|_| training.keep == Keep::Best);
    if let Some(step) = kept.filter(|step| *step < steps) {
        let found = checkpoint.load_best(&mut optimiser)?;
        anyhow::ensure!(found == Some(step), "the best step is {step}, what was kept is {found:?}");
    }
    write_records(&job.report().join("metrics.jsonl"), &records)?;
    write_curve(&job.report().join("loss.svg"), &records, kept)?;
    let last = &records[records.len() - records.len().div_ceil(20)..];
    let artifact = records.iter().rev().filter(|r| kept.is_none_or(|kept| kept == r.step));
    let outcome = Outcome {
        loss: last.iter().map(|r| r.loss).sum::<f64>() / last.len() as f64,
        validation_loss: artifact.filter_map(|r| r.validation_loss).next(),
        kept,
        steps,
        tokens,
        share: (steps - done) as f64 / steps as f64,
    };
    job.metric("loss", outcome.loss);
    if let Some(loss) = outcome.validation_loss {
        job.metric("validation_loss", loss);
    }
    if let Some(step) = kept {
        job.metric("kept_step", step as f64);
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

/// The step of the lowest validation loss, the earlier of two that are equal.
fn best(records: &[Record]) -> Option<usize> {
    let held = records.iter().filter_map(|r| Some((r.step, r.validation_loss?)));
    let held = held.filter(|(_, loss)| loss.is_finite());
    held.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(step, _)| step)
}

/// A step whose loss or gradient is no number, and the step of the last checkpoint.
struct Divergence<'a> {
    step: usize,
    loss: f64,
    grad_norm: f64,
    micros: &'a [Micro],
    saved_at: usize,
}

/// Says what is known of a divergence, and leaves what led there in the scratch folder: of an
/// attempt that fails nothing else stays.
fn diverged(
    job: &Job,
    at: Divergence,
    data: &Dataset,
    history: &Path,
    records: &[Record],
) -> Result<Failure> {
    const SHOWN: usize = 12;
    let Divergence { step, loss, grad_norm, micros, saved_at } = at;
    let rows: Vec<_> = micros.iter().flatten().map(|row| (row + 1).to_string()).collect();
    let more = match rows.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!(" and {more} more"),
        _ => String::new(),
    };
    let mut message = format!(
        "training diverged at step {step}: loss {loss}, gradient norm {grad_norm}; rows {}{more} of {}",
        rows.into_iter().take(SHOWN).collect::<Vec<_>>().join(", "),
        data.train.place(),
    );
    if !records.is_empty() {
        write_records(history, records)?;
        write_curve(&job.scratch().join("loss.svg"), records, None)?;
        message += &format!(
            "; the steps before it are in metrics.jsonl and loss.svg in {}",
            job.scratch().display()
        );
    }
    message += &match saved_at {
        0 => "; no checkpoint was written".to_string(),
        _ => format!(
            "; the last checkpoint is of step {saved_at}, and the same recipe goes on there"
        ),
    };
    let hint = "lower `learning_rate`, lengthen `warmup`, or set `compute = \"float32\"`";
    Ok(Failure::input(message).hint(hint))
}

fn write_curve(path: &Path, records: &[Record], kept: Option<usize>) -> Result<()> {
    fs::write(path, curve::svg(records, kept))
        .with_context(|| format!("cannot write {}", path.display()))
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
