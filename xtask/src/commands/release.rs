//! `release`: the documents of what was built.

use std::path::{Path, PathBuf};

use engine::{Engine, Graph};
use serde_json::json;
use step::Failure;

use crate::release::{self, Figures};

pub fn run(
    engine: &Engine,
    graph: &Graph,
    out: Option<&Path>,
    against: Option<&Path>,
    json: bool,
) -> anyhow::Result<()> {
    let made = release::collect(engine, graph)?;
    let dir = match out {
        Some(dir) => dir.to_path_buf(),
        None => folder(engine, graph)?,
    };
    let last = dir.join(Figures::FILE);
    let before = match against {
        Some(path) => Some(Figures::read(path)?),
        None if last.exists() => Some(Figures::read(&last)?),
        None => None,
    };
    let figures = release::write(&made, before.as_ref(), &dir)?;
    if json {
        println!("{}", json!({"folder": dir, "figures": figures}));
    } else {
        print!("{}", figures.to_table(before.as_ref()));
        println!("\n{}: provenance, bill of materials, figures", dir.display());
    }
    Ok(())
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
