//! `site/chat`: a static page that asks a model in the visitor's browser.
//!
//! Knows nothing of the page's code: that is an input, as the model is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, ParamError, Step};

/// The parameters of `site/chat`: what the page says, and how it shows an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    /// The heading, and the name of the tab.
    pub title: String,
    /// A sentence or two below the heading.
    #[serde(default)]
    pub about: Option<String>,
    /// What stands in the field for questions while it is empty.
    #[serde(default = "placeholder")]
    pub placeholder: String,
    /// Questions to click on.
    #[serde(default)]
    pub examples: Vec<String>,
    #[serde(default)]
    pub answer: Answer,
    /// An answer that is longer is cut.
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: usize,
    /// The model's licence, where nothing that it was made of names one: `apache-2.0`.
    #[serde(default)]
    pub license: Option<String>,
}

/// What an answer is, and so how the page shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Text; a conversation goes on.
    #[default]
    Text,
    /// A crontab line: checked, said in words, with its next times. Each question stands alone.
    Crontab,
}

fn placeholder() -> String {
    "Ask something".into()
}

fn max_new_tokens() -> usize {
    64
}

impl Step for Chat {
    const NAME: &'static str = "site/chat";
    const ABOUT: &'static str = "A static page that asks a model in the visitor's browser.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::one("app", &[Kind::Files]),
        InputDef::one("model", &[Kind::OnnxModel]),
        InputDef::many("report", &[Kind::Metrics]),
        // What the model's licence asks to be handed on, beside what its folder brings.
        InputDef::many("notices", &[Kind::Files]),
    ];
    const OUTPUT: Kind = Kind::Site;
    const TOOLS: &'static [&'static str] = &["transformers-js"];

    fn validate(&self) -> Result<(), ParamError> {
        if self.title.trim().is_empty() {
            return Err(ParamError::at("title", "a page needs a title"));
        }
        if self.max_new_tokens == 0 {
            return Err(ParamError::at("max_new_tokens", "must be at least 1"));
        }
        match self.examples.iter().position(|e| e.trim().is_empty()) {
            Some(i) => Err(ParamError::at(format!("examples[{i}]"), "an example is a question")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::StepDef;

    use super::*;

    fn resolve(params: Value) -> Result<Value, ParamError> {
        let Value::Object(map) = params else { unreachable!("tests pass objects") };
        (StepDef::of::<Chat>().resolve)(map)
    }

    #[test]
    fn a_title_is_enough() {
        assert_eq!(
            resolve(json!({"title": "Crontab"})),
            Ok(json!({
                "title": "Crontab", "about": null, "placeholder": "Ask something", "examples": [],
                "answer": "text", "max_new_tokens": 64, "license": null
            }))
        );
    }

    #[test]
    fn what_a_recipe_gets_wrong_is_named() {
        for (params, path) in [
            (json!({"title": " "}), "title"),
            (json!({"title": "A", "max_new_tokens": 0}), "max_new_tokens"),
            (json!({"title": "A", "answer": "cron"}), "answer"),
            (json!({"title": "A", "examples": ["a", ""]}), "examples[1]"),
        ] {
            assert_eq!(resolve(params.clone()).unwrap_err().path, path, "{params}");
        }
    }
}
