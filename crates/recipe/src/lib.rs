//! TOML text to Recipe, with a source span for everything that may have to be pointed at.
//!
//! Knows no step kind: which keys a table may have, and what they mean, is for others to say.

mod diagnostic;
mod input;
mod lock;
mod matrix;
mod parse;
mod suggest;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use diagnostic::{Diagnostic, Source};
pub use input::InputRef;
pub use lock::{Lock, PinnedResult};
pub use parse::is_name;
pub use suggest::nearest;

/// A range of bytes in a recipe's text.
pub type Span = std::ops::Range<usize>;

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spanned<T> {
    pub value: T,
    pub span: Span,
}

/// A recipe file: one table an artifact.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The file's name without `.toml`.
    pub name: String,
    pub path: PathBuf,
    /// The whole file, for diagnostics.
    pub source: Arc<Source>,
    /// Its first line, where that is a comment: what the recipe is for.
    pub about: Option<String>,
    /// In the order of the file.
    pub targets: Vec<Table>,
    /// Where each stands among them.
    pub(crate) places: HashMap<String, usize>,
}

/// What makes one artifact.
#[derive(Debug, Clone)]
pub struct Table {
    /// The word that is typed after `build`.
    pub name: String,
    /// The word in the header, where a matrix made several targets of it.
    pub matrix: Option<String>,
    /// The name, where it stands in the header.
    pub header: Span,
    /// `merge/lora`.
    pub step: Spanned<String>,
    /// All keys but `step`, in the order of the file.
    pub entries: Vec<Entry>,
}

/// A key of a table with its value, as JSON.
#[derive(Debug, Clone)]
pub struct Entry {
    pub key: Spanned<String>,
    pub value: Spanned<Value>,
    /// Where each nested key and element stands, by its path below `value`.
    pub(crate) nested: Vec<(Vec<String>, Span)>,
}

impl Recipe {
    /// Reads the recipe at `path`.
    pub fn load(path: &Path) -> Result<Self, Diagnostic> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(e) => Err(Diagnostic::of_file(path, format!("cannot read the recipe: {e}"))),
        }
    }

    /// Reads `text`, the content of `path`. The first mistake is the one that is told.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Diagnostic> {
        parse::recipe(path, text)
    }

    pub fn target(&self, name: &str) -> Option<&Table> {
        self.places.get(name).map(|place| &self.targets[*place])
    }

    /// The targets that a matrix made of the table `name`; none where it has no matrix.
    pub fn variants<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Table> {
        self.targets.iter().filter(move |t| t.matrix.as_deref() == Some(name))
    }

    /// A mistake at a place in this recipe.
    pub fn diagnostic(&self, span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic::at(&self.source, span, message)
    }

    /// Where the value of `path` stands in a target's table: `rank`, `split.train`, `models[1]`.
    /// If that exact place is not written, the nearest one around it that is; `None` if not even
    /// the key is there.
    pub fn span_of(&self, target: &str, path: &str) -> Option<Span> {
        let table = self.target(target)?;
        let key = |e: &&Entry| {
            let rest = path.strip_prefix(e.key.value.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        // Keys may hold dots themselves, so the longest one that fits is meant.
        let entry = table.entries.iter().filter(key).max_by_key(|e| e.key.value.len())?;
        let rest = &path[entry.key.value.len()..];
        let mut best = (0, entry.value.span.clone());
        for (parts, span) in &entry.nested {
            let fits = is_prefix(parts, rest);
            if fits && parts.len() > best.0 {
                best = (parts.len(), span.clone());
            }
        }
        Some(best.1)
    }
}

impl Entry {
    /// Where a nested value stands: keys, or indices as text. The nearest place around it that is
    /// written, if it is not.
    pub fn span_of(&self, path: &[&str]) -> Span {
        let exact = |parts: &[&str]| self.nested.iter().find(|(p, _)| p == parts);
        (1..=path.len())
            .rev()
            .find_map(|n| exact(&path[..n]))
            .map_or(self.value.span.clone(), |(_, span)| span.clone())
    }
}

/// Whether `text` (`.a.b`, `[0].c`, `.0.c`) begins with these parts.
fn is_prefix(parts: &[String], mut text: &str) -> bool {
    for part in parts {
        let dotted = text.strip_prefix('.').and_then(|t| t.strip_prefix(part.as_str()));
        let indexed = text.strip_prefix('[').and_then(|t| t.strip_prefix(part.as_str()));
        match dotted.or(indexed.and_then(|t| t.strip_prefix(']'))) {
            Some(rest) if rest.is_empty() || rest.starts_with(['.', '[']) => text = rest,
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests;
