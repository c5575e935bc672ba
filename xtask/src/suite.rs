//! `test`: the whole suite, cheap stages first. CI runs this and nothing else.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::ValueEnum;
use xshell::{Shell, cmd};

use crate::display::{self, Table};
use crate::error;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// rustfmt.
    Format,
    /// clippy over the light half of the workspace.
    Lint,
    /// Everything that needs no worker: under a minute after the build.
    Unit,
    /// Each family's worker, and what only workers use: clippy and tests, in release.
    Workers,
    /// The demo, built, built again, killed, rebuilt.
    Demo,
    /// Our files in other people's readers: transformers, PEFT, ONNX Runtime, llama.cpp.
    Interop,
    /// The page, and each architecture's graphs, in headless Chromium, on WASM and WebGPU.
    Browser,
    /// The page published to a stand-in for AWS, checked, and opened as CloudFront would serve it; and
    /// behind nginx and Caddy.
    Publish,
    /// The demo as Nix packages: built in Nix's sandbox, to the same bytes.
    Nix,
}

/// Packages that only workers use.
const HEAVY: &[&str] = &["graph", "reference", "runtime"];

/// These, and packages whose real work is behind features: features by package, tools needed to compile
/// them.
/// One line is one call of cargo. The three that link llama.cpp share theirs: apart, they would
/// agree on other features of its build script's crates, and compile it twice.
const WORKERS: &[(&[&str], &[&str])] = &[
    (&["checkpoint/weights", "checkpoint/chat"], &[]),
    (&["graph", "reference", "runtime/worker"], &["onnxruntime"]),
    (&["source/worker"], &[]),
    (&["dataset/worker"], &[]),
    (&["train/worker"], &["libtorch"]),
    (&["adapter/worker"], &[]),
    (&["merge/worker"], &[]),
    (&["onnx/worker"], &["onnxruntime"]),
    (
        &["llamacpp/engine", "gguf/llamacpp-test", "eval/worker"],
        &["onnxruntime", "cmake", "libclang"],
    ),
    (&["site/worker"], &[]),
    (&["command/worker"], &[]),
    (&["serve/worker"], &[]),
    // The AWS SDK is compiled once for all three.
    (&["s3/testing", "cache/testing", "publish/testing"], &[]),
];

pub fn run(root: &Path, stages: &[Stage]) -> anyhow::Result<ExitCode> {
    let all = Stage::value_variants();
    let wanted = if stages.is_empty() { all } else { stages };
    let sh = Shell::new()?;
    sh.change_dir(root);
    let mut table = Table::new(["stage", "result", "time"]);
    let (mut passed, mut failed) = (0, 0);
    for stage in all.iter().filter(|s| wanted.contains(s)) {
        let name = stage.to_possible_value().expect("no stage is hidden");
        println!("\n── {} ──", name.get_name());
        let clock = Instant::now();
        let result = run_stage(&sh, root, *stage);
        let word = match &result {
            Ok(()) => "passed",
            Err(error) => {
                eprintln!("{error:#}");
                "FAILED"
            }
        };
        let time = display::seconds(clock.elapsed().as_secs_f64());
        table.row([name.get_name().to_string(), word.to_string(), time]);
        match result {
            Ok(()) => passed += 1,
            Err(_) => {
                failed += 1;
                // What follows stands on what came before.
                break;
            }
        }
    }
    println!("\n{table}");
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { error::INPUT.into() })
}

fn run_stage(sh: &Shell, root: &Path, stage: Stage) -> anyhow::Result<()> {
    let without = &HEAVY.iter().flat_map(|package| ["--exclude", package]).collect::<Vec<_>>();
    match stage {
        Stage::Format => cmd!(sh, "cargo fmt --all --check").run()?,
        Stage::Lint => cmd!(
            sh,
            "cargo clippy --locked --workspace {without...} --all-targets --features xtask/demo -- -D warnings"
        )
        .run()?,
        Stage::Unit => {
            cmd!(sh, "cargo test --locked --workspace {without...} --quiet").run()?
        }
        Stage::Workers => {
            let engine = engine::Engine::open(root, crate::registry::REGISTRY)?;
            for (features, tools) in WORKERS {
                let _env = with_tools(sh, &engine, tools)?;
                let which = &selection(features);
                cmd!(sh, "cargo clippy --locked --release {which...} --all-targets -- -D warnings")
                    .run()?;
                cmd!(sh, "cargo test --locked --release --quiet {which...}").run()?;
            }
        }
        Stage::Demo => cmd!(
            sh,
            "cargo test --locked --package xtask --features demo --test demo -- --test-threads 1"
        )
        .run()?,
        Stage::Interop => cmd!(sh, "bash tests/interop/run.sh").run()?,
        Stage::Browser => {
            let engine = engine::Engine::open(root, crate::registry::REGISTRY)?;
            let _env = with_tools(sh, &engine, &["onnxruntime"])?;
            cmd!(sh, "bash tests/browser/run.sh").run()?;
        }
        Stage::Publish => cmd!(sh, "bash tests/publish/run.sh").run()?,
        Stage::Nix => cmd!(sh, "bash tests/nix/run.sh").run()?,
    }
    Ok(())
}

/// How cargo is told to take these packages with these features.
fn selection<'a>(features: &[&'a str]) -> Vec<&'a str> {
    let of = |feature: &&'a str| match feature.split_once('/') {
        Some((package, _)) => vec!["--package", package, "--features", feature],
        None => vec!["--package", feature],
    };
    features.iter().flat_map(of).collect()
}

/// Sets the variables that the tools ask for, fetching those that are missing.
fn with_tools<'a>(
    sh: &'a Shell,
    engine: &engine::Engine,
    tools: &[&str],
) -> anyhow::Result<Vec<xshell::PushEnv<'a>>> {
    let mut set = Vec::new();
    for tool in tools {
        let found = engine.tool(tool, &mut |_| {})?;
        set.extend(found.env.into_iter().map(|(name, value)| sh.push_env(name, value)));
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// How crates begin that take a minute and more to compile, one of them, and the tests that have
    /// all that anyone asks of them: see `agreed` in crates/checkpoint/Cargo.toml and crates/s3/Cargo.toml.
    const COSTLY: &[(&str, &str, &str)] =
        &[("tokenizers ", "tokenizers ", "checkpoint/chat"), ("aws-", "aws-sdk-s3 ", "s3/testing")];

    /// What `cargo tree` lists for these packages with these features.
    fn tree(features: &[&str], edges: &str) -> String {
        let sh = Shell::new().unwrap();
        cmd!(sh, "cargo tree --locked --no-dedupe --prefix depth --edges {edges} --format")
            .arg(" {p} {f}")
            .args(selection(features))
            .ignore_stderr()
            .read()
            .unwrap()
    }

    /// The crates beneath those whose name starts with `top`, they included, with their features.
    fn beneath<'a>(top: &str, tree: &'a str) -> BTreeSet<&'a str> {
        let mut above = None;
        let mut found = BTreeSet::new();
        for (depth, krate) in tree.lines().filter_map(|line| line.split_once(' ')) {
            let depth: u32 = depth.parse().unwrap();
            if above.is_none_or(|above| depth <= above) {
                above = krate.starts_with(top).then_some(depth);
            }
            if above.is_some() {
                found.insert(krate);
            }
        }
        found
    }

    #[test]
    fn tests_and_workers_share_one_build_of_what_is_costly() {
        let families = crate::registry::REGISTRY.families.iter().map(|family| family.name);
        let workers: Vec<String> =
            families.chain(["cache"]).map(|family| format!("{family}/worker")).collect();
        let tests = WORKERS.iter().map(|(line, _)| (line.to_vec(), "normal,build,dev"));
        let alone = workers.iter().map(|worker| (vec![worker.as_str()], "normal,build"));
        let trees: Vec<_> =
            tests.chain(alone).map(|(line, edges)| (tree(&line, edges), line)).collect();
        for (top, one, first) in COSTLY {
            let (all, _) = trees.iter().find(|(_, line)| line.contains(first)).unwrap();
            let all = beneath(top, all);
            let mut sharing = 0;
            for (tree, line) in &trees {
                let found = beneath(top, tree);
                sharing += usize::from(found.iter().any(|krate| krate.starts_with(one)));
                let again: Vec<_> = found.difference(&all).copied().collect();
                assert!(again.is_empty(), "{line:?} would compile {top} again: {again:#?}");
            }
            assert!(sharing > 2, "{one}is in {sharing} builds");
        }
    }
}
