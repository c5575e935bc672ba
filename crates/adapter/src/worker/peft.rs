//! The work of `adapter/peft`: the same adapter in the form in which `train/lora` writes its own.
//!
//! Two folders that change a model alike become the same bytes, but for the names that they give.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use adapter::peft::Peft;
use anyhow::Context;
use checkpoint::adapter::{self as reader, Adapter, Plain};
use checkpoint::config::Config;
use checkpoint::weights::{Dtype, Spec, Writer};
use serde_json::Value;
use step::worker::{Input, Job};
use step::{Failure, Kind};

pub fn run(job: &Job) -> anyhow::Result<()> {
    let Peft {} = job.params()?;
    let files = job.input("files")?;
    let adapter = read(files)?;
    if let Some(base) = job.inputs("base").first() {
        let config = Config::read(&base.path).map_err(|e| e.called(&base.path, &base.origin))?;
        adapter.check(&config).map_err(|e| e.called(&files.path, &files.origin))?;
    }
    if adapter.untrained() {
        job.note("the adapter was never trained: all of its B matrices are zero");
    }
    write_weights(&adapter, &job.out().join(reader::WEIGHTS))?;
    let base = adapter.config.base_model_name_or_path.as_deref().filter(|name| is_public(name));
    let config = serde_json::to_string_pretty(&peft_config(&adapter, base))? + "\n";
    for (name, text) in
        [(reader::CONFIG, config), ("README.md", card(&adapter, base, licence(&files.path)))]
    {
        let path = job.out().join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    checkpoint::copy_legal(&files.path, job.out()).map_err(Failure::from)?;
    job.metric("modules", adapter.deltas.len() as f64);
    job.metric("parameters", parameters(&adapter) as f64);
    Ok(())
}

fn read(files: &Input) -> Result<Adapter, Failure> {
    Adapter::read(&files.path).map_err(|error| {
        let failure = error.called(&files.path, &files.origin);
        // What is fetched of a repository is a model's files, unless the recipe says otherwise.
        match files.kind == Kind::Model && !files.path.join(reader::CONFIG).is_file() {
            true => failure.hint(format!(
                "give `{}` the key files = [\"adapter_*\", \"README.md\", \"LICENSE*\"]",
                files.label
            )),
            false => failure,
        }
    })
}

/// A module's name → its change.
fn modules(adapter: &Adapter) -> impl Iterator<Item = (&str, &reader::Delta)> {
    adapter.deltas.iter().map(|(name, delta)| (name.trim_end_matches(".weight"), delta))
}

fn parameters(adapter: &Adapter) -> usize {
    adapter.deltas.values().map(|delta| delta.a.len() + delta.b.len()).sum()
}

fn write_weights(adapter: &Adapter, path: &Path) -> Result<(), Failure> {
    let mut all: BTreeMap<String, (&[f32], [usize; 2])> = BTreeMap::new();
    for (module, delta) in modules(adapter) {
        let [out, width] = delta.shape();
        all.insert(reader::tensor_name(module, 'A'), (&delta.a, [delta.rank, width]));
        all.insert(reader::tensor_name(module, 'B'), (&delta.b, [out, delta.rank]));
    }
    let specs = all.iter().map(|(name, (_, shape))| Spec::new(name, Dtype::F32, shape)).collect();
    let mut writer = Writer::create(path, specs)?;
    for (name, (values, _)) in &all {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(name, &bytes)?;
    }
    Ok(writer.finish()?)
}

fn peft_config(adapter: &Adapter, base: Option<&str>) -> Value {
    let config = &adapter.config;
    let targets = adapter.targets();
    Plain {
        rank: config.r,
        alpha: config.lora_alpha,
        rslora: config.use_rslora,
        dropout: config.lora_dropout,
        targets: &targets.iter().map(String::as_str).collect::<Vec<_>>(),
        base,
        revision: base.and(config.revision.as_deref()),
        other_ranks: modules(adapter)
            .map(|(module, delta)| (module, delta.rank))
            .filter(|(_, rank)| *rank != config.r)
            .collect(),
        other_alphas: modules(adapter)
            .map(|(module, delta)| (module, delta.alpha))
            .filter(|(_, alpha)| *alpha != config.lora_alpha)
            .collect(),
    }
    .to_json()
}

/// Whether a base's name is that of a repository: a path of the machine that trained helps nobody.
fn is_public(name: &str) -> bool {
    let plain = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    name.split('/').count() <= 2 && name.split('/').all(plain)
}

/// The licence that the adapter's own card names.
fn licence(dir: &Path) -> Option<String> {
    let card = std::fs::read_to_string(dir.join("README.md")).ok()?;
    let front = card.strip_prefix("---")?.split("\n---").next()?;
    let name = front.lines().find_map(|line| line.strip_prefix("license:"))?.trim();
    is_public(name).then(|| name.to_string())
}

/// The model card.
fn card(adapter: &Adapter, base: Option<&str>, licence: Option<String>) -> String {
    let mut out = String::from("---\n");
    if let Some(base) = base {
        _ = write!(out, "base_model: {base}\nbase_model_relation: adapter\n");
    }
    out.push_str("library_name: peft\n");
    if let Some(licence) = licence {
        _ = writeln!(out, "license: {licence}");
    }
    out.push_str("pipeline_tag: text-generation\ntags:\n- lora\n---\n\n");
    out.push_str("# LoRA adapter\n\nTaken in by Anneal with `adapter/peft`.\n\n| | |\n|---|---|\n");
    let config = &adapter.config;
    for (name, value) in [
        ("rank, alpha", format!("{}, {}", config.r, config.lora_alpha)),
        ("layers changed", adapter.deltas.len().to_string()),
        ("parameters", parameters(adapter).to_string()),
    ] {
        _ = writeln!(out, "| {name} | {value} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;
    use step::worker::{Mode, Request};

    use super::*;

    const ARCHITECTURES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gemma3"];

    /// A folder as PEFT wrote it: see crates/merge/tests/golden/make.py.
    fn golden(architecture: &str, which: &str) -> PathBuf {
        let merge = Path::new(env!("CARGO_MANIFEST_DIR")).join("../merge/tests/golden");
        merge.join(architecture).join(which)
    }

    fn base(architecture: &str) -> PathBuf {
        let train = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/src/worker/golden");
        train.join(architecture)
    }

    fn take_in(
        files: &Path,
        kind: Kind,
        base: Option<&Path>,
    ) -> Result<tempfile::TempDir, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let input = |label: &str, kind, path: &Path| {
            let origin = format!("recipes/{label}");
            vec![Input { label: label.into(), kind, path: path.into(), origin }]
        };
        let mut inputs = BTreeMap::from([("files".to_string(), input("mine", kind, files))]);
        inputs.extend(base.map(|base| ("base".to_string(), input("base", Kind::Model, base))));
        let [out, report, scratch] = ["out", "report", "scratch"].map(|name| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        let request = Request {
            format: 1,
            step: "adapter/peft".into(),
            mode: Mode::Build,
            params: json!({}),
            inputs,
            out,
            report,
            scratch,
            tools: BTreeMap::new(),
            threads: 1,
        };
        match run(&Job::new(request, std::io::sink())) {
            Ok(()) => Ok(dir),
            Err(error) => Err(Failure::from_anyhow(&error)),
        }
    }

    fn bytes(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
        entries
            .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
            .collect()
    }

    #[test]
    fn the_change_stays_and_the_form_is_one() {
        for architecture in ARCHITECTURES {
            for which in ["first", "second"] {
                let files = golden(architecture, which);
                let ours = take_in(&files, Kind::Files, Some(&base(architecture))).unwrap();
                let out = ours.path().join("out");
                let (before, after) =
                    (Adapter::read(&files).unwrap(), Adapter::read(&out).unwrap());
                assert_eq!(before.deltas, after.deltas, "{architecture}/{which}");
                let again = take_in(&out, Kind::Model, None).unwrap();
                assert_eq!(bytes(&out), bytes(&again.path().join("out")));
            }
        }
    }

    #[test]
    fn the_config_is_the_one_that_train_writes() {
        let ours = take_in(&golden("llama", "second"), Kind::Files, None).unwrap();
        let config = std::fs::read_to_string(ours.path().join("out/adapter_config.json")).unwrap();
        let expected = r#"{
  "alpha_pattern": {
    "model.layers.0.self_attn.v_proj": 3.5,
    "model.layers.1.self_attn.v_proj": 7
  },
  "base_model_name_or_path": "tiny/llama",
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 5,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "peft_version": "0.21.0",
  "r": 2,
  "rank_pattern": {
    "model.layers.0.mlp.down_proj": 4,
    "model.layers.1.mlp.down_proj": 4,
    "model.layers.1.self_attn.q_proj": 1
  },
  "revision": null,
  "target_modules": [
    "down_proj",
    "q_proj",
    "v_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": true
}
"#;
        assert_eq!(config, expected);
    }

    #[test]
    fn what_does_not_fit_is_told_by_the_name_that_a_person_knows() {
        let error = take_in(&golden("gemma3", "second"), Kind::Files, Some(&base("llama")));
        let error = error.unwrap_err();
        assert!(error.message.starts_with("recipes/mine: `model.layers.0.self_attn.q"), "{error}");
        assert_eq!(error.hint.as_deref(), Some("was the adapter trained on this base?"));

        // A repository of which only a model's files were taken.
        let error = take_in(&base("llama"), Kind::Model, None).unwrap_err();
        assert_eq!(error.message, "recipes/mine: there is no adapter_config.json");
        assert_eq!(
            error.hint.as_deref(),
            Some("give `mine` the key files = [\"adapter_*\", \"README.md\", \"LICENSE*\"]")
        );
    }

    #[test]
    fn licences_stay_and_paths_do_not() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in bytes(&golden("llama", "first")) {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let config = dir.path().join("adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text.replace("tiny/llama", "/home/me/llama")).unwrap();
        let front = "---\nbase_model: x\nlicense: llama3.2\n---\n# Mine\n";
        std::fs::write(dir.path().join("README.md"), front).unwrap();
        std::fs::write(dir.path().join("LICENSE"), "free").unwrap();
        let ours = take_in(dir.path(), Kind::Files, None).unwrap();
        let ours = bytes(&ours.path().join("out"));
        assert_eq!(ours["LICENSE"], b"free");
        let text = |name: &str| String::from_utf8(ours[name].clone()).unwrap();
        assert!(text("adapter_config.json").contains("\"base_model_name_or_path\": null"));
        assert!(text("README.md").contains("\nlicense: llama3.2\n"));
        assert!(!text("README.md").contains("base_model:"));
    }
}
