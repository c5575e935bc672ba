//! The files: which rows go where, in which format, and what is wrong with some on purpose.
//! It does not know what a schedule is made of.

use std::collections::HashSet;

use serde::Serialize;

use crate::pretrain::{self, Document};
use crate::rng::Rng;
use crate::schedule::{Schedule, Split};

/// What pretraining is given, by the estimate, which is 3 % above what the demo's tokenizer counts.
const PRETRAIN_TOKENS: usize = 1_600_000;
const HELD_OUT_ROWS: usize = 600;

/// A file beside the recipe and its whole content.
pub struct File {
    pub name: &'static str,
    pub text: String,
}

/// A format that people keep instruction data in.
#[derive(Clone, Copy)]
enum Format {
    Messages,
    Alpaca,
    ShareGpt,
    Completion,
}

#[derive(Serialize)]
struct TextRow<'a> {
    text: &'a str,
}

#[derive(Serialize)]
struct MessagesRow<'a> {
    messages: [Message<'a>; 2],
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'a str,
    content: &'a str,
}

#[derive(Serialize)]
struct AlpacaRow<'a> {
    instruction: &'a str,
    input: &'a str,
    output: &'a str,
}

#[derive(Serialize)]
struct ShareGptRow<'a> {
    conversations: [ShareGptTurn<'a>; 2],
}

#[derive(Serialize)]
struct ShareGptTurn<'a> {
    from: &'a str,
    value: &'a str,
}

#[derive(Serialize)]
struct CompletionRow<'a> {
    prompt: &'a str,
    completion: &'a str,
}

/// A training file: its format, its good rows, and the broken ones among them.
struct Plan {
    name: &'static str,
    format: Format,
    good: usize,
    noise: Noise,
}

#[derive(Clone, Copy)]
struct Noise {
    duplicates: usize,
    empty_answers: usize,
    blank_prompts: usize,
    /// Lines that are no JSON, or have a role that nobody knows.
    broken: usize,
}

const PLANS: [Plan; 4] = [
    Plan {
        name: "schedules.jsonl",
        format: Format::Messages,
        good: 11_660,
        noise: Noise { duplicates: 156, empty_answers: 80, blank_prompts: 72, broken: 32 },
    },
    Plan {
        name: "schedules-alpaca.jsonl",
        format: Format::Alpaca,
        good: 2_524,
        noise: Noise { duplicates: 32, empty_answers: 18, blank_prompts: 16, broken: 10 },
    },
    Plan {
        name: "schedules-sharegpt.jsonl",
        format: Format::ShareGpt,
        good: 1_358,
        noise: Noise { duplicates: 16, empty_answers: 10, blank_prompts: 10, broken: 6 },
    },
    Plan {
        name: "schedules-completion.jsonl",
        format: Format::Completion,
        good: 584,
        noise: Noise { duplicates: 6, empty_answers: 4, blank_prompts: 4, broken: 2 },
    },
];

/// Every file, the same at every call.
pub fn all() -> Vec<File> {
    let mut rng = Rng::new(101);
    let mut seen = HashSet::new();
    let train = distinct(&mut rng, Split::Train, PLANS.iter().map(|p| p.good).sum(), &mut seen);
    let held_out = distinct(&mut Rng::new(202), Split::HeldOut, HELD_OUT_ROWS, &mut seen);

    let mut files = vec![File { name: "pretrain.jsonl", text: pretrain_text() }];
    let mut rest = train.as_slice();
    for plan in &PLANS {
        let (rows, after) = rest.split_at(plan.good);
        rest = after;
        files.push(File { name: plan.name, text: with_noise(&mut rng, plan, rows) });
    }
    let rows = held_out.iter().map(|row| Format::Messages.row(&row.prompt, &row.line));
    files.push(File { name: "held-out.jsonl", text: joined(rows) });
    files
}

fn pretrain_text() -> String {
    let mut rng = Rng::new(303);
    let mut tokens = 0;
    let rows = std::iter::from_fn(|| {
        (tokens < PRETRAIN_TOKENS).then(|| {
            let document = pretrain::draw(&mut rng);
            tokens += document.tokens();
            match document {
                Document::Text(text) => json(&TextRow { text: &text }),
                Document::Chat { prompt, answer } => Format::Messages.row(&prompt, &answer),
            }
        })
    });
    joined(rows)
}

/// `n` schedules of which no two, nor any in `seen`, ask the same.
fn distinct(rng: &mut Rng, split: Split, n: usize, seen: &mut HashSet<String>) -> Vec<Schedule> {
    let mut rows = Vec::with_capacity(n);
    while rows.len() < n {
        let row = Schedule::draw(rng, split);
        if seen.insert(row.key()) {
            rows.push(row);
        }
    }
    rows
}

impl Format {
    fn row(self, prompt: &str, answer: &str) -> String {
        // Structs and not `json!`: their keys keep their order whatever serde_json's features.
        match self {
            Self::Messages => json(&MessagesRow {
                messages: [("user", prompt), ("assistant", answer)]
                    .map(|(role, content)| Message { role, content }),
            }),
            Self::Alpaca => json(&AlpacaRow { instruction: prompt, input: "", output: answer }),
            Self::ShareGpt => json(&ShareGptRow {
                conversations: [("human", prompt), ("gpt", answer)]
                    .map(|(from, value)| ShareGptTurn { from, value }),
            }),
            Self::Completion => json(&CompletionRow { prompt, completion: answer }),
        }
    }

    /// A row whose roles, or whose answer's key, nobody knows.
    fn misnamed(self, prompt: &str, answer: &str) -> String {
        let row = self.row(prompt, answer);
        match self {
            Self::Messages => row.replace(r#""assistant""#, r#""robot""#),
            Self::Alpaca => row.replace(r#""output""#, r#""outptu""#),
            Self::ShareGpt => row.replace(r#""gpt""#, r#""robot""#),
            Self::Completion => row.replace(r#""completion""#, r#""complete""#),
        }
    }
}

/// The rows of a file with its noise at random places, but never first.
fn with_noise(rng: &mut Rng, plan: &Plan, rows: &[Schedule]) -> String {
    let good: Vec<String> =
        rows.iter().map(|row| plan.format.row(&row.prompt, &row.line)).collect();
    let mut lines = good.clone();
    let insert = |rng: &mut Rng, lines: &mut Vec<String>, line: String| {
        let at = rng.within(1, lines.len() as u32) as usize;
        lines.insert(at, line);
    };
    let noise = plan.noise;
    for i in 0..noise.duplicates + noise.empty_answers + noise.blank_prompts + noise.broken {
        let row = rng.choose(rows);
        let line = if i < noise.duplicates {
            rng.choose(&good).clone()
        } else if i < noise.duplicates + noise.empty_answers {
            plan.format.row(&row.prompt, "")
        } else if i < noise.duplicates + noise.empty_answers + noise.blank_prompts {
            let blank: &&str = rng.choose(&[" ", "  ", "\t", "\n", " \n "]);
            plan.format.row(blank, &row.line)
        } else if rng.percent(50) {
            plan.format.misnamed(&row.prompt, &row.line)
        } else {
            let line = plan.format.row(&row.prompt, &row.line);
            line[..line.len() * 2 / 3].to_owned()
        };
        insert(rng, &mut lines, line);
    }
    joined(lines.into_iter())
}

fn json(row: &impl Serialize) -> String {
    serde_json::to_string(row).expect("strings alone always serialize")
}

fn joined(lines: impl Iterator<Item = String>) -> String {
    lines.map(|line| line + "\n").collect()
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
