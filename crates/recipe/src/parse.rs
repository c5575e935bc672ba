//! From TOML with spans to a [`Recipe`].
//!
//! Knows the shape of a recipe: tables with a `step` and keys. What the keys mean, it does not.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Number, Value};
use toml::de::{DeTable, DeValue};

use crate::{Diagnostic, Entry, Recipe, Source, Span, Spanned, Table, matrix, nearest};

type At<'i, T> = toml::Spanned<T>;

pub(crate) fn recipe(path: &Path, text: &str) -> Result<Recipe, Diagnostic> {
    let parser = Parser { source: Source::new(path, text) };
    let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    if let Err(why) = check_name(name) {
        return Err(Diagnostic::of_file(
            path,
            format!("`{name}` cannot be a recipe's name: {why}"),
        )
        .help(NAME_RULE));
    }
    let root = DeTable::parse(text).map_err(|e| parser.not_toml(&e))?;
    let mut targets: Vec<Table> = Vec::new();
    let mut names = HashMap::new();
    for (key, value) in in_order(root.get_ref()) {
        for table in matrix::expand(parser.table(&key, value)?, &parser.source)? {
            // Targets become folders, and some disks cannot tell `A` from `a`.
            if let Some(twin) = names.insert(table.name.to_lowercase(), table.name.clone()) {
                let how = if twin == table.name { "are the same" } else { "differ only in case" };
                let message = format!("`{}` and `{twin}` {how}", table.name);
                let error = parser.error(table.header, message);
                return Err(error.help("give one of them another name"));
            }
            targets.push(table);
        }
    }
    if targets.is_empty() {
        return Err(Diagnostic::of_file(path, "the recipe has no targets")
            .help("a target is a table with a step: `[base]`, then `step = \"…\"`"));
    }
    Ok(Recipe {
        name: name.into(),
        path: path.into(),
        about: about(text),
        places: targets.iter().map(|t| t.name.clone()).zip(0..).collect(),
        targets,
        source: parser.source,
    })
}

/// Whether `text` can be the name of a recipe or a target: it becomes a folder's name, and a word
/// on the command line.
pub fn is_name(text: &str) -> bool {
    check_name(text).is_ok()
}

pub(crate) const NAME_RULE: &str =
    "names are letters, digits, `-` and `_`, and begin with a letter or a digit";

pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: &char| c.is_alphanumeric() || matches!(c, '-' | '_');
    match name.chars().next() {
        None => Err("it is empty".into()),
        Some(first @ ('-' | '_')) => Err(format!("it begins with `{first}`")),
        Some(_) if name.len() > 100 => Err("it is longer than 100 bytes".into()),
        Some(_) => match name.chars().find(|c| !allowed(c)) {
            Some(' ') => Err("it holds a space".into()),
            Some(c) => Err(format!("it holds `{}`", c.escape_debug())),
            None => Ok(()),
        },
    }
}

/// The text of the comment that a recipe begins with.
fn about(text: &str) -> Option<String> {
    let line = text.trim_start_matches('\u{feff}').lines().next()?;
    let words = line.strip_prefix('#')?.trim();
    (!words.is_empty()).then(|| words.to_string())
}

struct Parser {
    source: Arc<Source>,
}

impl Parser {
    fn error(&self, span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic::at(&self.source, span, message)
    }

    fn not_toml(&self, error: &toml::de::Error) -> Diagnostic {
        let span = error.span().unwrap_or(0..0);
        match (error.message(), self.source.text.get(span.clone())) {
            ("duplicate key", Some(key)) => self
                .error(span.clone(), format!("`{key}` is written twice"))
                .help("rename one of them, or take it away"),
            (message, _) => self.error(span, message).label("not valid TOML here"),
        }
    }

    fn table(
        &self,
        name: &Spanned<String>,
        value: &At<'_, DeValue<'_>>,
    ) -> Result<Table, Diagnostic> {
        let header = name.span.clone();
        let name = &name.value;
        let table = match value.get_ref() {
            DeValue::Table(table) => table,
            DeValue::Array(items) if items.iter().all(|i| i.get_ref().is_table()) => {
                return Err(self
                    .error(header, format!("`[[{name}]]` is a list of tables"))
                    .help(format!("a target is one table: write `[{name}]`")));
            }
            _ => {
                return Err(self
                    .error(header, format!("`{name}` stands outside of any target"))
                    .help("every key belongs below a target's header, such as `[base]`"));
            }
        };
        if let Err(why) = check_name(name) {
            let message = format!("`{name}` cannot be a target's name: {why}");
            return Err(self.error(header, message).help(NAME_RULE));
        }
        let mut step = None;
        let mut entries = Vec::new();
        for (key, value) in in_order(table) {
            let entry = self.entry(key, value)?;
            if entry.key.value != "step" {
                entries.push(entry);
                continue;
            }
            let Value::String(text) = entry.value.value else {
                return Err(self
                    .error(entry.value.span, "`step` is a string")
                    .help("for example `step = \"merge/lora\"`"));
            };
            step = Some(Spanned { value: text, span: entry.value.span });
        }
        let Some(step) = step else {
            return Err(self.without_step(name, header, table, &entries));
        };
        Ok(Table { name: name.clone(), matrix: None, header, step, entries })
    }

    fn without_step(
        &self,
        name: &str,
        header: Span,
        table: &DeTable<'_>,
        entries: &[Entry],
    ) -> Diagnostic {
        let error = self.error(header, format!("`{name}` has no `step`"));
        if let Some(inner) = entries.iter().find(|e| e.value.value.get("step").is_some()) {
            let inner = &inner.key.value;
            return error
                .label("this is a table inside a table")
                .help(format!("a target's header is one word: `[{name}-{inner}]`"));
        }
        let keys = table.keys().map(|k| k.get_ref().as_ref());
        match nearest("step", keys) {
            Some(key) => error.help(format!("did you mean `step` where `{key}` is written?")),
            None => error.help("say how it is made: `step = \"…\"`"),
        }
    }

    fn entry(
        &self,
        key: Spanned<String>,
        value: &At<'_, DeValue<'_>>,
    ) -> Result<Entry, Diagnostic> {
        let mut nested = Vec::new();
        let json = self.value(value, &mut Vec::new(), &mut nested)?;
        Ok(Entry { key, value: Spanned { value: json, span: value.span() }, nested })
    }

    /// TOML to JSON. `path` leads here; every value below is noted in `nested`.
    fn value(
        &self,
        value: &At<'_, DeValue<'_>>,
        path: &mut Vec<String>,
        nested: &mut Vec<(Vec<String>, Span)>,
    ) -> Result<Value, Diagnostic> {
        if !path.is_empty() {
            nested.push((path.clone(), value.span()));
        }
        Ok(match value.get_ref() {
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Boolean(yes) => Value::Bool(*yes),
            DeValue::Integer(number) => {
                let parsed = i64::from_str_radix(number.as_str(), number.radix());
                let parsed = parsed.map_err(|_| {
                    self.error(value.span(), format!("{number} does not fit in 64 bits"))
                })?;
                Value::Number(parsed.into())
            }
            DeValue::Float(number) => {
                let parsed = number.as_str().parse().ok().and_then(Number::from_f64);
                Value::Number(parsed.ok_or_else(|| {
                    self.error(value.span(), format!("{number} is not a finite number"))
                })?)
            }
            DeValue::Datetime(date) => {
                return Err(self
                    .error(value.span(), "dates are not values of a recipe")
                    .help(format!("write it as a string: \"{date}\"")));
            }
            DeValue::Array(items) => {
                let mut out = Vec::new();
                for (i, item) in items.iter().enumerate() {
                    path.push(i.to_string());
                    out.push(self.value(item, path, nested)?);
                    path.pop();
                }
                Value::Array(out)
            }
            DeValue::Table(table) => {
                let mut out = Map::new();
                for (key, item) in in_order(table) {
                    path.push(key.value.clone());
                    out.insert(key.value, self.value(item, path, nested)?);
                    path.pop();
                }
                Value::Object(out)
            }
        })
    }
}

/// The keys of a table in the order of the file.
fn in_order<'t, 'i>(table: &'t DeTable<'i>) -> Vec<(Spanned<String>, &'t At<'i, DeValue<'i>>)> {
    let mut all: Vec<_> = table
        .iter()
        .map(|(k, v)| (Spanned { value: k.get_ref().to_string(), span: k.span() }, v))
        .collect();
    all.sort_by_key(|(key, _)| key.span.start);
    all
}
