//! A mistake in a file, shown at its place.
//!
//! Knows nothing of what the file means. Colour is a choice of whoever shows it; everything that
//! is said is said without it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};
use step::Failure;

use crate::Span;

/// Something wrong at a place in a file, what it is, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    pub source: Arc<Source>,
    /// `None` where the file as a whole is meant.
    pub span: Option<Span>,
    /// Lower case, one sentence without a full stop.
    pub message: String,
    /// A few words under the place itself.
    pub label: Option<Box<str>>,
    /// What to do next.
    pub hint: Option<String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

/// A file that can be pointed into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub path: PathBuf,
    pub text: String,
}

impl Source {
    pub fn new(path: &Path, text: &str) -> Arc<Self> {
        Arc::new(Self { path: path.to_path_buf(), text: text.to_string() })
    }
}

impl Diagnostic {
    /// A mistake at a place. A span that does not fit the text is moved to where it does.
    pub fn at(source: &Arc<Source>, span: Span, message: impl Into<String>) -> Self {
        let span = on_boundaries(&source.text, span);
        Self { span: Some(span), source: source.clone(), ..Self::of_file(&source.path, message) }
    }

    /// A mistake of the file as a whole, or one that keeps it from being read.
    pub fn of_file(path: &Path, message: impl Into<String>) -> Self {
        Self {
            source: Source::new(path, ""),
            span: None,
            message: message.into(),
            label: None,
            hint: None,
            notes: Vec::new(),
        }
    }

    pub fn label(mut self, label: impl Into<Box<str>>) -> Self {
        self.label = Some(label.into());
        self
    }

    pub fn help(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// The same with the path as people see it from `root`, if it lies inside.
    pub fn relative_to(mut self, root: &Path) -> Self {
        if let Ok(inside) = self.source.path.strip_prefix(root) {
            self.source = Source::new(inside, &self.source.text);
        }
        self
    }

    /// `recipes/demo.toml:12:1`; line and column count from 1, columns in characters.
    pub fn place(&self) -> String {
        let path = self.source.path.display();
        match &self.span {
            None => path.to_string(),
            Some(span) => {
                let before = &self.source.text[..span.start];
                let line_start = before.rfind('\n').map_or(0, |at| at + 1);
                let line = before.matches('\n').count() + 1;
                let column = before[line_start..].chars().count() + 1;
                format!("{path}:{line}:{column}")
            }
        }
    }

    /// As rustc shows its errors: message, place, line, caret, help. No line feed at the end.
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let path = self.source.path.display().to_string();
        let mut report = match &self.span {
            None => Level::ERROR.primary_title(&self.message).element(Origin::path(path.as_str())),
            Some(span) => Level::ERROR.primary_title(&self.message).element(
                Snippet::source(&self.source.text).path(path.as_str()).annotation(
                    AnnotationKind::Primary.span(span.clone()).label(self.label.as_deref()),
                ),
            ),
        };
        for note in &self.notes {
            report = report.element(Level::NOTE.message(note));
        }
        if let Some(hint) = &self.hint {
            report = report.element(Level::HELP.message(hint));
        }
        renderer.render(&[report])
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostic {}

/// In one line, for where there is no room for a picture.
impl From<Diagnostic> for Failure {
    fn from(diagnostic: Diagnostic) -> Self {
        let failure = Failure::input(format!("{}: {}", diagnostic.place(), diagnostic.message));
        Failure { hint: diagnostic.hint, ..failure }
    }
}

/// `span` inside `text`, moved outwards to whole characters, so that no caller can make it panic.
fn on_boundaries(text: &str, span: Span) -> Span {
    let start = text.floor_char_boundary(span.start);
    let end = text.ceil_char_boundary(span.end.max(start));
    start..end
}
