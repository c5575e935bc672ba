//! `eval/exact-match`: asks every model the questions of a split and compares its answers, letter
//! by letter.
//!
//! Knows nothing of logits.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use checkpoint::chat::Message;
use eval::exact_match::ExactMatch;
use serde_json::json;
use step::worker::{Input, Job, Progress};

use crate::chart::{Bar, Chart};
use crate::dataset::{Row, Split, batches};
use crate::report::{Column, Example, Measured, Report, percent, rounded};
use crate::{gates, scored};

/// Tokens of prompts that are answered between two lines of progress.
const BATCH_TOKENS: usize = 4096;

/// How many rows stand in eval.json, spread over the split.
const EXAMPLES: usize = 20;

pub fn run(job: &Job) -> Result<()> {
    let params: ExactMatch = job.params()?;
    let models = scored::models(job);
    gates::check(&params.require, &models)?;
    let reference = gates::reference(params.reference.as_deref(), &models)?;
    let split = Split::of(job.input("dataset")?, &params.split, params.max_rows)?;
    let questions = split
        .rows()?
        .into_iter()
        .enumerate()
        .map(|(n, row)| question(row).map_err(|what| split.broken("jsonl", n, what)))
        .collect::<Result<Vec<Question>>>()?;
    if questions.is_empty() {
        return Err(split.broken("jsonl", 0, "the split is empty: there is nothing to ask"));
    }

    let mut asked = Vec::new();
    for model in &models {
        asked.push(ask(job, model, &questions, &params)?);
    }
    failures(job, &questions, &asked)?;
    report(&params, &questions, &models[reference].label, asked).finish(job, &params.require)
}

/// What stands before the last assistant turn, and that turn.
struct Question {
    messages: Vec<Message>,
    expected: String,
}

fn question(row: Row) -> Result<Question, &'static str> {
    let Row::Chat(mut messages) = row else {
        return Err("a row of `text` has no answer to compare with; exact match wants `messages`");
    };
    let last = messages.iter().rposition(|m| m.role == "assistant");
    match last.map(|at| messages.drain(at..).next()) {
        Some(Some(answer)) if !messages.is_empty() => {
            Ok(Question { messages, expected: answer.content.trim().into() })
        }
        Some(_) => Err("nothing stands before the assistant's turn"),
        None => Err("no turn is the assistant's"),
    }
}

/// What a model made of all questions.
struct Asked {
    input: Measured,
    answers: Vec<String>,
}

fn ask(job: &Job, input: &Input, questions: &[Question], params: &ExactMatch) -> Result<Asked> {
    let mut model = scored::open(job, input)?;
    let context = || format!("model `{}`", input.label);
    let start = Instant::now();
    let prompts = questions
        .iter()
        .map(|q| model.encode(&model.prompt(&q.messages)?))
        .collect::<Result<Vec<Vec<u32>>>>()
        .with_context(context)?;
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let mut answers = vec![String::new(); questions.len()];
    let (mut done, mut tokens) = (0, 0);
    for batch in batches(&lengths, BATCH_TOKENS) {
        let asked: Vec<Vec<u32>> = batch.iter().map(|&i| prompts[i].clone()).collect();
        let given = model.answers(&asked, params.max_new_tokens).with_context(context)?;
        for (&i, ids) in batch.iter().zip(&given) {
            answers[i] = model.decode(ids)?.trim().to_string();
            tokens += ids.len() + lengths[i];
        }
        done += batch.len();
        let rate = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
        job.progress(Progress {
            phase: input.label.clone(),
            done: done as u64,
            total: questions.len() as u64,
            unit: "rows".into(),
            values: BTreeMap::from([("tokens/s".into(), rate)]),
        });
    }
    let right = questions.iter().zip(&answers).filter(|(q, a)| q.expected == **a).count();
    let share = right as f64 / questions.len() as f64;
    let measured = Measured {
        label: input.label.clone(),
        kind: input.kind,
        size: scored::size(&input.path)?,
        figures: BTreeMap::from([(params.metric.clone(), share)]),
        tokens,
        seconds: start.elapsed().as_secs_f64(),
    };
    Ok(Asked { input: measured, answers })
}

fn report(
    params: &ExactMatch,
    questions: &[Question],
    reference: &str,
    asked: Vec<Asked>,
) -> Report {
    let [right, drop, same] = params.figures();
    let rows = questions.len();
    let (mut models, answers): (Vec<Measured>, Vec<Vec<String>>) =
        asked.into_iter().map(|a| (a.input, a.answers)).unzip();
    let base = models.iter().position(|m| m.label == reference).unwrap_or(0);
    let base_share = models[base].figures[&right];
    for (model, given) in models.iter_mut().zip(&answers) {
        let share = model.figures[&right];
        let agreed = given.iter().zip(&answers[base]).filter(|(a, b)| a == b).count();
        model.figures = BTreeMap::from([
            (right.clone(), rounded(share)),
            (drop.clone(), rounded(base_share - share)),
            (same.clone(), rounded(agreed as f64 / rows as f64)),
        ]);
    }
    let examples = spread(rows, EXAMPLES)
        .map(|i| Example {
            prompt: asked_in_words(&questions[i].messages),
            expected: questions[i].expected.clone(),
            answers: answers.iter().map(|a| a[i].clone()).collect(),
        })
        .collect();
    let bars = models
        .iter()
        .map(|m| Bar {
            label: m.label.clone(),
            kind: m.kind,
            value: m.figures[&right],
            shown: percent(m.figures[&right]),
            interval: Some(wilson(m.figures[&right], rows)),
            size: m.size,
        })
        .collect();
    let column = |figure: &String, title: &str, show| Column {
        figure: figure.clone(),
        title: title.into(),
        show,
    };
    let title = right.replace('_', " ");
    let split = &params.split;
    Report {
        step: "eval/exact-match",
        about: format!(
            "{rows} rows of `{split}`, answered greedily. Drop (in points) and same answers are against `{reference}`."
        ),
        split: split.clone(),
        rows,
        reference: reference.into(),
        columns: vec![
            column(&right, &title, percent),
            column(&drop, "drop", |v| format!("{:.1}", v * 100.0 + 0.0)),
            column(&same, "same answers", percent),
        ],
        models,
        examples,
        chart: Chart {
            title: capitalised(&title),
            subtitle: format!(
                "{rows} rows of {split}, answered greedily; whiskers: 95 % confidence"
            ),
            figure: title,
            bars,
            full: 1.0,
        },
    }
}

/// Every row that some model got wrong, for those who want to know why: report/failures.jsonl.
fn failures(job: &Job, questions: &[Question], asked: &[Asked]) -> Result<()> {
    let mut lines = String::new();
    for (i, question) in questions.iter().enumerate() {
        let wrong: BTreeMap<&str, &str> = asked
            .iter()
            .filter(|a| a.answers[i] != question.expected)
            .map(|a| (a.input.label.as_str(), a.answers[i].as_str()))
            .collect();
        if !wrong.is_empty() {
            let prompt = asked_in_words(&question.messages);
            let line = json!({
                "row": i + 1, "prompt": prompt, "expected": question.expected, "wrong": wrong
            });
            lines += &format!("{line}\n");
        }
    }
    let path = job.report().join("failures.jsonl");
    std::fs::write(&path, lines).with_context(|| format!("cannot write {}", path.display()))
}

/// The user's words alone where nothing else was said, else all turns.
fn asked_in_words(messages: &[Message]) -> String {
    match messages {
        [only] => only.content.clone(),
        all => {
            all.iter().map(|m| format!("{}: {}", m.role, m.content)).collect::<Vec<_>>().join("\n")
        }
    }
}

/// At most `count` indices below `rows`, evenly apart.
fn spread(rows: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(rows);
    (0..count).map(move |i| i * rows / count)
}

/// The Wilson score interval of a share of `n`, at 95 % (Wilson 1927).
fn wilson(share: f64, n: usize) -> (f64, f64) {
    const Z: f64 = 1.959_964;
    let n = n as f64;
    let scale = 1.0 + Z * Z / n;
    let middle = (share + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    (middle - half, middle + half)
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}
