//! The vocabulary: what a digest, a tree, an action, a step and a worker are.
//!
//! Knows nothing of recipes, of where artifacts lie, or of how any step does its work.
//! It changes rarely: every other crate is built on it.

pub mod action;
pub mod canonical;
pub mod definition;
pub mod digest;
pub mod failure;
pub mod kind;
pub mod tree;
pub mod worker;

pub use action::{Action, ActionResult, Provenance};
pub use definition::{
    Arity, Facts, Family, InputDef, Known, Memory, Needs, ParamError, Platform, Rebuild, Refusal,
    Saving, Step, StepDef,
};
pub use digest::{ActionKey, BlobDigest, CodeDigest, TreeDigest};
pub use failure::{Class, Failure};
pub use kind::Kind;
pub use tree::{Entry, Tree};
