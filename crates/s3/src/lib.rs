//! An S3 client: conditional writes, downloads that go on where they broke off, uploads in parts.
//!
//! Knows nothing of what it carries: not of artifacts, results or sites. Without the feature `client`
//! it is the words alone ([`Location`], [`Settings`]), and links nothing heavy.
//!
//! Names are below the location's prefix. Whatever goes wrong and may pass (5xx, 429, a connection
//! that drops, a body that ends early or arrives damaged) is tried again, with longer and longer
//! waits; what is left is a [`step::Failure`] that names the object and what to do. A missing object
//! and an unmet condition are answers, not failures. Memory is bounded: a download is handed on piece
//! by piece, an upload holds a few parts.
//!
//! Stores differ in conditional writes (some ignore them): ask [`Bucket::is_conditional`] first.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use step::Failure;

#[cfg(feature = "client")]
mod client;
#[cfg(feature = "client")]
mod fault;
#[cfg(feature = "client")]
mod object;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "client")]
mod transfer;

#[cfg(feature = "client")]
pub use bytes::Bytes;
#[cfg(feature = "client")]
pub use client::Bucket;
#[cfg(feature = "client")]
pub use object::{Condition, Listed, Object, Put, Written};

/// A bucket, and the prefix that all names in it have: `s3://bucket/prefix`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Location {
    pub bucket: String,
    /// Without `/` at either end; may be empty.
    pub prefix: String,
}

impl Location {
    /// The whole key of `name`.
    pub fn key(&self, name: &str) -> String {
        match self.prefix.as_str() {
            "" => name.to_string(),
            prefix => format!("{prefix}/{name}"),
        }
    }
}

impl FromStr for Location {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let wrong = |what: &str| {
            Failure::input(format!("`{text}` is no place in S3: {what}"))
                .hint("write it as `s3://bucket/prefix`")
        };
        let rest = text.strip_prefix("s3://").ok_or_else(|| wrong("it begins otherwise"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if bucket.len() < 3 || !bucket.chars().all(allowed) {
            return Err(wrong("the bucket's name"));
        }
        let prefix = prefix.trim_end_matches('/');
        if !prefix.is_empty() && prefix.split('/').any(|part| ["", ".", ".."].contains(&part)) {
            return Err(wrong("the prefix"));
        }
        Ok(Self { bucket: bucket.into(), prefix: prefix.into() })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        Ok(())
    }
}

impl TryFrom<String> for Location {
    type Error = Failure;

    fn try_from(text: String) -> Result<Self, Failure> {
        text.parse()
    }
}

impl From<Location> for String {
    fn from(location: Location) -> Self {
        location.to_string()
    }
}

/// Where a store is, if it is not AWS or the environment does not say. Credentials are found as other
/// AWS programs find them: variables, profiles, web identity, the machine's role.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `https://s3.example.org`: a store that is not AWS.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// The bucket is the first part of the path and not of the host's name.
    pub path_style: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_bucket_and_a_prefix() {
        for (text, key) in [
            ("s3://models", "a/b"),
            ("s3://models/", "a/b"),
            ("s3://models/team", "team/a/b"),
            ("s3://my.models-1/a team/x/", "a team/x/a/b"),
        ] {
            let location: Location = text.parse().unwrap();
            assert_eq!(location.key("a/b"), key);
            assert_eq!(location.to_string(), text.trim_end_matches('/'));
        }
        for text in ["models", "https://models/x", "s3://", "s3://a", "s3://a b c/", "s3://abc//x"]
        {
            let failure = text.parse::<Location>().unwrap_err();
            assert!(failure.message.contains(text), "{failure}");
            assert!(failure.hint.is_some());
        }
    }
}
