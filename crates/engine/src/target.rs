//! A target's name: a recipe and a table in it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `demo/site`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TargetId {
    pub recipe: String,
    pub target: String,
}

impl TargetId {
    pub fn new(recipe: impl Into<String>, target: impl Into<String>) -> Self {
        Self { recipe: recipe.into(), target: target.into() }
    }
}

impl fmt::Display for TargetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.recipe, self.target))
    }
}

impl From<TargetId> for String {
    fn from(id: TargetId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for TargetId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('/') {
            Some((recipe, target)) if !recipe.is_empty() && !target.is_empty() => {
                Ok(Self::new(recipe, target))
            }
            _ => Err(format!("`{text}` is not a target: expected `recipe/target`")),
        }
    }
}
