//! `new`: a step or a recipe to start from, that builds as it is.

use std::path::Path;

use step::Failure;

/// Adds `family/step` to an existing family: two files and a line in each of two lists.
pub fn step(root: &Path, name: &str) -> anyhow::Result<()> {
    let Some((family, short)) = name.split_once('/') else {
        return Err(Failure::input(format!(
            "`{name}` is not a step's name: expected `family/step`"
        ))
        .into());
    };
    if !short.starts_with(|c: char| c.is_ascii_lowercase())
        || !short.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    {
        return Err(Failure::input(format!("`{short}` is no name for a step"))
            .hint("lower-case letters, digits and `-`, a letter first")
            .into());
    }
    let dir = root.join("crates").join(family);
    let families: Vec<&str> = crate::registry::REGISTRY.families.iter().map(|f| f.name).collect();
    if !families.contains(&family) {
        return Err(Failure::input(format!("there is no family `{family}`"))
            .hint(format!("the families are {}", families.join(", ")))
            .into());
    }
    let module = short.replace('-', "_");
    let light = dir.join("src").join(format!("{module}.rs"));
    let heavy = dir.join("src/worker").join(format!("{module}.rs"));
    for path in [&light, &heavy] {
        if path.exists() {
            return Err(Failure::input(format!("{} is there already", path.display())).into());
        }
    }
    let type_name: String =
        module.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
    let fill = |text: &str| {
        text.replace("{name}", name)
            .replace("{family}", family)
            .replace("{module}", &module)
            .replace("{Type}", &type_name)
    };
    let lib = dir.join("src/lib.rs");
    let main = dir.join("src/worker/main.rs");
    let new_lib = register(
        &read(&lib)?,
        &format!("pub mod {module};\n"),
        &format!("StepDef::of::<{module}::{type_name}>()"),
        "steps: &[",
    );
    let new_main = register(
        &read(&main)?,
        &format!("mod {module};\n"),
        &format!("({name:?}, {module}::run)"),
        "step::worker::main(&[",
    );
    let (Some(new_lib), Some(new_main)) = (new_lib, new_main) else {
        return Err(Failure::bug(format!(
            "the lists of steps in {} are not where they were",
            lib.display()
        ))
        .into());
    };
    write(&light, &fill(LIGHT))?;
    write(&heavy, &fill(HEAVY))?;
    write(&lib, &new_lib)?;
    write(&main, &new_main)?;
    let _ =
        std::process::Command::new("cargo").args(["fmt", "-p", family]).current_dir(root).status();
    println!("{name} is in {}", light.strip_prefix(root).unwrap_or(&light).display());
    println!("its work is in  {}", heavy.strip_prefix(root).unwrap_or(&heavy).display());
    println!("try it: a table with `step = \"{name}\"` in a recipe, then `cargo xtask build`");
    Ok(())
}

/// Writes a recipe with the shape of a usual one.
pub fn recipe(root: &Path, name: &str) -> anyhow::Result<()> {
    let path = root.join("recipes").join(format!("{name}.toml"));
    if path.exists() {
        return Err(Failure::input(format!("{} is there already", path.display())).into());
    }
    write(&path, RECIPE)?;
    println!("recipes/{name}.toml is written; see what it would do: cargo xtask plan {name}");
    Ok(())
}

/// `text` with `module` after its last `mod` line and `entry` at the end of the list that starts
/// with `list`.
fn register(text: &str, module: &str, entry: &str, list: &str) -> Option<String> {
    let is_mod = |line: &&str| line.starts_with("mod ") || line.starts_with("pub mod ");
    let last_mod = text.lines().rfind(|line| is_mod(line) && line.ends_with(';'))?;
    let at = text.find(last_mod)? + last_mod.len() + 1;
    let mut text = format!("{}{module}{}", &text[..at], &text[at..]);
    let open = text.find(list)? + list.len();
    let close = open + closing(&text[open..])?;
    let before = text[open..close].trim_end();
    let comma = if before.is_empty() || before.ends_with(',') { "" } else { ", " };
    let insert_at = open + before.len();
    text.insert_str(insert_at, &format!("{comma}{entry}"));
    Some(text)
}

/// Where the bracket that is open at the start of `text` closes.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (i, c) in text.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(i);
        }
    }
    None
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path)
        .map_err(|e| Failure::environment(format!("cannot read {}: {e}", path.display())).into())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text)
        .map_err(|e| Failure::environment(format!("cannot write {}: {e}", path.display())).into())
}

const LIGHT: &str = r#"//! `{name}`: the files of a model, as they are.
//!
//! Knows nothing of how the work is done: that is the worker's part.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, Step};

/// The parameters of `{name}`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct {Type} {}

impl Step for {Type} {
    const NAME: &'static str = "{name}";
    const ABOUT: &'static str = "The files of a model, as they are.";
    const INPUTS: &'static [InputDef] = &[InputDef::one("model", &[Kind::Model])];
    const OUTPUT: Kind = Kind::Model;
}
"#;

const HEAVY: &str = r#"//! The work of `{name}`.

use {family}::{module}::{Type};
use step::worker::Job;

pub fn run(job: &Job) -> anyhow::Result<()> {
    let {Type} {} = job.params()?;
    for entry in std::fs::read_dir(&job.input("model")?.path)? {
        let entry = entry?;
        std::fs::copy(entry.path(), job.out().join(entry.file_name()))?;
    }
    Ok(())
}
"#;

const RECIPE: &str = r#"# What this recipe makes, in a sentence.

[base]
step = "source/huggingface"
repo = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
rev = "main" # pinned by `cargo xtask lock`
architecture = "llama"

[merged-copy]
step = "gguf/export"
model = "base"
quant = "Q8_0"
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_added_to_both_lists() {
        let lib = "pub mod lora;\n\npub static FAMILY: Family = Family {\n    steps: &[StepDef::of::<lora::Lora>()],\n};\n";
        let new = register(lib, "pub mod mean;\n", "StepDef::of::<mean::Mean>()", "steps: &[");
        assert_eq!(
            new.as_deref(),
            Some(
                "pub mod lora;\npub mod mean;\n\npub static FAMILY: Family = Family {\n    steps: &[StepDef::of::<lora::Lora>(), StepDef::of::<mean::Mean>()],\n};\n"
            )
        );
    }

    #[test]
    fn lists_that_cannot_be_found_are_left_alone() {
        assert_eq!(register("fn main() {}", "mod x;\n", "x", "steps: &["), None);
    }
}
