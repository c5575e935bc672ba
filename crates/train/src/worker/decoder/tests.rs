//! The decoder beside transformers and PEFT: what `golden/make.py` wrote down.

use std::collections::HashMap;
use std::path::PathBuf;

use checkpoint::weights::Weights;
use serde::Deserialize;
use serde_json::{Value, json};
use step::StepDef;

use super::*;
use crate::data::Rows;
use crate::optimiser::{Optimiser, Trainable};
use crate::tensor;

const ARCHITECTURES: [&str; 7] =
    ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-short"];

fn folder(architecture: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/worker/golden").join(architecture)
}

fn model(architecture: &str) -> Decoder {
    model_in(architecture, Kind::Float)
}

fn model_in(architecture: &str, compute: Kind) -> Decoder {
    // Models this small are slower with two threads that wait for each other.
    tch::set_num_threads(1);
    let dir = folder(architecture);
    let config = Config::read(&dir).unwrap();
    let weights = Weights::open(&dir).unwrap();
    weights.check(&config).unwrap();
    Decoder::new(config, compute, |name, _| {
        let weight = weights.get(name).unwrap();
        Ok(tensor::from_bytes(weight.dtype, &weight.shape, weight.data)?.to_kind(compute))
    })
    .unwrap()
}

fn expected(architecture: &str) -> HashMap<String, Tensor> {
    let path = folder(architecture).join("expected.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// Each row predicts its own next tokens.
fn batch(ids: &Tensor) -> Batch {
    let (rows, length) = ids.size2().unwrap();
    let places = Tensor::arange(rows * length, (Kind::Int64, Device::Cpu)).view([rows, length]);
    let predicting = places.narrow(1, 0, length - 1).reshape([-1]);
    let targets = ids.narrow(1, 1, length - 1).reshape([-1]);
    let weights = Tensor::ones([targets.numel() as i64], (Kind::Float, Device::Cpu));
    let lengths = ids.full_like(length);
    Batch { ids: ids.shallow_clone(), lengths, packed: None, predicting, targets, weights }
}

/// Gives every layer but the head the adapter that PEFT had.
fn adapt(model: &mut Decoder, expected: &HashMap<String, Tensor>) -> Vec<(String, Tensor)> {
    let mut leaves = Vec::new();
    for linear in model.linears_mut().filter(|linear| linear.module() != "lm_head") {
        let name = linear.name.trim_end_matches(".weight").to_string();
        let [a, b] = ["lora_A", "lora_B"].map(|part| {
            let name = format!("{name}.{part}.weight");
            let leaf = expected[&format!("adapter.{name}")].copy().set_requires_grad(true);
            leaves.push((name, leaf.shallow_clone()));
            leaf
        });
        linear.lora = Some(Lora { a, b, scale: 6.0 / 3.0, dropout: 0.0 });
    }
    leaves
}

/// The largest distance, as a share of the largest value.
fn distance(ours: &Tensor, theirs: &Tensor) -> f64 {
    let largest = theirs.abs().max().double_value(&[]);
    (ours - theirs).abs().max().double_value(&[]) / largest
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers_and_peft() {
    for architecture in ARCHITECTURES {
        let (mut model, expected) = (model(architecture), expected(architecture));
        let batch = batch(&expected["ids"]);
        let logits = model.head.forward(&model.hidden(&batch, false), false);
        let off = distance(&logits, &expected["logits"].flatten(0, 1));
        assert!(off <= 1e-5, "{architecture}: logits off by {off}");

        let leaves = adapt(&mut model, &expected);
        let loss = model.loss(&batch, false) / batch.targets.numel() as f64;
        let off = distance(&loss, &expected["loss"]);
        assert!(off <= 1e-5, "{architecture}: loss off by {off}");
        loss.backward();
        for (name, leaf) in leaves {
            let off = distance(&leaf.grad(), &expected[&format!("gradient.{name}")]);
            assert!(off <= 1e-5, "{architecture}: gradient of {name} off by {off}");
        }
    }
}

/// What is fused for float32 on a processor is a chain of operations for every other kind.
#[test]
fn logits_are_the_same_without_fused_operations() {
    for architecture in ARCHITECTURES {
        let (model, expected) = (model_in(architecture, Kind::Double), expected(architecture));
        let batch = batch(&expected["ids"]);
        let logits = model.head.forward(&model.hidden(&batch, false), false);
        let off = distance(&logits, &expected["logits"].flatten(0, 1));
        assert!(off <= 1e-5, "{architecture}: logits off by {off}");
    }
}

#[test]
fn fifty_steps_stay_with_those_of_peft() {
    let params = json!({"learning_rate": 2e-3, "weight_decay": 0.01, "max_grad_norm": 0.0});
    let Value::Object(params) = params else { unreachable!("an object") };
    let params = (StepDef::of::<train::Lora>().resolve)(params).unwrap();
    let training = train::Lora::deserialize(&params).unwrap().training();
    for architecture in ARCHITECTURES {
        let (mut model, expected) = (model(architecture), expected(architecture));
        let batch = batch(&expected["ids"]);
        let trainables = adapt(&mut model, &expected);
        let trainables =
            trainables.into_iter().map(|(name, tensor)| Trainable { name, tensor, decays: true });
        let mut optimiser = Optimiser::new(trainables.collect(), &training);
        for (step, theirs) in Vec::<f64>::try_from(&expected["losses"]).unwrap().iter().enumerate()
        {
            let loss = model.loss(&batch, false) / batch.targets.numel() as f64;
            loss.backward();
            let _ = optimiser.step(training.learning_rate).unwrap();
            let ours = loss.double_value(&[]);
            let off = (ours - theirs).abs() / theirs;
            assert!(off <= 1e-4, "{architecture}: step {step}: {ours}, not {theirs}");
        }
    }
}

#[test]
fn packed_rows_lose_what_they_lose_alone() {
    for architecture in ARCHITECTURES {
        let model = model(architecture);
        let ids: Vec<i32> = (0..47).map(|i| (i * 29 + 5) % 48).collect();
        let offsets = vec![0, 21, 30, 47];
        let rows = Rows::new("rows".into(), ids.clone(), vec![1; ids.len()], offsets).unwrap();
        let loss = |rows: &Rows, which: &[u32], packed: bool| {
            model.loss(&rows.batch(which, packed, 0.0, Device::Cpu), false).double_value(&[])
        };
        let alone: f64 = [[0], [1], [2]].iter().map(|row| loss(&rows, row, false)).sum();
        for packed in [true, false] {
            let together = loss(&rows, &[0, 1, 2], packed);
            assert!((together - alone).abs() <= 1e-5 * alone, "{architecture}: {together} {alone}");
        }
    }
}

/// Every parameter of a checkpoint is named again when it is written.
#[test]
fn weights_are_those_that_were_read() {
    for architecture in ARCHITECTURES {
        let model = model(architecture);
        let names: Vec<String> = model.weights().into_iter().map(|(name, _)| name).collect();
        let expected = names::expected(&model.config);
        assert_eq!(names, expected.into_iter().map(|(name, _)| name).collect::<Vec<_>>());
    }
}
