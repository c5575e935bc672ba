//! `source/url`: one file from a URL, pinned by its SHA-256.
//!
//! Knows nothing of what is in the file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, ParamError, Step};

/// The parameters of `source/url`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Url {
    pub url: String,
    /// 64 lower-case hexadecimal digits. Part of the recipe, so no lock is needed.
    pub sha256: String,
    /// The file's name here; the last part of the URL's path when left out.
    #[serde(default)]
    pub name: Option<String>,
}

impl Url {
    /// The name that the file gets.
    pub fn file_name(&self) -> &str {
        let path = self.url.split(['?', '#']).next().unwrap_or_default();
        self.name.as_deref().unwrap_or_else(|| path.rsplit('/').next().unwrap_or_default())
    }
}

impl Step for Url {
    const NAME: &'static str = "source/url";
    const ABOUT: &'static str = "One file from a URL, pinned by its SHA-256.";
    const INPUTS: &'static [InputDef] = &[];
    const OUTPUT: Kind = Kind::Files;
    const NETWORK: bool = true;

    fn validate(&self) -> Result<(), ParamError> {
        if !self.url.starts_with("https://") && !self.url.starts_with("http://") {
            return Err(ParamError::at("url", format!("`{}` is no http(s) URL", self.url)));
        }
        let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if self.sha256.len() != 64 || !self.sha256.chars().all(hex) {
            return Err(ParamError::at("sha256", "expected 64 lower-case hexadecimal digits"));
        }
        let name = self.file_name();
        if name.is_empty() || name.contains(['/', '\\']) || name == "." || name == ".." {
            return Err(ParamError::at("name", format!("`{name}` is no file name"))
                .hint("add `name = \"…\"`"));
        }
        Ok(())
    }
}
