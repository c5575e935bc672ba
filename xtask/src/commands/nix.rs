//! `nix`: what the derivations of flake.nix call, and what it reads.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use engine::{Engine, Event, Given, Registry, nar, tools};
use serde_json::{Value, json};
use step::Failure;

use crate::cli::{Nix, Targets};
use crate::registry::REGISTRY;

/// Where the flake reads what it has to know of steps and tools.
const PINS: &str = "nix/pins.json";

pub fn run(root: &Path, what: Nix) -> anyhow::Result<()> {
    let engine = Engine::open(root, REGISTRY)?;
    match what {
        Nix::Make { target, inputs, tools, worker, out } => {
            let id = target.clone().try_into().map_err(Failure::input)?;
            let inputs = inputs
                .into_iter()
                .map(|(name, path)| Ok((name.try_into().map_err(Failure::input)?, path)))
                .collect::<Result<_, Failure>>()?;
            let given = Given { inputs, tools: tools.into_iter().collect(), worker };
            let tree = engine.make_alone(&id, &given, &out, &mut |event| {
                if let Event::Note { text, .. } = event {
                    println!("{text}");
                }
            })?;
            println!("{target}  {}", tree.digest());
        }
        Nix::Tool { name } => println!("{}", pinned(&engine, &name)?.display()),
        Nix::Digest { folder } => {
            println!("blake3  {}", engine.store().hash_path(&folder)?.digest());
            println!("sha256  {}", nar::sha256(&folder)?);
        }
        Nix::Export { folder, targets } => export(&engine, &targets, &folder)?,
        Nix::Pins => {
            let path = root.join(PINS);
            let text = format!("{:#}\n", pins(&engine)?);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

/// The folder of a pinned tool, fetched if need be.
fn pinned(engine: &Engine, name: &str) -> anyhow::Result<PathBuf> {
    let dir = engine.store().tools_dir();
    Ok(tools::pinned(name, engine.root(), &dir, &mut |text| eprintln!("{name}: {text}"))?)
}

/// Writes the archive of each pinned result to `folder`, named by its hash.
fn export(engine: &Engine, targets: &Targets, folder: &Path) -> anyhow::Result<()> {
    let graph = super::resolve(engine, targets)?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut any = false;
    for (id, result, _) in engine.locked_results(&graph)? {
        any = true;
        let path = folder.join(format!("{}.nar", result.sha256));
        if path.exists() {
            continue;
        }
        let artifact = engine.materialise(result.tree).map_err(|_| {
            Failure::input(format!("the pinned result of {id} is not in this store"))
                .hint(format!("build it here and pin it anew: `cargo xtask lock {}`", id.recipe))
        })?;
        let cannot = || format!("cannot write {}", path.display());
        let file = tempfile::NamedTempFile::new_in(folder).with_context(cannot)?;
        let mut archive = BufWriter::new(file);
        nar::write(&artifact, &mut archive).with_context(cannot)?;
        archive.flush().with_context(cannot)?;
        let file: tempfile::NamedTempFile = archive.into_inner()?;
        readable(file.as_file()).and_then(|()| Ok(file.persist(&path)?)).with_context(cannot)?;
        println!("{id}  {}", path.display());
    }
    if !any {
        let message = "no result of these targets is pinned";
        return Err(Failure::input(message).hint("build them, then `cargo xtask lock`").into());
    }
    Ok(())
}

/// Temporary files are private; what is shared is for everybody.
fn readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

/// What the flake has to know: of each step its inputs and tools, of each tool its hash.
fn pins(engine: &Engine) -> anyhow::Result<Value> {
    let mut hashes = BTreeMap::new();
    for name in step_tools(REGISTRY) {
        let place = pinned(engine, name)?;
        let folder = tools::pinned_name(name, engine.root())?;
        hashes.insert(name, json!({"name": folder, "sha256": nar::sha256(&place)?}));
    }
    Ok(json!({"steps": steps(REGISTRY), "tools": hashes}))
}

/// The tools that take part in results. Those that only compile workers are Nix's own.
fn step_tools(registry: Registry) -> Vec<&'static str> {
    let mut names: Vec<_> = registry.steps().flat_map(|step| step.tools.iter().copied()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn steps(registry: Registry) -> Value {
    let mut all = BTreeMap::new();
    for family in registry.families {
        // What acts outside has no derivation.
        for step in family.steps.iter().filter(|step| !step.acts) {
            let inputs: Vec<_> = step.inputs.iter().map(|input| input.name).collect();
            let line = json!({
                "family": family.name,
                "inputs": inputs,
                "network": step.network,
                "tools": step.tools,
            });
            all.insert(step.name, line);
        }
    }
    json!(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_pins_are_those_of_steps_and_tools() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = fs::read_to_string(root.join(PINS)).unwrap_or_default();
        let there: Value = serde_json::from_str(&text).unwrap_or_default();
        assert_eq!(there["steps"], steps(REGISTRY), "run `cargo xtask nix pins`");
        let names = there["tools"].as_object().into_iter().flatten();
        let names: Vec<_> = names.map(|(tool, pin)| (tool.as_str(), pin["name"].clone())).collect();
        let now = step_tools(REGISTRY).into_iter();
        let now: Vec<_> =
            now.map(|tool| (tool, json!(tools::pinned_name(tool, &root).unwrap()))).collect();
        assert_eq!(names, now, "run `cargo xtask nix pins`");
    }
}
