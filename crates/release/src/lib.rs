//! A site as a release: its files by digest, the headers it is served with, its licences.
//!
//! Knows nothing of models, of the page's code, or of any host's interface.

pub mod headers;
pub mod hosts;
pub mod licence;
pub mod manifest;

pub use licence::Licence;
pub use manifest::{File, Manifest};

/// The file that decides which release a visitor gets: the only one whose bytes change in place.
pub const INDEX: &str = "index.html";
