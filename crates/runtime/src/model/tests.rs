//! Each architecture, as transformers computes it: the graph that is written for it, on the real
//! ONNX Runtime.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype as Stored, Spec, Weights, Writer};
use graph::proto::{ModelProto, NodeProto, TensorProto, data_type};
use graph::{Dtype, Quantisation};
use prost::Message;

use super::*;

const ARCHITECTURES: [&str; 7] =
    ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-short"];
/// Rows, and the tokens of each.
const B: usize = 2;
const T: usize = 23;

/// A model that tests/golden/make.py made, or one in a folder of the test's own.
fn golden(architecture: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(architecture)
}

fn export(model: &Path, to: &Path, dtype: Dtype, quantisation: Quantisation) -> PathBuf {
    let onnx = to.join("onnx");
    std::fs::create_dir_all(&onnx).unwrap();
    let options = graph::Options { dtype, quantisation, max_positions: 64, chunk: graph::CHUNK };
    graph::write(model, &onnx, options, &mut |_, _| ()).unwrap().graph
}

fn open(dir: &Path) -> Model {
    let library = std::env::var_os("ORT_DYLIB_PATH")
        .expect("ORT_DYLIB_PATH: libonnxruntime, or the folder that it lies in");
    Runtime::init(Path::new(&library)).unwrap();
    Model::open(dir, Options { threads: 1, scratch: dir }).unwrap()
}

fn exported(model: &Path, dtype: Dtype, quantisation: Quantisation) -> Model {
    let dir = tempfile::tempdir().unwrap();
    export(model, dir.path(), dtype, quantisation);
    // The session holds what it needs of the files.
    open(dir.path())
}

/// The tokens that transformers was given, and its logits: [B, T, V].
fn expected(architecture: &str) -> (Vec<Vec<u32>>, Vec<f32>) {
    let weights = Weights::open_file(&golden(architecture).join("expected.safetensors")).unwrap();
    let ids = weights.get("ids").unwrap();
    let ids: Vec<u32> = ids.data.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let rows: Vec<Vec<u32>> = ids.chunks(T).map(Vec::from).collect();
    assert_eq!(rows.len(), B);
    (rows, weights.get("logits").unwrap().to_f32().unwrap())
}

/// The logits of all tokens, of which the first `at_once` are read together and each other one on
/// top of the cache: [B, T, V].
fn logits(model: &mut Model, rows: &[Vec<u32>], at_once: usize) -> Vec<f32> {
    let vocab = model.vocab_size();
    let mut cache = model.cache(B).unwrap();
    let mut all = vec![0.0; B * T * vocab];
    let mut from = 0;
    while from < T {
        let count = if from == 0 { at_once } else { 1 };
        let ids: Vec<u32> = rows.iter().flat_map(|row| &row[from..from + count]).copied().collect();
        let new = model.forward(&ids, &mut cache, count).unwrap();
        for (b, new) in new.chunks(count * vocab).enumerate() {
            all[(b * T + from) * vocab..][..count * vocab].copy_from_slice(new);
        }
        from += count;
    }
    all
}

/// The largest difference, as a part of the largest number.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // NaN is larger than anything.
    differences.fold(0f32, |most, x| if x <= most { most } else { x }) / largest
}

/// The root of the mean square of the differences, as a part of that of the numbers.
fn off_on_average(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    (differences / expected.iter().map(|x| x.powi(2)).sum::<f32>()).sqrt()
}

#[test]
fn logits_are_those_of_transformers() {
    for architecture in ARCHITECTURES {
        let (rows, expected) = expected(architecture);
        let mut model = exported(&golden(architecture), Dtype::Fp32, Quantisation::default());
        // LongRope turns by other angles once a row is longer than 16, and what is cached stays.
        let first = if architecture == "phi3" { 17 } else { 4 };
        for at_once in [T, first] {
            let off = apart(&logits(&mut model, &rows, at_once), &expected);
            assert!(off < 1e-5, "{architecture}, {at_once} at once: {off:e}");
        }
    }
}

/// In short rows LongRope's short factors count, although the model can read longer ones.
#[test]
fn longrope_is_chosen_by_the_length_of_the_row() {
    let (rows, expected) = expected("phi3");
    let mut model = exported(&golden("phi3"), Dtype::Fp32, Quantisation::default());
    let vocab = model.vocab_size();
    let short = model.logits(&rows[0][..16]).unwrap();
    assert!(apart(&short, &expected[..16 * vocab]) > 1e-2);
    let long = model.logits(&rows[0][..17]).unwrap();
    assert!(apart(&long, &expected[..17 * vocab]) < 1e-5);
}

/// Products and caches of 16 bits beside the same weights in 32. Of 4 bits a random model has nothing
/// left to compare: what they mean is held below.
#[test]
fn each_type_is_near_to_the_whole_model() {
    let plain = Quantisation::default();
    for (dtype, beside, most) in [
        (Dtype::Fp16, Dtype::Fp32, 4e-3),
        (Dtype::Q4f16, Dtype::Q4, 4e-3),
        (Dtype::Int8, Dtype::Fp32, 0.1),
    ] {
        for architecture in ARCHITECTURES {
            let (rows, _) = expected(architecture);
            let [mut model, mut beside] =
                [dtype, beside].map(|dtype| exported(&golden(architecture), dtype, plain));
            let whole = logits(&mut model, &rows, T);
            let off = off_on_average(&whole, &logits(&mut beside, &rows, T));
            assert!(off < most, "{dtype:?} {architecture}: {off:e}");
            // Rows can leave a batch, whatever type their cache has.
            let mut cache = model.cache(B).unwrap();
            let ids: Vec<u32> = rows.iter().flat_map(|row| &row[..T - 1]).copied().collect();
            model.forward(&ids, &mut cache, 1).unwrap();
            cache.keep(&[1]).unwrap();
            let last = model.forward(&rows[1][T - 1..], &mut cache, 1).unwrap();
            let off = apart(&last, &whole[whole.len() - model.vocab_size()..]);
            assert!(off < most / 100.0, "{dtype:?} {architecture}: {off:e} with one row left");
        }
    }
}

/// What the bytes of a quantised graph mean, written as a checkpoint and exported in fp32, gives the
/// same logits: so all that is between the bytes and the logits is as it should be.
#[test]
fn quantised_weights_mean_what_their_bytes_say() {
    let plain = Quantisation::default();
    let others = [
        Quantisation { symmetric: false, ..plain },
        Quantisation { head_bits: 4, ..plain },
        Quantisation { block: 128, symmetric: false, head_bits: 4, search: true },
    ];
    for architecture in ARCHITECTURES {
        let (rows, _) = expected(architecture);
        for (dtype, quantisation) in [(Dtype::Q4, plain), (Dtype::Int8, plain)]
            .into_iter()
            .chain(others.map(|one| (Dtype::Q4, one)))
        {
            let dir = tempfile::tempdir().unwrap();
            let graph = export(&golden(architecture), dir.path(), dtype, quantisation);
            let meant = dir.path().join("meant");
            write_meant(&golden(architecture), &graph, &meant);
            let found = logits(&mut open(dir.path()), &rows, T);
            let mut whole = exported(&meant, Dtype::Fp32, plain);
            let off = apart(&found, &logits(&mut whole, &rows, T));
            assert!(off < 1e-5, "{architecture} {dtype:?} {quantisation:?}: {off:e}");
        }
    }
}

/// The checkpoint `model` with the weights that `graph` holds, in f32, in the folder `to`.
fn write_meant(model: &Path, graph: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    std::fs::copy(model.join("config.json"), to.join("config.json")).unwrap();
    let weights = Weights::open(model).unwrap();
    let config = Config::read(model).unwrap();
    let mut values: HashMap<String, Vec<f32>> = weights
        .names()
        .map(|name| (name.to_string(), weights.get(name).unwrap().to_f32().unwrap()))
        .collect();
    for (node, weight) in packed(graph) {
        // `layers.0.self_attn.qkv_proj.product` holds the rows of one, two or three tensors.
        let node = node.trim_end_matches(".product");
        let Some((i, part)) = node.strip_prefix("layers.").and_then(|rest| rest.split_once('.'))
        else {
            let name = if node == "logits" && !config.tied { names::LM_HEAD } else { names::EMBED };
            values.insert(name.into(), weight);
            continue;
        };
        let layer = |part: &str| names::layer(i.parse().unwrap(), part);
        let fused = values.contains_key(&layer(part));
        let up = values.get(&layer("mlp.gate_up_proj")).map(|both| both.len() / 2);
        match part {
            "self_attn.qkv_proj" if !fused => {
                let mut rest = weight.as_slice();
                for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
                    let into = values.get_mut(&layer(part)).unwrap();
                    let (mine, others) = rest.split_at(into.len());
                    into.copy_from_slice(mine);
                    rest = others;
                }
                assert!(rest.is_empty());
            }
            "mlp.gate_proj" | "mlp.up_proj" if !fused => {
                let from = if part == "mlp.up_proj" { up.unwrap() } else { 0 };
                let both = values.get_mut(&layer("mlp.gate_up_proj")).unwrap();
                both[from..][..weight.len()].copy_from_slice(&weight);
            }
            _ => {
                assert_eq!(values.insert(layer(part), weight.clone()).unwrap().len(), weight.len())
            }
        }
    }
    let specs = weights.names().map(|n| Spec::new(n, Stored::F32, &weights.get(n).unwrap().shape));
    let mut writer = Writer::create(&to.join("model.safetensors"), specs.collect()).unwrap();
    for spec in writer.order() {
        let bytes: Vec<u8> = values[&spec.name].iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// The nodes of a graph with quantised weights, and these as numbers, row by row.
fn packed(path: &Path) -> Vec<(String, Vec<f32>)> {
    let model = ModelProto::decode(std::fs::read(path).unwrap().as_slice()).unwrap();
    let graph = model.graph.unwrap();
    let tensors: HashMap<&str, &TensorProto> =
        graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect();
    let bytes = |name: &str| -> Vec<u8> {
        let entry = |key: &str| {
            let all = &tensors[name].external_data;
            all.iter().find(|entry| entry.key() == key).unwrap().value().to_string()
        };
        let all = std::fs::read(path.with_file_name(entry("location"))).unwrap();
        let number = |key: &str| entry(key).parse::<usize>().unwrap();
        all[number("offset")..][..number("length")].to_vec()
    };
    let unpacked = |node: &NodeProto| {
        let number = |name: &str| {
            let all = &node.attribute;
            all.iter().find(|one| one.name() == name).map(|one| one.i() as usize)
        };
        let (bits, block) = (number("bits").unwrap(), number("block_size").unwrap());
        let data = if node.op_type() == "MatMulNBits" { 1 } else { 0 };
        let n = tensors[node.input[data].as_str()].dims[0] as usize;
        let (levels, scales) = (bytes(&node.input[data]), bytes(&node.input[2]));
        assert_eq!(tensors[node.input[2].as_str()].data_type(), data_type::FLOAT);
        let blocks = scales.len() / 4 / n;
        let k = number("K").unwrap_or(blocks * block);
        let zeros = node.input.get(3).map(|name| bytes(name));
        let level = |all: &[u8], row: usize, i: usize| {
            let row = &all[all.len() / n * row..];
            f32::from(row[i * bits / 8] >> (i * bits % 8) & (0xff >> (8 - bits)))
        };
        let mut values = Vec::new();
        for row in 0..n {
            for i in 0..k {
                let scale = &scales.as_chunks().0[row * blocks + i / block];
                let zero = match &zeros {
                    Some(zeros) => level(zeros, row, i / block),
                    None => (1 << (bits - 1)) as f32,
                };
                values.push((level(&levels, row, i) - zero) * f32::from_le_bytes(*scale));
            }
        }
        (node.name().to_string(), values)
    };
    let ops = ["MatMulNBits", "GatherBlockQuantized"];
    let nodes: Vec<_> = graph.node.iter().filter(|node| ops.contains(&node.op_type())).collect();
    assert!(!nodes.is_empty());
    nodes.into_iter().map(unpacked).collect()
}
