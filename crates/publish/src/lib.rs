//! Steps that hand a site out, and the check of one that is live.
//!
//! The light half: where to, and what can be asked of it. What is published is a release as
//! `crates/release` describes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use step::{Family, StepDef};

pub mod s3;

pub static FAMILY: Family =
    Family { name: "publish", steps: &[StepDef::of::<s3::S3>()], build_tools: &[] };

/// The name by which the worker is asked to look at a live site: a target it is not.
pub const CHECK: &str = "publish/check";

/// The document with which the next release is compared.
pub const FIGURES: &str = "release.json";

/// What can be asked of a target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Makes the site what visitors get.
    Publish {
        /// Only tell what would be done.
        dry_run: bool,
        /// What is kept beside the release, such as its provenance: names and texts.
        documents: BTreeMap<String, String>,
    },
    /// Which releases are there, and the figures ([`FIGURES`]) of the current.
    Releases,
    /// Makes an earlier release what visitors get: this one, or that before the current.
    Rollback { release: Option<String> },
    /// Brings bucket and distribution into the state that a site needs.
    Setup,
}

/// A live site to be looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    pub url: String,
    /// The release that is to be there; whichever is, if it is not said.
    pub release: Option<String>,
}
