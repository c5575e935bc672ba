//! `release`: what stands beside a release. How each artifact came about, what is in it, and how large
//! and how good it is beside the last one.
//!
//! Knows nothing of where a release goes.

mod bill;
mod figures;
mod provenance;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use anyhow::Context;
use engine::{Engine, Graph, Origin, Status, TargetId};
use serde_json::Value;
use step::{Action, ActionResult, BlobDigest, Entry, Failure, Kind, Tree, TreeDigest};

pub use figures::Figures;

/// An artifact with all that is known of how it was made.
pub struct Made {
    pub id: TargetId,
    pub kind: Kind,
    /// Whether it was asked for, and not only what that was made from.
    pub wanted: bool,
    pub action: Action,
    pub result: ActionResult,
    /// `LlamaForCausalLM`, where its config.json says so.
    pub architecture: Option<String>,
    /// As the Hugging Face hub spells it, where its LICENSE.json does: `apache-2.0`.
    pub licence: Option<String>,
    pub files: Vec<Hashed>,
    pub inputs: Vec<MadeFrom>,
}

/// A file of an artifact, by the digest that is ours and the one that others ask for.
pub struct Hashed {
    pub entry: Entry,
    /// Hexadecimal.
    pub sha256: String,
}

/// An input of an action.
pub struct MadeFrom {
    /// Its name in the action: `base`, `models.merged`.
    pub field: String,
    pub origin: Origin,
    pub digest: TreeDigest,
}

impl Made {
    fn size(&self) -> u64 {
        self.files.iter().map(|file| file.entry.size).sum()
    }
}

/// The artifacts of `graph`, inputs before what uses them. All of them must be up to date.
pub fn collect(engine: &Engine, graph: &Graph) -> anyhow::Result<Vec<Made>> {
    let plan = engine.plan(graph)?;
    let mut hashes = BTreeMap::new();
    let mut all = Vec::new();
    for (node, planned) in graph.nodes.iter().zip(&plan.targets) {
        let Status::Cached(result) = &planned.status else {
            return Err(Failure::input(format!("{} is not up to date", node.id))
                .hint(format!("run `cargo xtask build {}` first", node.id))
                .into());
        };
        let action = engine.action(result.key).ok_or_else(|| {
            Failure::environment(format!("{}: its action is not in the store any more", node.id))
                .hint("`cargo xtask verify` tells what else is lost")
        })?;
        let inputs = node.inputs.iter().filter_map(|input| {
            let digest = *action.inputs.get(&input.field)?;
            Some(MadeFrom { field: input.field.clone(), origin: input.from.clone(), digest })
        });
        let tree = engine.store().tree(result.output)?;
        all.push(Made {
            id: node.id.clone(),
            kind: node.kind,
            wanted: graph.wanted.contains(&node.id),
            architecture: said(engine, &tree, "config.json", "/architectures/0"),
            licence: said(engine, &tree, "LICENSE.json", "/license"),
            inputs: inputs.collect(),
            files: hashed(engine, &tree, &mut hashes)?,
            result: (**result).clone(),
            action,
        });
    }
    Ok(all)
}

/// What stands beside a release, by file name: provenance, bill of materials, and figures beside
/// those before.
pub fn documents(made: &[Made], before: Option<&Figures>) -> BTreeMap<String, String> {
    let figures = Figures::of(made);
    let all = [
        ("provenance.intoto.jsonl", provenance::statements(made)),
        ("bom.cdx.json", format!("{:#}\n", bill::of(made))),
        (publish::FIGURES, figures.to_json()),
        ("release.md", figures.to_markdown(before)),
    ];
    all.map(|(name, text)| (name.to_string(), text)).into()
}

/// What a JSON file of an artifact says at this place.
fn said(engine: &Engine, tree: &Tree, file: &str, pointer: &str) -> Option<String> {
    let entry = tree.entries().iter().find(|entry| entry.path == file)?;
    let json: Value = serde_json::from_slice(&engine.store().blob(entry.digest).ok()?).ok()?;
    Some(json.pointer(pointer)?.as_str()?.to_string())
}

fn hashed(
    engine: &Engine,
    tree: &Tree,
    known: &mut BTreeMap<BlobDigest, String>,
) -> anyhow::Result<Vec<Hashed>> {
    let mut files = Vec::new();
    for entry in tree.entries() {
        let sha256 = match known.get(&entry.digest) {
            Some(sha256) => sha256.clone(),
            None => sha256(&engine.store().blob_path(entry.digest))?,
        };
        known.insert(entry.digest, sha256.clone());
        files.push(Hashed { entry: entry.clone(), sha256 });
    }
    Ok(files)
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let hash = |mut file: File| ::release::sha256(&mut file);
    let hashed = File::open(path).and_then(hash);
    Ok(hashed.with_context(|| format!("cannot read {}", path.display()))?.1)
}

/// Where Anneal's own terms are explained to those who read them in a statement.
const HOME: &str = env!("CARGO_PKG_REPOSITORY");
