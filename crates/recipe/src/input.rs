//! What a string in an input field means: a target here, one elsewhere, or a file.
//!
//! Knows nothing of whether it exists.

use std::path::PathBuf;

/// An input, as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InputRef {
    /// `base`, or `recipe/base`.
    Target { recipe: Option<String>, target: String },
    /// `./rows.jsonl`, `../site`: relative to the recipe's folder.
    Path(PathBuf),
}

impl InputRef {
    /// Every string is one or the other: a path begins with a dot or a slash.
    pub fn parse(text: &str) -> Self {
        if text.starts_with(['.', '/']) {
            return InputRef::Path(text.into());
        }
        match text.split_once('/') {
            Some((recipe, target)) => {
                InputRef::Target { recipe: Some(recipe.into()), target: target.into() }
            }
            None => InputRef::Target { recipe: None, target: text.into() },
        }
    }
}
