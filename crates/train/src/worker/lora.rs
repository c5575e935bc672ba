//! `train/lora`: adapters on a frozen base, as a PEFT folder.
//!
//! Knows nothing of how training goes: that is fit.rs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::adapter::{self as peft, Adapter, Plain};
use checkpoint::config::{Architecture, Config};
use checkpoint::names;
use checkpoint::weights::{Dtype, Weights};
use serde_json::Value;
use step::Failure;
use step::definition::TFLOP;
use step::worker::{Input, Job};
use tch::{Device, Kind, Tensor};
use train::{Lora, work};

use crate::blockwise::Nf4;
use crate::data::Dataset;
use crate::decoder::Decoder;
use crate::device::{self, Place};
use crate::fit::{Outcome, fit};
use crate::linear::{self, Weight};
use crate::optimiser::Trainable;
use crate::tensor;

pub fn run(job: &Job) -> Result<()> {
    let params: Lora = job.params()?;
    let training = params.training();
    let base = job.input("base")?;
    let config = Config::read(&base.path).map_err(Failure::from)?;
    let targets = targets(&params, config.architecture)?;
    let data = Dataset::open(job, base, config.vocab_size, config.max_positions)?;
    let place = device::prepare(job, &training, config.parameters())?;

    let mut model = frozen(base, config, params.bits, place)?;
    attach(&mut model, &params, place.device)?;
    if let Some(from) = job.inputs("adapter").first() {
        go_on_from(&mut model, &params, from)?;
    }
    let adapter = adapter(&mut model);
    let trainables = adapter.iter().map(|(name, tensor)| Trainable {
        name: name.clone(),
        tensor: tensor.shallow_clone(),
        decays: true,
    });
    let outcome = fit(job, &training, &model, trainables.collect(), &data, place.device)?;
    let tflop = work::of_lora(&model.config, &params, data.train.split());
    job.metric(TFLOP, outcome.share * tflop);
    job.metric("trained_parameters", adapter.values().map(|t| t.numel() as f64).sum());

    checkpoint::copy_legal(&base.path, job.out()).map_err(Failure::from)?;
    let base = base_name(&base.path);
    tensor::write(&job.out().join(peft::WEIGHTS), Dtype::F32, &adapter)?;
    let config = Plain {
        rank: params.rank,
        alpha: params.alpha,
        rslora: params.rslora,
        dropout: params.dropout,
        targets: &targets,
        base: base.as_deref(),
        ..Plain::default()
    };
    for (name, text) in [
        (peft::CONFIG, format!("{:#}\n", config.to_json())),
        ("README.md", card(&params, &targets, base.as_deref(), &data, outcome)),
    ] {
        let path = job.out().join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The base as it is, in the compute kind; with 4 bits the layers' matrices in NF4.
fn frozen(base: &Input, config: Config, bits: u8, place: Place) -> Result<Decoder> {
    let weights = Weights::open(&base.path).map_err(Failure::from)?;
    weights.check(&config).map_err(Failure::from)?;
    Decoder::new(config, place.compute, |name, shape| {
        let weight = tensor::read(&weights, name)?;
        // Like bitsandbytes: neither the embedding nor the head.
        let in_a_layer = shape.len() == 2 && ![names::EMBED, names::LM_HEAD].contains(&name);
        if bits == 4 && in_a_layer {
            return Ok(Weight::Nf4(Nf4::quantise(&weight, place.device)?));
        }
        Ok(weight.to_device(place.device).to_kind(place.compute).into())
    })
}

fn targets(params: &Lora, architecture: Architecture) -> Result<Vec<&'static str>, Failure> {
    params.targets(architecture).map_err(|none| Failure::input(none.to_string()).hint(none.hint()))
}

/// Gives every target an adapter that does nothing yet: A random, B zero, as PEFT begins.
pub fn attach(model: &mut Decoder, params: &Lora, device: Device) -> Result<()> {
    let targets = targets(params, model.config.architecture)?;
    if model.config.tied && targets.contains(&"lm_head") {
        return Err(Failure::input(
            "`lm_head` cannot be a target: the model's head is its embedding",
        )
        .hint("leave `lm_head` out of `target_modules`")
        .into());
    }
    let rank = params.rank as i64;
    tch::manual_seed(params.seed as i64);
    for linear in model.linears_mut().filter(|linear| targets.contains(&linear.module())) {
        let [out, width] = linear.weight.size();
        // Kaiming's uniform with a = √5 comes to this bound.
        let bound = 1.0 / (width as f64).sqrt();
        let a = Tensor::f_empty([rank, width], (Kind::Float, Device::Cpu))?
            .f_uniform_(-bound, bound)?
            .to_device(device);
        let b = Tensor::f_zeros([out, rank], (Kind::Float, device))?;
        linear.lora = Some(linear::Lora {
            a: a.set_requires_grad(true),
            b: b.set_requires_grad(true),
            scale: params.scale(),
            dropout: params.dropout,
        });
    }
    Ok(())
}

/// Gives the adapters the matrices of one that is there, whose shape the recipe has to ask for.
fn go_on_from(model: &mut Decoder, params: &Lora, from: &Input) -> Result<()> {
    let adapter = Adapter::read(&from.path).map_err(|e| e.called(&from.path, &from.origin))?;
    adapter.check(&model.config).map_err(|e| e.called(&from.path, &from.origin))?;
    let mut deltas = adapter.deltas;
    let differs = |what: String, hint: String| -> Result<()> {
        Err(Failure::input(format!("{}: {what}", from.origin)).hint(hint).into())
    };
    let adapted = model.linears_mut().filter(|linear| linear.lora.is_some());
    for linear in adapted {
        let Some(delta) = deltas.remove(&linear.name) else {
            let what = format!("the adapter does not change `{}`", linear.name);
            let module = linear.module();
            return differs(what, format!("leave `{module}` out of `target_modules`"));
        };
        let (rank, scale) = (params.rank, params.scale());
        if (delta.rank, delta.scale) != (rank, scale) {
            let what = format!(
                "`{}` has rank {} and scale {}, the recipe asks for {rank} and {scale}",
                linear.name, delta.rank, delta.scale
            );
            let hint = format!(
                "set `rank = {}` and `alpha = {}`, and `rslora = {}`",
                delta.rank, delta.alpha, adapter.config.use_rslora
            );
            return differs(what, hint);
        }
        let lora = linear.lora.as_ref().expect("only those that have one");
        for (ours, theirs) in [(&lora.a, &delta.a), (&lora.b, &delta.b)] {
            let theirs = Tensor::from_slice(theirs).view_as(ours);
            tch::no_grad(|| ours.shallow_clone().f_copy_(&theirs))?;
        }
    }
    match deltas.keys().next() {
        Some(name) => differs(
            format!("the adapter changes `{name}`, which is no target of the recipe"),
            format!(
                "add `{}` to `target_modules`",
                names::module(name.trim_end_matches(".weight"))
            ),
        ),
        None => Ok(()),
    }
}

/// The adapter's tensors by their names in a PEFT folder.
fn adapter(model: &mut Decoder) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    for linear in model.linears_mut() {
        if let Some(lora) = &linear.lora {
            let module = linear.name.trim_end_matches(".weight");
            for (part, tensor) in [('A', &lora.a), ('B', &lora.b)] {
                all.insert(peft::tensor_name(module, part), tensor.shallow_clone());
            }
        }
    }
    all
}

/// What the base calls itself, where it says: a repository on the hub, not a path.
fn base_name(base: &Path) -> Option<String> {
    let config: Value =
        serde_json::from_slice(&std::fs::read(base.join("config.json")).ok()?).ok()?;
    let name = config["_name_or_path"].as_str()?;
    (!name.is_empty() && !name.starts_with(['.', '/'])).then(|| name.to_string())
}

/// The model card: how the adapter came to be, in nothing that changes from run to run.
fn card(
    params: &Lora,
    targets: &[&str],
    base: Option<&str>,
    data: &Dataset,
    outcome: Outcome,
) -> String {
    let mut out = String::from("---\n");
    if let Some(base) = base {
        _ = write!(out, "base_model: {base}\nbase_model_relation: adapter\n");
    }
    out.push_str("library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n");
    out.push_str("# LoRA adapter\n\nTrained by Anneal with `train/lora`.\n\n| | |\n|---|---|\n");
    let held = outcome.validation_loss.map(|loss| format!("{loss:.4}"));
    let steps = match outcome.kept {
        Some(kept) => {
            format!("{}; kept: step {kept}, of the lowest validation loss", outcome.steps)
        }
        None => outcome.steps.to_string(),
    };
    for (name, value) in [
        ("rank, alpha", format!("{}, {}", params.rank, params.alpha)),
        ("dropout", params.dropout.to_string()),
        ("target modules", targets.join(", ")),
        ("learning rate", params.learning_rate.to_string()),
        ("epochs", params.epochs.to_string()),
        ("optimiser steps", steps),
        ("rows", data.train.len().to_string()),
        ("tokens seen", outcome.tokens.to_string()),
        ("training loss", format!("{:.4}", outcome.loss)),
        ("validation loss", held.unwrap_or_else(|| "not measured".into())),
        ("seed", params.seed.to_string()),
    ] {
        _ = writeln!(out, "| {name} | {value} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde::Deserialize;
    use serde_json::json;
    use step::{Kind as ArtifactKind, StepDef};

    use super::*;

    fn golden(path: &str) -> Input {
        let crates = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = crates.join(path);
        Input { label: "it".into(), kind: ArtifactKind::Adapter, path, origin: "it".into() }
    }

    /// A model with adapters that are to go on from PEFT's.
    fn go_on(architecture: &str, change: Value) -> Result<BTreeMap<String, Tensor>, String> {
        let Value::Object(change) = change else { unreachable!("tests pass objects") };
        let params = json!({"rank": 3, "alpha": 6, "target_modules": "all-linear"});
        let Value::Object(mut params) = params else { unreachable!("an object") };
        params.extend(change);
        let params = (StepDef::of::<Lora>().resolve)(params).unwrap();
        let params = Lora::deserialize(&params).unwrap();
        let base = golden(&format!("train/src/worker/golden/{architecture}"));
        let config = Config::read(&base.path).unwrap();
        let place = Place { device: Device::Cpu, compute: Kind::Float };
        let mut model = frozen(&base, config, params.bits, place).unwrap();
        attach(&mut model, &params, Device::Cpu).unwrap();
        let from = golden(&format!("merge/tests/golden/{architecture}/first"));
        go_on_from(&mut model, &params, &from).map_err(|error| {
            let failure = error.downcast::<Failure>().unwrap();
            format!("{}: {}", failure.message, failure.hint.unwrap_or_default())
        })?;
        Ok(adapter(&mut model))
    }

    #[test]
    fn training_goes_on_from_an_adapter_of_peft() {
        for architecture in ["llama", "phi3", "gemma3"] {
            let folder = golden(&format!("merge/tests/golden/{architecture}/first"));
            let theirs = Weights::open(&folder.path).unwrap();
            let ours = go_on(architecture, json!({})).unwrap();
            assert_eq!(ours.len(), theirs.names().count());
            for (name, tensor) in ours {
                let theirs = theirs.get(&name).unwrap().to_f32().unwrap();
                assert!(tensor.requires_grad());
                assert_eq!(Vec::<f32>::try_from(tensor.detach().reshape([-1])).unwrap(), theirs);
            }
        }
    }

    #[test]
    fn an_adapter_of_another_shape_is_refused_by_name() {
        for (change, message) in [
            (
                json!({"rank": 4}),
                "it: `model.layers.0.self_attn.q_proj.weight` has rank 3 and scale 2, the recipe asks for 4 and 1.5: set `rank = 3` and `alpha = 6`, and `rslora = false`",
            ),
            (
                json!({"target_modules": ["q_proj"]}),
                "it: the adapter changes `model.layers.0.mlp.down_proj.weight`, which is no target of the recipe: add `down_proj` to `target_modules`",
            ),
            (
                json!({"target_modules": ["all-linear", "lm_head"]}),
                "it: the adapter does not change `lm_head.weight`: leave `lm_head` out of `target_modules`",
            ),
        ] {
            assert_eq!(go_on("llama", change).unwrap_err(), message);
        }
    }
}
