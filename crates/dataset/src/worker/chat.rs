//! `dataset/chat`: cleans rows, deals them to splits, renders and tokenises them, and reports what
//! was left out and why.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::chat::{Template, Tokenizer};
use dataset::chat::Chat;
use rayon::prelude::*;
use serde_json::{Value, json};
use step::Failure;
use step::worker::Job;

use crate::histogram;
use crate::parse::{self, Placed, Row};
use crate::tokenised::Tokenised;
use crate::tokenizer::progress;

/// Rows tokenised between two lines of progress.
const CHUNK: usize = 4096;

pub fn run(job: &Job) -> Result<()> {
    let params: Chat = job.params()?;
    let dir = &job.input("tokenizer")?.path;
    let tokenizer = Tokenizer::from_dir(dir).map_err(Failure::from)?;

    let lines = parse::read(job.inputs("examples"), params.format, &params.columns)?;
    let mut counts = Counts { read: lines.len(), ..Counts::default() };
    let (rows, broken) = parse::sound(lines, params.on_broken)?;
    counts.broken = broken.len();
    let rows = clean(rows, &mut counts);

    let rendering = Rendering::new(dir, &rows)?;
    let rows: Vec<Dealt> = rows.into_iter().map(|row| deal(row, params.seed)).collect();
    let mut kept = Vec::new();
    let total = rows.len();
    let mut done = 0;
    let mut rows = rows.into_iter();
    loop {
        let chunk: Vec<Dealt> = rows.by_ref().take(CHUNK).collect();
        if chunk.is_empty() {
            break;
        }
        done += chunk.len();
        let tokenised: Vec<Result<Tokens>> =
            chunk.par_iter().map(|row| rendering.tokens(&tokenizer, row)).collect();
        for (row, tokens) in chunk.into_iter().zip(tokenised) {
            let tokens = tokens?;
            if tokens.len() > params.max_len as usize {
                counts.too_long += 1;
            } else if tokens.iter().skip(1).any(|(_, learned)| *learned) {
                kept.push((row, tokens));
            } else {
                counts.nothing_to_learn += 1;
            }
        }
        job.progress(progress("tokenising", done, total));
    }
    if let Some(most) = params.max_rows {
        // The smallest draws: which rows these are hangs on content and seed, not on order.
        let most = most as usize;
        if kept.len() > most {
            let mut draws: Vec<u64> = kept.iter().map(|(row, _)| row.order).collect();
            draws.sort_unstable();
            let limit = draws[most];
            counts.over_the_limit = kept.len() - most;
            kept.retain(|(row, _)| row.order < limit);
        }
    }
    counts.kept = kept.len();
    if kept.is_empty() {
        return Err(Failure::input(format!(
            "no row is left of {} that were read: {}",
            counts.read,
            counts.removed().map(|(rule, n)| format!("{n} {rule}")).join(", ")
        ))
        .into());
    }
    write(job, &params, &dir.join("tokenizer.json"), &kept, &counts, &broken)
}

/// The tokens of a row, each with whether the model learns to write it.
type Tokens = Vec<(u32, bool)>;

/// Rows in, rows out, and by which rule the others went.
#[derive(Default)]
struct Counts {
    read: usize,
    broken: usize,
    empty: usize,
    no_answer: usize,
    duplicate: usize,
    too_long: usize,
    nothing_to_learn: usize,
    over_the_limit: usize,
    kept: usize,
}

impl Counts {
    fn removed(&self) -> [(&'static str, usize); 7] {
        [
            ("broken", self.broken),
            ("empty", self.empty),
            ("without an answer", self.no_answer),
            ("duplicate", self.duplicate),
            ("too long", self.too_long),
            ("with nothing to learn", self.nothing_to_learn),
            ("over the limit", self.over_the_limit),
        ]
    }
}

/// Leaves out rows with an empty turn, rows that nobody answers, and all but the first of equal ones.
fn clean(rows: Vec<Placed>, counts: &mut Counts) -> Vec<Placed> {
    let mut seen = HashSet::new();
    let mut kept = Vec::new();
    for placed in rows {
        let row = &placed.row;
        let (empty, answered) = match row {
            Row::Text(text) => (text.trim().is_empty(), true),
            Row::Messages(turns) => (
                turns.is_empty() || turns.iter().any(|t| t.content.trim().is_empty()),
                turns.iter().any(|t| t.role == "assistant"),
            ),
        };
        if empty {
            counts.empty += 1;
        } else if !answered {
            counts.no_answer += 1;
        } else if !seen.insert(blake3::hash(row.to_json().as_bytes())) {
            counts.duplicate += 1;
        } else {
            kept.push(placed);
        }
    }
    kept
}

/// A row with what chance has for it, which hangs on its content and the seed alone: a row that is
/// added or removed moves no other one to another split.
struct Dealt {
    from: Placed,
    /// In [0, 1): its split.
    place: f64,
    order: u64,
}

fn deal(from: Placed, seed: u64) -> Dealt {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes()).update(from.row.to_json().as_bytes());
    let hash = *hash.finalize().as_bytes();
    let number = |at: usize| u64::from_le_bytes(hash[at..at + 8].try_into().expect("8 bytes"));
    // 53 bits: every value is exact in an f64.
    Dealt { from, place: (number(0) >> 11) as f64 / (1u64 << 53) as f64, order: number(8) }
}

/// How rows become text: by the template where there are conversations.
struct Rendering {
    template: Option<Template>,
    end: Option<u32>,
}

impl Rendering {
    fn new(dir: &Path, rows: &[Placed]) -> Result<Self> {
        let chats = rows.iter().any(|from| matches!(from.row, Row::Messages(_)));
        let template = match chats {
            true => Some(Template::from_dir(dir).map_err(Failure::from)?),
            false => None,
        };
        let path = dir.join("tokenizer_config.json");
        let config: Value = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Failure::input(format!("{} is no JSON: {e}", path.display())))?,
            Err(_) => Value::Null,
        };
        let eos = &config["eos_token"];
        let eos = eos.as_str().or_else(|| eos["content"].as_str());
        let tokenizer = Tokenizer::from_dir(dir).map_err(Failure::from)?;
        Ok(Self { template, end: eos.and_then(|token| tokenizer.token_id(token)) })
    }

    /// Each token with whether it is learned. What follows the last learned token is cut off:
    /// nothing reads it.
    fn tokens(&self, tokenizer: &Tokenizer, dealt: &Dealt) -> Result<Tokens> {
        let Placed { place, row, .. } = &dealt.from;
        let mut tokens = match (row, &self.template) {
            (Row::Messages(messages), Some(template)) => {
                let rendered = template
                    .render_spans(messages)
                    .map_err(|e| Failure::input(format!("{place}: {e}")))?;
                tokenizer.encode_spans(&rendered).map_err(Failure::from)?
            }
            (Row::Messages(_), None) => unreachable!("there is a template where there are chats"),
            (Row::Text(text), _) => {
                let ids = tokenizer.encode(text).map_err(Failure::from)?;
                ids.into_iter().chain(self.end).map(|id| (id, true)).collect()
            }
        };
        while tokens.last().is_some_and(|(_, learned)| !learned) {
            tokens.pop();
        }
        Ok(tokens)
    }
}

fn write(
    job: &Job,
    params: &Chat,
    tokenizer: &Path,
    kept: &[(Dealt, Tokens)],
    counts: &Counts,
    broken: &[String],
) -> Result<()> {
    let file = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    let mut splits = BTreeMap::new();
    let (mut low, mut totals) = (0.0, [0; 3]);
    for (name, share) in params.split.shares() {
        let high = if name == last(params) { 1.0 } else { low + share };
        let mut lines = String::new();
        let mut tokenised = Tokenised::default();
        for (row, tokens) in kept.iter().filter(|(row, _)| (low..high).contains(&row.place)) {
            lines += &row.from.to_json();
            lines.push('\n');
            tokenised.push(tokens);
        }
        low = high;
        if share == 0.0 {
            continue;
        }
        file(&job.out().join(format!("{name}.jsonl")), lines.as_bytes())?;
        tokenised.write(&job.out().join(format!("{name}.safetensors")))?;
        let figures = [tokenised.rows(), tokenised.tokens(), tokenised.supervised()];
        totals.iter_mut().zip(figures).for_each(|(sum, n)| *sum += n);
        let [rows, tokens, supervised] = figures;
        splits.insert(name, json!({ "rows": rows, "tokens": tokens, "supervised": supervised }));
    }
    let bytes =
        std::fs::read(tokenizer).with_context(|| format!("cannot read {}", tokenizer.display()))?;
    let about = json!({
        "format": 1,
        "tokenizer": blake3::hash(&bytes).to_hex().as_str(),
        "max_len": params.max_len,
        "splits": splits,
    });
    file(
        &job.out().join("dataset.json"),
        (serde_json::to_string_pretty(&about)? + "\n").as_bytes(),
    )?;

    let [rows, tokens, supervised] = totals;
    job.metric("rows_read", counts.read as f64);
    job.metric("rows", rows as f64);
    job.metric("tokens", tokens as f64);
    job.metric("supervised_share", supervised as f64 / tokens.max(1) as f64);
    let lengths: Vec<usize> = kept.iter().map(|(_, tokens)| tokens.len()).collect();
    file(&job.report().join("tokens.svg"), histogram::svg(&lengths).as_bytes())?;
    let report = json!({
        "read": counts.read,
        "removed": counts.removed().into_iter().collect::<BTreeMap<_, _>>(),
        "kept": counts.kept,
        "splits": splits,
        "broken": broken,
    });
    let path = job.report().join("report.json");
    file(&path, (serde_json::to_string_pretty(&report)? + "\n").as_bytes())?;
    file(&job.report().join("report.md"), markdown(counts, &splits, broken).as_bytes())
}

/// The split that takes what rounding leaves over.
fn last(params: &Chat) -> &'static str {
    let shares = params.split.shares();
    shares.iter().rev().find(|(_, share)| *share > 0.0).map_or("train", |(name, _)| name)
}

fn markdown(counts: &Counts, splits: &BTreeMap<&str, Value>, broken: &[String]) -> String {
    let mut out = format!("# {} of {} rows\n\n| rows | |\n|---|---:|\n", counts.kept, counts.read);
    _ = writeln!(out, "| read | {} |", counts.read);
    for (rule, n) in counts.removed().into_iter().filter(|(_, n)| *n > 0) {
        _ = writeln!(out, "| {rule} | −{n} |");
    }
    _ = writeln!(out, "| **kept** | **{}** |\n", counts.kept);
    out += "| split | rows | tokens | supervised |\n|---|---:|---:|---:|\n";
    for (name, about) in splits {
        let (rows, tokens, supervised) = (&about["rows"], &about["tokens"], &about["supervised"]);
        _ = writeln!(out, "| {name} | {rows} | {tokens} | {supervised} |");
    }
    out += "\n![Tokens of a row](tokens.svg)\n";
    if !broken.is_empty() {
        out += "\n## Lines that are no rows\n";
        for line in broken.iter().take(50) {
            _ = writeln!(out, "- {line}");
        }
        if broken.len() > 50 {
            _ = writeln!(out, "- and {} more, in report.json", broken.len() - 50);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use safetensors::SafeTensors;
    use step::Kind;
    use step::worker::{Input, Mode, Request};

    use super::*;
    use crate::parse::Columns;

    const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    const ROWS: &str = r#"{"messages":[{"role":"user","content":"at 5"},{"role":"assistant","content":"0 5"}]}
{"instruction":"at 6","input":"","output":"0 6"}
{"prompt":"at 6","completion":"0 6"}
{"prompt":"at 7","completion":"  "}
{"prompt":"at 8"
{"conversations":[{"from":"human","value":"at 9"},{"from":"gpt","value":"0 9"}]}
{"prompt":"at ten, and a good deal more than fits","completion":"0 10"}
"#;

    struct Room {
        _dir: tempfile::TempDir,
        root: PathBuf,
    }

    impl Room {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().to_path_buf();
            for (name, text) in [("rows/rows.jsonl", ROWS), ("template/chat.jinja", TEMPLATE)] {
                let path = root.join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self { _dir: dir, root }
        }

        /// Runs a step into `out`; its failure as text.
        fn run(
            &self,
            step: &str,
            params: Value,
            inputs: &[(&str, &str, &str)],
            out: &str,
        ) -> Result<(), String> {
            let folder = |name: &str| {
                let path = self.root.join(name);
                std::fs::create_dir_all(&path).unwrap();
                path
            };
            let mut given: BTreeMap<String, Vec<Input>> = BTreeMap::new();
            for (name, path, origin) in inputs {
                given.entry(name.to_string()).or_default().push(Input {
                    label: origin.to_string(),
                    kind: Kind::Files,
                    path: self.root.join(path),
                    origin: origin.to_string(),
                });
            }
            let request = Request {
                format: 1,
                step: step.into(),
                mode: Mode::Build,
                params,
                inputs: given,
                out: folder(out),
                report: folder(&format!("{out}-report")),
                scratch: folder("scratch"),
                tools: BTreeMap::new(),
                threads: 1,
            };
            let job = Job::new(request, std::io::sink());
            let run = if step == "dataset/chat" { super::run } else { crate::tokenizer::run };
            run(&job).map_err(|e| format!("{e:#}"))
        }

        fn tokenizer(&self, out: &str) {
            let params: dataset::tokenizer::Tokenizer =
                serde_json::from_value(json!({"vocab_size": 270, "on_broken": "skip"})).unwrap();
            let inputs =
                [("examples", "rows", "./rows.jsonl"), ("template", "template", "./chat.jinja")];
            let params = serde_json::to_value(params).unwrap();
            self.run("dataset/tokenizer", params, &inputs, out).unwrap();
        }

        fn dataset(&self, params: Value, out: &str) -> Result<(), String> {
            let params: Chat = serde_json::from_value(params).unwrap();
            let inputs =
                [("examples", "rows", "./rows.jsonl"), ("tokenizer", "tokenizer", "tokenizer")];
            self.run("dataset/chat", serde_json::to_value(params).unwrap(), &inputs, out)
        }

        fn read(&self, path: &str) -> String {
            std::fs::read_to_string(self.root.join(path)).unwrap()
        }
    }

    #[test]
    fn rows_are_cleaned_and_what_went_is_counted() {
        let room = Room::new();
        room.tokenizer("tokenizer");
        room.dataset(json!({"on_broken": "skip", "max_len": 30}), "out").unwrap();
        assert_eq!(room.read("out/train.jsonl").lines().count(), 3);
        let report: Value = serde_json::from_str(&room.read("out-report/report.json")).unwrap();
        assert_eq!(
            report["removed"],
            json!({"broken": 1, "empty": 1, "duplicate": 1, "too long": 1, "over the limit": 0,
                "without an answer": 0, "with nothing to learn": 0})
        );
        assert_eq!(
            report["broken"][0],
            "./rows.jsonl:5: no valid JSON: EOF while parsing an object at column 16"
        );
    }

    #[test]
    fn answers_are_supervised_to_their_end_token() {
        let room = Room::new();
        room.tokenizer("tokenizer");
        room.dataset(json!({"on_broken": "skip", "max_len": 30}), "out").unwrap();
        let bytes = std::fs::read(room.root.join("out/train.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("input_ids").unwrap().data().to_vec();
        let marks = file.tensor("supervised").unwrap().data().to_vec();
        let learned: Vec<u32> = ids
            .as_chunks::<4>()
            .0
            .iter()
            .zip(&marks)
            .filter(|(_, mark)| **mark == 1)
            .map(|(id, _)| u32::from_le_bytes(*id))
            .collect();
        let tokenizer = Tokenizer::from_dir(&room.root.join("tokenizer")).unwrap();
        assert_eq!(
            tokenizer.decode(&learned, false).unwrap(),
            "0 5<|im_end|>0 6<|im_end|>0 9<|im_end|>"
        );
        assert_eq!(tokenizer.end_ids(), [2]);
    }

    #[test]
    fn a_broken_line_is_named() {
        let room = Room::new();
        room.tokenizer("tokenizer");
        let error = room.dataset(json!({}), "out").unwrap_err();
        assert_eq!(
            error,
            "./rows.jsonl:5: no valid JSON: EOF while parsing an object at column 16"
        );
    }

    #[test]
    fn columns_are_kept_beside_what_a_row_says() {
        let room = Room::new();
        room.tokenizer("tokenizer");
        let rows = [
            json!({"prompt": "at 5", "completion": "0 5", "difficulty": 2.5, "source": "x"}),
            json!({"text": "at 6", "difficulty": 3}),
            json!({"text": "at 7", "difficulty": "hard"}),
            json!({"text": "at 8"}),
        ];
        let rows = rows.map(|row| row.to_string()).join("\n");
        std::fs::write(room.root.join("rows/rows.jsonl"), rows).unwrap();
        let params = json!({"columns": ["difficulty"]});
        assert_eq!(
            room.dataset(params, "out").unwrap_err(),
            "./rows.jsonl:3: `difficulty` is text, expected a number (and 1 more)"
        );
        let params = json!({"columns": ["difficulty"], "on_broken": "skip"});
        room.dataset(params, "out").unwrap();
        assert_eq!(
            room.read("out/train.jsonl"),
            r#"{"messages":[{"role":"user","content":"at 5"},{"role":"assistant","content":"0 5"}],"difficulty":2.5}
{"text":"at 6","difficulty":3}
"#
        );
        let report: Value = serde_json::from_str(&room.read("out-report/report.json")).unwrap();
        assert_eq!(
            report["broken"][1],
            "./rows.jsonl:4: no `difficulty`, a column that is to be kept"
        );
    }

    #[test]
    fn the_same_rows_give_the_same_bytes() {
        let room = Room::new();
        for n in ["", "-again"] {
            room.tokenizer(&format!("tokenizer{n}"));
            room.dataset(json!({"on_broken": "skip"}), &format!("out{n}")).unwrap();
        }
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let [a, b] =
                ["tokenizer", "tokenizer-again"].map(|d| room.read(&format!("{d}/{file}")));
            assert_eq!(a, b, "{file}");
        }
        for file in ["train.jsonl", "train.safetensors", "dataset.json"] {
            let [a, b] =
                ["out", "out-again"].map(|d| std::fs::read(room.root.join(d).join(file)).unwrap());
            assert_eq!(a, b, "{file}");
        }
    }

    #[test]
    fn a_row_keeps_its_split_when_others_come_or_go() {
        let row = |n: usize| Placed {
            place: String::new(),
            row: Row::Text(format!("row {n}")),
            columns: Columns::new(),
        };
        let places: Vec<f64> = (0..1000).map(|n| deal(row(n), 42).place).collect();
        assert!(places.iter().all(|place| (0.0..1.0).contains(place)));
        let test = places.iter().filter(|place| **place >= 0.9).count();
        assert!((70..130).contains(&test), "{test} of 1000 rows for a share of 0.1");
        assert_ne!(deal(row(1), 1).place, deal(row(1), 2).place);
    }
}
