//! What is said of an object: its size and headers, on what condition it is written.
//!
//! Knows nothing of how it travels.

use std::collections::BTreeMap;

/// An object as its store describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Object {
    /// Bytes.
    pub size: u64,
    /// What [`Condition::Still`] compares. In quotes, as stores write it.
    pub etag: String,
    pub content_type: Option<String>,
    pub content_encoding: Option<String>,
    pub cache_control: Option<String>,
    /// The `x-amz-meta-` headers, without that.
    pub metadata: BTreeMap<String, String>,
    /// SHA-256 of the whole, where it was written with one ([`Put::sha256`]).
    pub sha256: Option<[u8; 32]>,
}

/// An object in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Below the location's prefix.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

/// When an object is to be written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Condition {
    #[default]
    Always,
    /// If there is none of this name: the first one wins.
    New,
    /// If the one that is there still has this [`Object::etag`].
    Still(String),
}

/// How an object is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Put {
    pub condition: Condition,
    pub content_type: Option<String>,
    pub content_encoding: Option<String>,
    pub cache_control: Option<String>,
    pub metadata: BTreeMap<String, String>,
    /// Send and keep the SHA-256, which the store checks. An object that goes up in parts has a
    /// checksum for each part instead: whoever needs its SHA-256 later puts it in `metadata`.
    pub sha256: bool,
}

impl Put {
    pub fn when(condition: Condition) -> Self {
        Self { condition, ..Self::default() }
    }
}

/// What came of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// It is there, under this [`Object::etag`].
    Now(String),
    /// The condition does not hold. Also the answer where an earlier attempt of the same call was
    /// written and the answer to it lost: whoever needs to know looks at what is there.
    Refused,
}

impl Written {
    pub fn is_now(&self) -> bool {
        matches!(self, Written::Now(_))
    }
}
