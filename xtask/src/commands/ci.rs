//! `ci`: what a workflow would do step by step, so that it is one line there and can be tried here.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use engine::{Engine, Node, Options};
use step::Failure;

use super::publish::Place;
use super::{build, release, resolve, scrub};
use crate::cli::{Documents, Targets};

pub fn run(
    engine: &Engine,
    targets: &Targets,
    train: bool,
    documents: &Documents,
) -> anyhow::Result<ExitCode> {
    let (places, targets) = apart(engine, targets)?;
    let refuse = (!train).then_some(training as fn(&Node) -> Option<Failure>);
    let options = Options { refuse, ..Options::default() };
    let built = stage("build", || build(engine, &targets, options, false))?;
    if built != ExitCode::SUCCESS {
        return Ok(built);
    }
    let sound = stage("verify", || scrub(engine, false))?;
    if sound != ExitCode::SUCCESS {
        return Ok(sound);
    }
    let written = stage("release", || {
        let published = places.first().map(|place| place.figures(engine)).transpose()?.flatten();
        let graph = resolve(engine, &targets)?;
        let written = release::write(engine, &graph, documents, published)?;
        written.print(false);
        Ok(written)
    })?;
    if let Some(summary) = std::env::var_os("GITHUB_STEP_SUMMARY") {
        annotate(Path::new(&summary), &written.folder.join("release.md"))?;
    }
    for place in places {
        let published =
            stage("publish", || place.publish(engine, written.documents.clone(), false, false))?;
        if published != ExitCode::SUCCESS {
            return Ok(published);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Where to publish, of all that was asked for; and what to build, the sites that go there among it.
fn apart(engine: &Engine, targets: &Targets) -> anyhow::Result<(Vec<Place>, Targets)> {
    let ids = engine.resolver().expand(&targets.words())?;
    let graph = engine.resolver().graph(&ids)?;
    let mut places = Vec::new();
    let mut built = Targets { targets: Vec::new() };
    for id in ids {
        if graph.get(&id).is_some_and(|node| node.def.acts) {
            let place = Place::of(engine, &id.to_string())?;
            built.targets.extend(place.sites().targets);
            places.push(place);
        } else {
            built.targets.push(id.to_string());
        }
    }
    Ok((places, built))
}

/// Hours of a machine that has no GPU, most often by mistake: a key that changed, a cache not reached.
fn training(node: &Node) -> Option<Failure> {
    (node.family.name == "train").then(|| {
        Failure::input(format!("{} would be trained, and nobody asked for that here", node.id)).hint(
            format!(
                "build it where it can be trained; `cargo xtask why {}` tells why its result is not \
                 found; --train trains it here",
                node.id
            ),
        )
    })
}

/// A part of the log that folds, where GitHub shows it.
fn stage<T>(name: &str, run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let github = std::env::var_os("GITHUB_ACTIONS").is_some();
    if github {
        println!("::group::{name}");
    } else {
        println!("── {name} ──");
    }
    let result = run();
    if github {
        println!("::endgroup::");
    }
    result
}

fn annotate(summary: &Path, release: &Path) -> anyhow::Result<()> {
    let text = std::fs::read(release)?;
    let file = OpenOptions::new().create(true).append(true).open(summary);
    file.and_then(|mut file| file.write_all(&text))
        .with_context(|| format!("cannot write {}", summary.display()))
}
