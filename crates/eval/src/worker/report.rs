//! What was measured, for machines (eval.json), for people (eval.md, the terminal) and as a
//! picture.
//!
//! Knows nothing of how a figure came about. Times stand in the report folder only: the artifact
//! must not differ from run to run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use eval::require::Require;
use serde_json::{Value, json};
use step::Kind;
use step::worker::Job;

use crate::chart::Chart;
use crate::gates;

/// All that a step measured.
pub struct Report {
    pub step: &'static str,
    /// A sentence: what the figures are.
    pub about: String,
    pub split: String,
    pub rows: usize,
    pub reference: String,
    pub columns: Vec<Column>,
    /// In the order of the table.
    pub models: Vec<Measured>,
    pub examples: Vec<Example>,
    pub chart: Chart,
}

/// A figure of the table.
pub struct Column {
    pub figure: String,
    pub title: String,
    pub show: fn(f64) -> String,
}

/// The figures of one model.
pub struct Measured {
    pub label: String,
    pub kind: Kind,
    /// Bytes of the whole artifact.
    pub size: u64,
    /// By their names in eval.json, rounded by [`rounded`].
    pub figures: BTreeMap<String, f64>,
    /// Tokens that the model read or wrote, and how long that took.
    pub tokens: usize,
    pub seconds: f64,
}

/// A row and what each model made of it.
pub struct Example {
    pub prompt: String,
    pub expected: String,
    /// In the order of the table.
    pub answers: Vec<String>,
}

impl Report {
    /// Tells the figures, writes the report, holds the gates, writes the artifact. In this order:
    /// where a gate is shut, people still see the table.
    pub fn finish(&self, job: &Job, require: &Require) -> Result<()> {
        for model in &self.models {
            for (figure, value) in &model.figures {
                job.metric(&format!("{}.{figure}", model.label), *value);
            }
        }
        let gates = gates::verdicts(require, &self.models);
        let table = self.table();
        job.note(table.aligned());
        let markdown = self.markdown(&table, &gates);
        write(&job.report().join("report.md"), &(markdown.clone() + &self.speed().markdown()))?;
        write(&job.report().join("eval.svg"), &self.chart.svg())?;
        gates::hold(&gates)?;
        let mut json = serde_json::to_string_pretty(&self.json(&gates))?;
        json.push('\n');
        write(&job.out().join("eval.json"), &json)?;
        write(&job.out().join("eval.md"), &markdown)
    }

    fn json(&self, gates: &[gates::Gate]) -> Value {
        let models: serde_json::Map<String, Value> = self
            .models
            .iter()
            .map(|m| {
                let mut model = json!({"kind": m.kind, "size_bytes": m.size});
                for (figure, value) in &m.figures {
                    model[figure] = json!(value);
                }
                (m.label.clone(), model)
            })
            .collect();
        let labels: Vec<&str> = self.models.iter().map(|m| m.label.as_str()).collect();
        let examples: Vec<Value> = self
            .examples
            .iter()
            .map(|e| {
                let answers: BTreeMap<_, _> = labels.iter().zip(&e.answers).collect();
                json!({"prompt": e.prompt, "expected": e.expected, "answers": answers})
            })
            .collect();
        json!({
            "format": 1,
            "step": self.step,
            "split": self.split,
            "rows": self.rows,
            "reference": self.reference,
            // In the order of the table; an object has none.
            "figures": self.columns.iter().map(|c| &c.figure).collect::<Vec<_>>(),
            "order": labels,
            "models": models,
            "required": gates,
            "examples": examples,
        })
    }

    fn markdown(&self, table: &Table, gates: &[gates::Gate]) -> String {
        let mut text = format!("# {}\n\n{}\n\n{}", self.step, self.about, table.markdown());
        if !gates.is_empty() {
            let mut required = Table::new(&["required", "figure", "bound", "is", ""], 1);
            for gate in gates {
                let verdict = if gate.met { "met" } else { "**not met**" };
                required.row([
                    gate.model.clone(),
                    gate.figure.clone(),
                    gate.bound.clone(),
                    gate.value.to_string(),
                    verdict.into(),
                ]);
            }
            text += &format!("\n{}", required.markdown());
        }
        if !self.examples.is_empty() {
            let mut heads = vec!["prompt", "expected"];
            heads.extend(self.models.iter().map(|m| m.label.as_str()));
            let mut examples = Table::new(&heads, heads.len());
            for e in &self.examples {
                let answers =
                    e.answers.iter().map(|a| if *a == e.expected { "✓".into() } else { cell(a) });
                examples.row([cell(&e.prompt), cell(&e.expected)].into_iter().chain(answers));
            }
            text += &format!("\n## Examples\n\n{}", examples.markdown());
        }
        text
    }

    fn table(&self) -> Table {
        let mut heads = vec!["model", "kind", "size"];
        heads.extend(self.columns.iter().map(|c| c.title.as_str()));
        let mut table = Table::new(&heads, 2);
        for model in &self.models {
            let figures = self.columns.iter().map(|c| match model.figures.get(&c.figure) {
                Some(value) => (c.show)(*value),
                None => "–".into(),
            });
            let head = [model.label.clone(), kind(model.kind).into(), size(model.size)];
            table.row(head.into_iter().chain(figures));
        }
        table
    }

    /// How long each model took. Differs from run to run.
    fn speed(&self) -> Speed<'_> {
        Speed(&self.models)
    }
}

struct Speed<'a>(&'a [Measured]);

impl Speed<'_> {
    fn markdown(&self) -> String {
        let mut table = Table::new(&["model", "tokens", "seconds", "tokens/s"], 1);
        for model in self.0 {
            table.row([
                model.label.clone(),
                model.tokens.to_string(),
                format!("{:.2}", model.seconds),
                format!("{:.0}", model.tokens as f64 / model.seconds.max(1e-9)),
            ]);
        }
        format!("\n## Time\n\n{}", table.markdown())
    }
}

/// Rows of text under heads. The first `left` columns are flush left, the others right.
struct Table {
    left: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(heads: &[&str], left: usize) -> Self {
        Self { left, rows: vec![heads.iter().map(|h| h.to_string()).collect()] }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        for (n, row) in self.rows.iter().enumerate() {
            let _ = writeln!(text, "| {} |", row.join(" | "));
            if n == 0 {
                let rule = |i| if i < self.left { "---" } else { "---:" };
                let rules: Vec<&str> = (0..row.len()).map(rule).collect();
                let _ = writeln!(text, "| {} |", rules.join(" | "));
            }
        }
        text
    }

    /// Columns of equal width, for a terminal.
    fn aligned(&self) -> String {
        let width = |i: usize| self.rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(i, (cell, &width))| match i < self.left {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
        };
        self.rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// Six significant digits: what is beyond is the processor's rounding.
pub fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().expect("a printed number parses")
}

pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

pub fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::OnnxModel => "ONNX",
        Kind::GgufModel => "GGUF",
        _ => "model",
    }
}

/// `10.3 MB`, in powers of ten as download sizes are told.
pub fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        b if b < 1e6 => format!("{:.0} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

/// One line that cannot break a table.
fn cell(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    match line.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_for_both_readers() {
        let mut table = Table::new(&["model", "size"], 1);
        table.row(["a".into(), "12 kB".into()]);
        table.row(["grüße".into(), "3 kB".into()]);
        assert_eq!(table.aligned(), "model   size\na      12 kB\ngrüße   3 kB");
        assert_eq!(
            table.markdown(),
            "| model | size |\n| --- | ---: |\n| a | 12 kB |\n| grüße | 3 kB |\n"
        );
    }

    #[test]
    fn figures_are_rounded_and_sizes_are_told() {
        assert_eq!(rounded(1.234_567_89), 1.23457);
        assert_eq!(rounded(0.0), 0.0);
        assert_eq!(rounded(-9.876_543_21e-7), -9.87654e-7);
        assert_eq!(size(999), "1 kB");
        assert_eq!(size(2_560_000), "2.6 MB");
        assert_eq!(size(1_500_000_000), "1.50 GB");
        assert_eq!(cell("a | b\nc"), "a \\| b c");
    }
}
