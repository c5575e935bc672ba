//! `publish/s3`: a site in an S3 bucket, and in front of it CloudFront.
//!
//! Knows nothing of the AWS SDK: where to, and what a recipe can get wrong about it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, ParamError, Step};

/// The parameters of `publish/s3`. Credentials are found as other AWS programs find them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct S3 {
    pub bucket: String,
    /// The folder in the bucket; its top if left out.
    #[serde(default)]
    pub prefix: String,
    #[serde(default)]
    pub region: Option<String>,
    /// A store that is not AWS: `https://s3.example.org`.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// The bucket is the first part of the path and not of the host's name.
    #[serde(default)]
    pub path_style: bool,
    /// The CloudFront distribution in front of it, by its id: `cargo xtask publish setup` makes one.
    #[serde(default)]
    pub distribution: Option<String>,
    /// Where visitors find it: looked at when all is done.
    #[serde(default)]
    pub url: Option<String>,
}

impl Step for S3 {
    const NAME: &'static str = "publish/s3";
    const ABOUT: &'static str = "A site in an S3 bucket, and in front of it CloudFront.";
    const INPUTS: &'static [InputDef] = &[InputDef::one("site", &[Kind::Site])];
    const OUTPUT: Kind = Kind::Files;
    const NETWORK: bool = true;
    const ACTS: bool = true;

    fn validate(&self) -> Result<(), ParamError> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(c);
        if !(3..=63).contains(&self.bucket.len()) || !self.bucket.chars().all(plain) {
            let message = format!("`{}` is no name of a bucket", self.bucket);
            return Err(ParamError::at("bucket", message)
                .hint("3 to 63 lower-case letters, digits, `-` and `.`"));
        }
        let part = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !self.prefix.is_empty() && !self.prefix.split('/').all(part) {
            return Err(ParamError::at("prefix", format!("`{}` is no folder", self.prefix))
                .hint("write it as `a/folder`, without `/` at its ends"));
        }
        for (key, value) in [("endpoint", &self.endpoint), ("url", &self.url)] {
            let http =
                |value: &String| value.starts_with("https://") || value.starts_with("http://");
            if let Some(value) = value.as_ref().filter(|value| !http(value)) {
                return Err(ParamError::at(key, format!("`{value}` is no http(s) URL")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::StepDef;

    use super::*;

    #[test]
    fn what_a_recipe_gets_wrong_is_named() {
        for (params, path) in [
            (json!({"bucket": "my-site"}), None),
            (json!({"bucket": "my-site", "prefix": "a/b", "url": "https://x.org/"}), None),
            (json!({"bucket": "My Site"}), Some("bucket")),
            (json!({"bucket": "my-site", "prefix": "/a"}), Some("prefix")),
            (json!({"bucket": "my-site", "prefix": "a/../b"}), Some("prefix")),
            (json!({"bucket": "my-site", "url": "x.org"}), Some("url")),
        ] {
            let Value::Object(map) = params.clone() else { unreachable!("tests pass objects") };
            let found = (StepDef::of::<S3>().resolve)(map).err().map(|error| error.path);
            assert_eq!(found.as_deref(), path, "{params}");
        }
    }
}
