//! `release`: the documents of what was built.

use std::path::PathBuf;

use engine::{Engine, Graph};
use serde_json::json;
use step::Failure;

use crate::cli::Documents;
use crate::release::{self, Figures};

/// What was written.
pub struct Release {
    pub folder: PathBuf,
    figures: Figures,
    before: Option<Figures>,
}

pub fn write(engine: &Engine, graph: &Graph, documents: &Documents) -> anyhow::Result<Release> {
    let made = release::collect(engine, graph)?;
    let folder = match &documents.out {
        Some(folder) => folder.clone(),
        None => folder(engine, graph)?,
    };
    let last = folder.join(Figures::FILE);
    let before = match &documents.against {
        Some(path) => Some(Figures::read(path)?),
        None if last.exists() => Some(Figures::read(&last)?),
        None => None,
    };
    let figures = release::write(&made, before.as_ref(), &folder)?;
    Ok(Release { folder, figures, before })
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
