//! What holds of the whole workspace, as tests: who may use whom, and how files begin.

#![cfg(test)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").into()
}

/// Crate → those of our crates that it uses, dev-dependencies left out.
fn uses() -> BTreeMap<String, Vec<String>> {
    let mut names = vec!["xtask".to_string()];
    for entry in std::fs::read_dir(root().join("crates")).unwrap() {
        names.push(entry.unwrap().file_name().into_string().unwrap());
    }
    let manifest = |name: &str| {
        let dir = if name == "xtask" { root() } else { root().join("crates") };
        let text = std::fs::read_to_string(dir.join(name).join("Cargo.toml")).unwrap();
        text.parse::<toml::Table>().unwrap()
    };
    let of = |name: &String| {
        let manifest = manifest(name);
        let tables = ["dependencies", "build-dependencies"].map(|t| manifest.get(t).cloned());
        let keys = tables
            .into_iter()
            .flatten()
            .flat_map(|t| t.as_table().unwrap().keys().cloned().collect::<Vec<_>>());
        keys.filter(|key| names.contains(key)).collect::<Vec<_>>()
    };
    names.iter().map(|name| (name.clone(), of(name))).collect()
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let families: Vec<&str> =
        crate::registry::REGISTRY.families.iter().map(|f| f.name).chain(["serve"]).collect();
    let allowed = |name: &str| -> Option<&[&str]> {
        Some(match name {
            "step" => &[],
            "recipe" | "store" => &["step"],
            "cache" => &["step", "store", "s3"],
            "engine" => &["step", "recipe", "store", "cache", "s3"],
            "checkpoint" => &["step"],
            "graph" => &["step", "checkpoint"],
            "reference" => &["checkpoint"],
            "runtime" => &["step", "checkpoint", "graph"],
            "llamacpp" | "release" | "s3" => &["step"],
            "xtask" => return None,
            family if families.contains(&family) => &[
                "step",
                "checkpoint",
                "graph",
                "reference",
                "runtime",
                "llamacpp",
                "release",
                "s3",
            ],
            other => panic!(
                "crates/{other} has no place in the house: give it one here and in ARCHITECTURE.md"
            ),
        })
    };
    for (name, used) in uses() {
        let Some(allowed) = allowed(&name) else { continue };
        for other in used {
            assert!(
                allowed.contains(&other.as_str()),
                "crates/{name} uses `{other}`; it may use {allowed:?} (see ARCHITECTURE.md)"
            );
        }
    }
}

#[test]
fn every_step_is_where_its_name_says() {
    for step in crate::registry::REGISTRY.steps() {
        let (family, name) = step.name.split_once('/').expect("a step's name has a slash");
        let path = format!("crates/{family}/src/{}.rs", name.replace('-', "_"));
        assert!(root().join(&path).is_file(), "`{}` is declared, but not in {path}", step.name);
        assert!(
            !step.network || family == "source" || family == "publish",
            "`{}` may not use the network",
            step.name
        );
    }
}

#[test]
fn every_file_says_what_it_is() {
    let mut open = vec![root().join("crates"), root().join("xtask"), root().join("recipes")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                assert!(text.starts_with("//!"), "{} does not say what it is", path.display());
                assert!(
                    text.lines().count() <= 900,
                    "{} is too long: split it unless it is one idea",
                    path.display()
                );
            }
        }
    }
}

/// What is sent is whole: nothing names a registry's host, nothing was left to be done.
#[test]
fn no_file_names_a_registry_host() {
    let hosts =
        ["crates.io/api", "pypi.org", "files.pythonhosted", "registry.npmjs", "static.crates"];
    let mut open = vec![root()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if ["target", ".git", "artifacts", "node_modules", "tidy.rs", "Cargo.lock"]
                .contains(&&*name)
            {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                for host in hosts {
                    assert!(!text.contains(host), "{} names {host}", path.display());
                }
            }
        }
    }
}

/// What a fresh clone compiles before it can plan: no heavy library is in it.
#[test]
fn a_plan_compiles_nothing_heavy() {
    let args = ["tree", "--package", "xtask", "--edges", "normal,build", "--prefix", "none"];
    let output = std::process::Command::new(env!("CARGO")).args(args).current_dir(root()).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let names: std::collections::BTreeSet<&str> =
        text.lines().filter_map(|line| line.split(' ').next()).collect();
    for heavy in ["torch-sys", "ort-sys", "tokenizers", "llama-cpp-sys-2", "axum", "aws-sdk-s3"] {
        assert!(!names.contains(heavy), "xtask links {heavy}: it belongs behind a worker");
    }
    assert!((20..=120).contains(&names.len()), "xtask links {} crates", names.len());
}
