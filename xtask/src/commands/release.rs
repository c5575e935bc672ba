//! `release`: the documents of what was built.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use engine::{Engine, Graph};
use serde_json::json;
use step::Failure;

use crate::cli::Documents;
use crate::release::{self, Figures};

/// What was written.
pub struct Release {
    pub folder: PathBuf,
    pub documents: BTreeMap<String, String>,
    figures: Figures,
    before: Option<Figures>,
}

/// Writes the documents of `graph` beside the figures that were asked for, or those that are
/// `published`, or those in the folder.
pub fn write(
    engine: &Engine,
    graph: &Graph,
    asked: &Documents,
    published: Option<Figures>,
) -> anyhow::Result<Release> {
    let made = release::collect(engine, graph)?;
    let folder = match &asked.out {
        Some(folder) => folder.clone(),
        None => folder(engine, graph)?,
    };
    let last = folder.join(publish::FIGURES);
    let before = match (&asked.against, published) {
        (Some(path), _) => Some(Figures::read(path)?),
        (None, Some(published)) => Some(published),
        (None, None) if last.exists() => Some(Figures::read(&last)?),
        (None, None) => None,
    };
    let documents = release::documents(&made, before.as_ref());
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for (name, text) in &documents {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(Release { folder, documents, figures: Figures::of(&made), before })
}

impl Release {
    pub fn print(&self, json: bool) {
        if json {
            println!("{}", json!({"folder": self.folder, "figures": self.figures}));
            return;
        }
        print!("{}", self.figures.to_table(self.before.as_ref()));
        println!("\n{}: provenance, bill of materials, figures", self.folder.display());
    }
}

/// Beside the links of the recipe.
fn folder(engine: &Engine, graph: &Graph) -> Result<PathBuf, Failure> {
    let mut recipes: Vec<&str> = graph.wanted.iter().map(|id| id.recipe.as_str()).collect();
    recipes.dedup();
    match recipes[..] {
        [recipe] => Ok(engine.root().join("artifacts").join(format!("{recipe}.release"))),
        _ => Err(Failure::input("a release is of one recipe").hint("or say where to with --out")),
    }
}
