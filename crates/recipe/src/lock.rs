//! The file beside a recipe that pins what lies outside, and results that cannot be made anywhere
//! again: `demo.lock`. Meant to be committed.
//!
//! Knows nothing of what a pin says. The bytes depend on the pins alone: sorted, no times.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use step::{ActionKey, BlobDigest, Failure, TreeDigest};

use crate::{Diagnostic, Source};

/// The version of the file.
const VERSION: u32 = 1;

const HEAD: &str =
    "# Written by `cargo xtask lock`. Commit it: it says which bytes the recipe means.\n";

/// The pins of one recipe's targets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Lock {
    pins: BTreeMap<String, Pin>,
    results: BTreeMap<String, PinnedResult>,
}

/// A target's artifact, named by its bytes for those who cannot make it: another processor, a
/// machine without a GPU, a build without the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedResult {
    /// The action whose result it is.
    pub action: ActionKey,
    /// Of what recipes and files say of it and of all that it is made of. Another one makes it stale,
    /// which can be seen without making anything.
    pub declared: BlobDigest,
    pub tree: TreeDigest,
    /// Of the folder as a Nix archive.
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pin {
    /// The parameters that the pin was made for: other ones need another pin.
    asked: Value,
    pin: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    target: BTreeMap<String, Pin>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    results: BTreeMap<String, PinnedResult>,
}

impl Lock {
    /// Reads the file at `path`. One that is not there holds no pins.
    pub fn load(path: &Path) -> Result<Self, Diagnostic> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(Diagnostic::of_file(path, format!("cannot read the lock: {e}"))),
        };
        let wrong = |e: toml::de::Error| {
            let span = e.span().unwrap_or(0..0);
            Diagnostic::at(&Source::new(path, &text), span, e.message()).help(
                "take the last good version out of git, or remove it and run `cargo xtask lock`",
            )
        };
        // The version first: a newer file may well have fields that this program does not know.
        let table: toml::Table = toml::from_str(&text).map_err(wrong)?;
        let version = table.get("version").and_then(toml::Value::as_integer);
        if let Some(newer) = version.filter(|v| *v > i64::from(VERSION)) {
            let message = format!("the lock is of version {newer}, this program knows {VERSION}");
            return Err(Diagnostic::of_file(path, message).help("update Anneal"));
        }
        let file: File = toml::from_str(&text).map_err(wrong)?;
        Ok(Self { pins: file.target, results: file.results })
    }

    /// A target's pin, if it was made for these parameters.
    pub fn pin(&self, target: &str, asked: &Value) -> Option<Value> {
        let pin = self.pins.get(target)?;
        (pin.asked == without_nulls(asked)).then(|| pin.pin.clone())
    }

    pub fn set(&mut self, target: &str, asked: &Value, pin: &Value) {
        let pin = Pin { asked: without_nulls(asked), pin: without_nulls(pin) };
        self.pins.insert(target.into(), pin);
    }

    /// A target's pinned result.
    pub fn result(&self, target: &str) -> Option<&PinnedResult> {
        self.results.get(target)
    }

    /// Pins a target's result, or forgets the one that is pinned.
    pub fn set_result(&mut self, target: &str, result: Option<PinnedResult>) {
        match result {
            Some(result) => _ = self.results.insert(target.into(), result),
            None => _ = self.results.remove(target),
        }
    }

    /// Forgets the pins of targets that are not among `names`.
    pub fn retain<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        let names: Vec<&str> = names.into_iter().collect();
        self.pins.retain(|target, _| names.contains(&target.as_str()));
        self.results.retain(|target, _| names.contains(&target.as_str()));
    }

    /// The file's bytes.
    pub fn to_text(&self) -> String {
        let file =
            File { version: VERSION, target: self.pins.clone(), results: self.results.clone() };
        let body = toml::to_string_pretty(&file).expect("JSON without nulls is TOML");
        format!("{HEAD}{body}")
    }

    /// Writes the file in one move, if it is not what is there already.
    pub fn save(&self, path: &Path) -> Result<(), Failure> {
        let text = self.to_text();
        if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                // Temporary files are private; this one is as public as the recipe beside it.
                let permissions = std::fs::metadata(path.with_extension("toml"))?.permissions();
                file.as_file().set_permissions(permissions)?;
                file.persist(path)?;
                Ok(())
            })
            .map_err(|e| Failure::environment(format!("cannot write {}: {e}", path.display())))
    }
}

/// TOML has no null: a key without a value is a key that is not there.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(_, v)| !v.is_null())
                .map(|(k, v)| (k.clone(), without_nulls(v)))
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}
