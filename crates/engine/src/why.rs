//! Why a key differs: two actions, field by field, down to the file.
//!
//! It compares the very bytes that were hashed: actions, trees and code parts all lie in the store
//! under the digests that stand in the key.

use std::collections::BTreeMap;

use serde_json::Value;
use step::{Action, CodeDigest, TreeDigest};
use store::Store;

use crate::code::Parts;

/// One field of an action that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// `params.rank`, `inputs.base: model.safetensors`, `code: crates/merge/src/lora.rs`.
    pub field: String,
    /// `None` where it was not there.
    pub before: Option<String>,
    pub after: Option<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.before, &self.after) {
            (Some(before), Some(after)) => write!(f, "{}: {before} → {after}", self.field),
            (None, Some(after)) => write!(f, "{}: new, {after}", self.field),
            (Some(before), None) => write!(f, "{}: gone, was {before}", self.field),
            (None, None) => write!(f, "{}", self.field),
        }
    }
}

/// All differences between two actions, most telling first: step, parameters, inputs, code, tools.
pub fn differences(store: &Store, before: &Action, after: &Action) -> Vec<Difference> {
    let mut out = Vec::new();
    let mut field = |name: &str, a: Option<String>, b: Option<String>| {
        if a != b {
            out.push(Difference { field: name.into(), before: a, after: b });
        }
    };
    field("format", Some(before.format.to_string()), Some(after.format.to_string()));
    field("step", Some(before.step.clone()), Some(after.step.clone()));
    field("platform", before.platform.clone(), after.platform.clone());
    maps("tools", &before.tools, &after.tools, &mut field);
    maps("params", &flatten(&before.params), &flatten(&after.params), &mut field);
    for name in union(&before.inputs, &after.inputs) {
        let (a, b) = (before.inputs.get(&name), after.inputs.get(&name));
        if a == b {
            continue;
        }
        let known = a.zip(b).and_then(|(a, b)| files(store, *a).zip(files(store, *b)));
        match known {
            Some((a, b)) => maps(&format!("inputs.{name}: "), &a, &b, &mut field),
            None => field(&format!("inputs.{name}"), a.map(|d| d.short()), b.map(|d| d.short())),
        }
    }
    if before.code != after.code {
        match parts(store, before.code).zip(parts(store, after.code)) {
            Some((a, b)) => maps("code: ", &a, &b, &mut field),
            None => field("code", Some(before.code.short()), Some(after.code.short())),
        }
    }
    out
}

/// Told the name of a field and what it was on each side.
type Field<'a> = dyn FnMut(&str, Option<String>, Option<String>) + 'a;

fn maps(
    prefix: &str,
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
    field: &mut Field<'_>,
) {
    for key in union(before, after) {
        let name = match prefix {
            p if p.ends_with(' ') => format!("{p}{key}"),
            p => format!("{p}.{key}"),
        };
        field(&name, before.get(&key).cloned(), after.get(&key).cloned());
    }
}

fn union<V>(a: &BTreeMap<String, V>, b: &BTreeMap<String, V>) -> Vec<String> {
    let mut keys: Vec<String> = a.keys().chain(b.keys()).cloned().collect();
    keys.sort();
    keys.dedup();
    keys
}

/// Nested parameters with dots between their keys.
fn flatten(value: &Value) -> BTreeMap<String, String> {
    fn visit(path: &str, value: &Value, out: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    visit(&path, value, out);
                }
            }
            other => {
                out.insert(path.into(), other.to_string());
            }
        }
    }
    let mut out = BTreeMap::new();
    visit("", value, &mut out);
    out
}

fn files(store: &Store, tree: TreeDigest) -> Option<BTreeMap<String, String>> {
    let tree = store.tree(tree).ok()?;
    Some(tree.entries().iter().map(|e| (e.path.clone(), describe(e))).collect())
}

fn describe(entry: &step::Entry) -> String {
    format!("{} ({} bytes)", entry.digest.short(), entry.size)
}

fn parts(store: &Store, code: CodeDigest) -> Option<BTreeMap<String, String>> {
    let bytes = store.blob(step::BlobDigest::from_bytes(*code.as_bytes())).ok()?;
    let parts: Parts = serde_json::from_slice(&bytes).ok()?;
    let short = |text: String| text.chars().take(12).collect();
    Some(parts.into_iter().map(|(name, digest)| (name, short(digest))).collect())
}
