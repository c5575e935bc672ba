//! The forms in which people write training rows, by the names they are known under.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a line of JSON says a conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Each line by the keys that it has.
    #[default]
    Auto,
    /// `{"messages": [{"role", "content"}]}`, as ChatML and OpenAI have it.
    Messages,
    /// `{"instruction", "input", "output"}`; `system` too where there is one.
    Alpaca,
    /// `{"conversations": [{"from", "value"}]}`.
    ShareGpt,
    /// `{"prompt", "completion"}`.
    Completion,
    /// `{"text"}`: no conversation, all of it is learned.
    Text,
}

/// What to do with a line that is no row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnBroken {
    /// Stop, and name file and line.
    #[default]
    Error,
    /// Leave it out, and count it in the report.
    Skip,
}
