//! Lines of JSON as rows: ChatML, Alpaca, ShareGPT, completion and text form.
//!
//! Knows nothing of tokens. Errors name file and line, as people's editors count them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use checkpoint::chat::Message;
use dataset::rows::{Format, OnBroken};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};
use step::Failure;
use step::worker::Input;

/// A row as it is kept: the one form that everything downstream reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Row {
    Messages(Vec<Message>),
    Text(String),
}

impl Row {
    /// What it says, which decides whether another row is the same.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("rows serialise to JSON")
    }
}

/// Numbers beside what a row says, by the names of their columns.
pub type Columns = BTreeMap<String, Number>;

/// A row and where it came from, or what is wrong with a line.
pub struct Line {
    /// `schedules.jsonl:12`.
    pub place: String,
    pub row: Result<(Row, Columns), String>,
}

/// Every line of every file, in the order of labels and paths. Blank lines are no rows.
pub fn read(inputs: &[Input], format: Format, columns: &[String]) -> Result<Vec<Line>> {
    let parse = |value: &Value| Ok((row(value, format)?, numbers(value, columns)?));

    let mut lines = Vec::new();
    // The order of a list is no part of an action, so nothing may depend on it.
    let mut inputs: Vec<&Input> = inputs.iter().collect();
    inputs.sort_by_key(|input| &input.label);
    for input in inputs {
        for path in files(&input.path)? {
            let text =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = shown(input, &path);
            match text.trim_ascii_start().starts_with(b"[") {
                true => lines.extend(array(&text, &name, parse)?),
                false => lines.extend(json_lines(&text, &name, parse)),
            }
        }
    }
    Ok(lines)
}

/// A row, and where it came from.
pub struct Placed {
    pub place: String,
    pub row: Row,
    pub columns: Columns,
}

impl Placed {
    /// As it stands in `<split>.jsonl`.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("rows serialise to JSON")
    }
}

impl Serialize for Placed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match &self.row {
            Row::Messages(turns) => map.serialize_entry("messages", turns)?,
            Row::Text(text) => map.serialize_entry("text", text)?,
        }
        self.columns.iter().try_for_each(|(name, number)| map.serialize_entry(name, number))?;
        map.end()
    }
}

/// The rows, and the lines that are none; the latter only if the recipe says so.
pub fn sound(lines: Vec<Line>, on_broken: OnBroken) -> Result<(Vec<Placed>, Vec<String>)> {
    let (mut rows, mut broken) = (Vec::new(), Vec::new());
    for line in lines {
        match line.row {
            Ok((row, columns)) => rows.push(Placed { place: line.place, row, columns }),
            Err(what) => broken.push(format!("{}: {what}", line.place)),
        }
    }
    if on_broken == OnBroken::Error
        && let Some(first) = broken.first()
    {
        let more = match broken.len() {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        return Err(Failure::input(format!("{first}{more}"))
            .hint("mend the line, or set `on_broken = \"skip\"` to leave such lines out and count them")
            .into());
    }
    Ok((rows, broken))
}

type Parsed = Result<(Row, Columns), String>;

fn json_lines(text: &[u8], name: &str, parse: impl Fn(&Value) -> Parsed) -> Vec<Line> {
    let lines = text.split(|&b| b == b'\n').enumerate();
    lines
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(n, line)| Line {
            place: format!("{name}:{}", n + 1),
            row: serde_json::from_slice(line)
                .map_err(|e| format!("no valid JSON: {}", place_in_line(&e)))
                .and_then(|value| parse(&value)),
        })
        .collect()
}

/// serde_json counts lines of what it is given; here that is always one.
fn place_in_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("{what} at column {}", error.column())
}

/// A whole file that is one JSON array, as many datasets are published.
fn array(text: &[u8], name: &str, parse: impl Fn(&Value) -> Parsed) -> Result<Vec<Line>> {
    let rows: Vec<Value> = serde_json::from_slice(text)
        .map_err(|e| Failure::input(format!("{name}: no valid JSON array: {e}")))?;
    let rows = rows.iter().enumerate();
    Ok(rows
        .map(|(n, value)| Line { place: format!("{name}: element {n}"), row: parse(value) })
        .collect())
}

/// The file itself, or all data files below a folder, sorted.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let (mut open, mut found) = (vec![path.to_path_buf()], Vec::new());
    while let Some(dir) = open.pop() {
        let context = || format!("cannot read {}", dir.display());
        for entry in dir.read_dir().with_context(context)? {
            let path = entry.with_context(context)?.path();
            let data = path.extension().is_some_and(|e| e == "jsonl" || e == "json");
            if path.is_dir() {
                open.push(path);
            } else if data {
                found.push(path);
            }
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(
            Failure::input(format!("{} has no .jsonl or .json file", path.display())).into()
        );
    }
    Ok(found)
}

/// The file as the recipe's author knows it.
fn shown(input: &Input, path: &Path) -> String {
    match path.strip_prefix(&input.path) {
        Ok(below) if below.as_os_str().is_empty() => input.origin.clone(),
        Ok(below) => {
            let below = below.display().to_string();
            match input.origin.ends_with(&below) {
                true => input.origin.clone(),
                false => format!("{}/{below}", input.origin.trim_end_matches('/')),
            }
        }
        Err(_) => input.origin.clone(),
    }
}

/// One JSON object as a row.
fn row(value: &Value, format: Format) -> Result<Row, String> {
    let Some(map) = value.as_object() else { return Err("a row is a JSON object".into()) };
    let has = |key: &str| map.contains_key(key);
    let format = match format {
        Format::Auto if has("messages") => Format::Messages,
        Format::Auto if has("conversations") => Format::ShareGpt,
        Format::Auto if has("instruction") => Format::Alpaca,
        Format::Auto if has("prompt") => Format::Completion,
        Format::Auto if has("text") => Format::Text,
        Format::Auto => {
            let keys: Vec<&str> = map.keys().map(String::as_str).collect();
            return Err(format!(
                "none of `messages`, `conversations`, `instruction`, `prompt`, `text`; it has {}",
                if keys.is_empty() { "no key".into() } else { keys.join(", ") }
            ));
        }
        named => named,
    };
    let text = |key: &str| match map.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}` is {}, expected text", kind(other))),
        None => Err(format!("no `{key}`")),
    };
    let optional = |key: &str| match map.get(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(_) => text(key),
    };
    match format {
        Format::Auto => unreachable!("resolved above"),
        Format::Text => text("text").map(Row::Text),
        Format::Messages => turns(map.get("messages"), "messages", "role", "content"),
        Format::ShareGpt => turns(map.get("conversations"), "conversations", "from", "value"),
        Format::Completion => Ok(Row::Messages(vec![
            turn("user", text("prompt")?),
            turn("assistant", text("completion")?),
        ])),
        Format::Alpaca => {
            let (instruction, input) = (text("instruction")?, optional("input")?);
            let asked = match input.trim().is_empty() {
                true => instruction,
                false => format!("{instruction}\n\n{input}"),
            };
            let system = optional("system")?;
            let mut turns = Vec::new();
            if !system.trim().is_empty() {
                turns.push(turn("system", system));
            }
            turns.extend([turn("user", asked), turn("assistant", text("output")?)]);
            Ok(Row::Messages(turns))
        }
    }
}

/// The numbers of a row that its dataset is to keep.
fn numbers(value: &Value, columns: &[String]) -> Result<Columns, String> {
    let number = |name: &String| match value.get(name) {
        Some(Value::Number(number)) => Ok((name.clone(), number.clone())),
        Some(other) => Err(format!("`{name}` is {}, expected a number", kind(other))),
        None => Err(format!("no `{name}`, a column that is to be kept")),
    };
    columns.iter().map(number).collect()
}

fn turns(list: Option<&Value>, key: &str, role: &str, content: &str) -> Result<Row, String> {
    let list = list.ok_or_else(|| format!("no `{key}`"))?;
    let list =
        list.as_array().ok_or_else(|| format!("`{key}` is {}, expected a list", kind(list)))?;
    let turns = list.iter().enumerate().map(|(n, one)| {
        let text = |what: &str| {
            one.get(what)
                .and_then(Value::as_str)
                .ok_or_else(|| format!("turn {} has no text `{what}`", n + 1))
        };
        let said = text(role)?;
        let role = match said {
            "system" => "system",
            "user" | "human" => "user",
            "assistant" | "gpt" | "model" | "chatgpt" => "assistant",
            other => {
                return Err(format!(
                    "turn {} is by `{other}`; system, user and assistant are known",
                    n + 1
                ));
            }
        };
        Ok(turn(role, text(content)?.to_string()))
    });
    Ok(Row::Messages(turns.collect::<Result<_, String>>()?))
}

fn turn(role: &str, content: String) -> Message {
    Message { role: role.into(), content }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn auto(value: Value) -> String {
        match row(&value, Format::Auto) {
            Ok(row) => row.to_json(),
            Err(what) => format!("error: {what}"),
        }
    }

    #[test]
    fn every_form_becomes_the_same_row() {
        let expected =
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        for form in [
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            json!({"instruction": "a", "input": "", "output": "b"}),
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            json!({"prompt": "a", "completion": "b"}),
        ] {
            assert_eq!(auto(form.clone()), expected, "{form}");
        }
        assert_eq!(auto(json!({"text": "a"})), r#"{"text":"a"}"#);
        assert!(
            auto(json!({"instruction": "a", "input": "x", "output": "b"})).contains(r#""a\n\nx""#)
        );
    }

    #[test]
    fn what_is_wrong_with_a_row_is_said() {
        for (value, said) in [
            (json!([]), "error: a row is a JSON object"),
            (
                json!({"question": 1}),
                "error: none of `messages`, `conversations`, `instruction`, `prompt`, `text`; it has question",
            ),
            (json!({"messages": 3}), "error: `messages` is a number, expected a list"),
            (
                json!({"messages": [{"role": "robot", "content": ""}]}),
                "error: turn 1 is by `robot`; system, user and assistant are known",
            ),
            (json!({"messages": [{"role": "user"}]}), "error: turn 1 has no text `content`"),
            (json!({"instruction": "a"}), "error: no `output`"),
            (
                json!({"prompt": "a", "completion": null}),
                "error: `completion` is null, expected text",
            ),
        ] {
            assert_eq!(auto(value), said);
        }
    }

    #[test]
    fn lines_are_counted_as_editors_count_them() {
        let lines = json_lines(b"{\"text\":\"a\"}\n\n{\"text\":\n", "x.jsonl", |value| {
            Ok((row(value, Format::Auto)?, Columns::new()))
        });
        let said: Vec<String> = lines
            .into_iter()
            .map(|l| format!("{} {}", l.place, l.row.map_or_else(|e| e, |(row, _)| row.to_json())))
            .collect();
        assert_eq!(
            said,
            [
                "x.jsonl:1 {\"text\":\"a\"}",
                "x.jsonl:3 no valid JSON: EOF while parsing a value at column 8"
            ]
        );
    }
}
