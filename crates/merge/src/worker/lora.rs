//! The work of `merge/lora`: W + Σ weight·scale·B·A in f32, rounded once, tensor by tensor over mmap.
//!
//! The product is summed over the rank in order with fused multiply-add, as PEFT's is; each element
//! is computed by one thread, so the bytes do not depend on how many there are.

use std::collections::BTreeMap;
use std::fmt::Write;

use checkpoint::adapter::{Adapter, Delta};
use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype, Spec, TensorRef, Weights, Writer};
use half::{bf16, f16};
use merge::lora::{self, Lora};
use rayon::prelude::*;
use step::Failure;
use step::worker::{Job, Progress};

pub fn run(job: &Job) -> anyhow::Result<()> {
    let params: Lora = job.params()?;
    let base_dir = &job.input("base")?.path;
    let config = Config::read(base_dir).map_err(Failure::from)?;
    let base = Weights::open(base_dir).map_err(Failure::from)?;
    base.check(&config).map_err(Failure::from)?;
    let adapters = adapters(job, &config)?;
    // A weight's name → what is added to it.
    let mut changes: BTreeMap<&str, Vec<Change>> = BTreeMap::new();
    for (name, adapter) in &adapters {
        for (weight, delta) in &adapter.deltas {
            let factor = (delta.scale * params.weight(name)) as f32;
            changes.entry(weight).or_default().push(Change { delta, factor });
        }
    }

    let dtype = match params.dtype {
        lora::Dtype::BFloat16 => Dtype::BF16,
        lora::Dtype::Float16 => Dtype::F16,
        lora::Dtype::Float32 => Dtype::F32,
    };
    let expected = names::expected(&config);
    let specs = expected.iter().map(|(name, shape)| Spec::new(name, dtype, shape)).collect();
    let path = job.out().join("model.safetensors");
    let mut writer = Writer::create(&path, specs).map_err(Failure::from)?;
    let order = writer.order();
    let mut kept = Kept::default();
    let threads = rayon::ThreadPoolBuilder::new().num_threads(job.threads()).build()?;
    for (done, spec) in order.iter().enumerate() {
        let tensor = base.get(&spec.name).map_err(Failure::from)?;
        let bytes = threads.install(|| match changes.get(&*spec.name) {
            Some(changes) => merge(&tensor, changes, dtype, &mut kept),
            None if tensor.dtype == dtype => Ok(tensor.data.to_vec()),
            None => Ok(encode(&tensor.to_f32()?, dtype)),
        });
        writer.write(&spec.name, &bytes.map_err(Failure::from)?).map_err(Failure::from)?;
        job.progress(Progress {
            phase: "merge".into(),
            done: done as u64 + 1,
            total: order.len() as u64,
            unit: "tensors".into(),
            ..Progress::default()
        });
    }
    writer.finish().map_err(Failure::from)?;
    kept.refuse_what_was_lost()?;

    checkpoint::copy_companions(base_dir, job.out()).map_err(Failure::from)?;
    checkpoint::copy_config(base_dir, job.out(), params.dtype.name()).map_err(Failure::from)?;
    job.metric("delta_norm", kept.mean(|row| row.relative));
    job.metric("delta_kept", kept.mean(|row| row.kept));
    job.metric("tensors_merged", kept.rows.len() as f64);
    let mut report = kept.summary(params.dtype.name()) + "| adapter | weight |\n|---|---|\n";
    for name in adapters.keys() {
        let weight = params.weight(name);
        _ = writeln!(report, "| {name} | {weight} |");
        if !params.weights.is_empty() {
            job.metric(&format!("weight.{name}"), weight);
        }
    }
    report.push('\n');
    std::fs::write(job.report().join("report.md"), report + &kept.table())?;
    Ok(())
}

/// The adapters by name, each held to the base. In this order they are added, whatever the order
/// in the recipe, which the key does not know.
fn adapters<'a>(job: &'a Job, base: &Config) -> anyhow::Result<BTreeMap<&'a str, Adapter>> {
    let mut all = BTreeMap::new();
    for input in job.inputs("adapter").iter().chain(job.inputs("adapters")) {
        let read = || {
            let adapter = Adapter::read(&input.path)?;
            adapter.check(base)?;
            Ok(adapter)
        };
        let adapter =
            read().map_err(|e: checkpoint::Error| e.called(&input.path, &input.origin))?;
        if adapter.untrained() {
            return Err(Failure::input(format!(
                "{}: the adapter was never trained: all of its B matrices are zero",
                input.origin
            ))
            .hint("look at the training step's loss curve")
            .into());
        }
        all.insert(input.label.as_str(), adapter);
    }
    Ok(all)
}

/// What one adapter adds to a weight: `factor · B · A`.
struct Change<'a> {
    delta: &'a Delta,
    factor: f32,
}

impl Change<'_> {
    /// Row `o` of what is added.
    fn row(&self, o: usize, columns: usize) -> Vec<f32> {
        let Delta { a, b, rank, .. } = self.delta;
        let product = product(&b[o * rank..][..*rank], a, columns);
        product.into_iter().map(|x| x * self.factor).collect()
    }
}

/// The merged tensor in its final type; what was kept of the change goes into `kept`.
fn merge(
    base: &TensorRef,
    changes: &[Change],
    dtype: Dtype,
    kept: &mut Kept,
) -> Result<Vec<u8>, checkpoint::Error> {
    let weight = base.to_f32()?;
    let columns = base.shape[1];
    let rows: Vec<(Vec<u8>, [f64; 3])> = weight
        .par_chunks(columns)
        .enumerate()
        .map(|(o, row)| {
            let mut change = changes[0].row(o, columns);
            for other in &changes[1..] {
                change.iter_mut().zip(other.row(o, columns)).for_each(|(sum, x)| *sum += x);
            }
            let sum: Vec<f32> = row.iter().zip(&change).map(|(w, d)| w + d).collect();
            let bytes = encode(&sum, dtype);
            let rounded = decode(&bytes, dtype);
            let mut squares = [0.0; 3];
            for ((w, d), r) in row.iter().zip(&change).zip(rounded) {
                let (w, d) = (f64::from(*w), f64::from(*d));
                squares[0] += w * w;
                squares[1] += d * d;
                squares[2] += (f64::from(r) - w - d).powi(2);
            }
            (bytes, squares)
        })
        .collect();
    let mut bytes = Vec::with_capacity(weight.len() * dtype.bitsize() / 8);
    // Summed row by row, in order: the same figure however many threads there were.
    let mut total = [0.0; 3];
    for (row, squares) in rows {
        bytes.extend(row);
        for (t, s) in total.iter_mut().zip(squares) {
            *t += s;
        }
    }
    kept.push(&base.name, total);
    Ok(bytes)
}

/// One row of B times A: `out[j] = Σ_k b[k] · a[k][j]`, k in order, fused.
fn product(b: &[f32], a: &[f32], columns: usize) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        // SAFETY: both features were just found.
        return unsafe { product_fma(b, a, columns) };
    }
    product_any(b, a, columns)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn product_fma(b: &[f32], a: &[f32], columns: usize) -> Vec<f32> {
    product_any(b, a, columns)
}

/// `mul_add` rounds once on every machine, with an instruction for it or without.
#[inline(always)]
fn product_any(b: &[f32], a: &[f32], columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; columns];
    for (b, a) in b.iter().zip(a.chunks_exact(columns)) {
        for (out, a) in out.iter_mut().zip(a) {
            *out = b.mul_add(*a, *out);
        }
    }
    out
}

/// Rounds to nearest, ties to even.
fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let two = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::BF16 => two.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F16 => two.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// What became of each change.
#[derive(Default)]
struct Kept {
    rows: Vec<Row>,
}

struct Row {
    name: String,
    /// ‖Δ‖/‖W‖.
    relative: f64,
    /// 1 − ‖(W′ − W) − Δ‖/‖Δ‖: the share of the change that rounding left whole.
    kept: f64,
    /// Whether Δ is zero throughout: B has not moved from its start.
    zero: bool,
}

impl Kept {
    fn push(&mut self, name: &str, [w, d, lost]: [f64; 3]) {
        let zero = d == 0.0;
        let kept = if zero { 1.0 } else { 1.0 - (lost / d).sqrt() };
        let relative = if w > 0.0 { (d / w).sqrt() } else { f64::INFINITY };
        self.rows.push(Row { name: name.into(), relative, kept, zero });
        self.rows.sort_by(|a, b| a.name.cmp(&b.name));
    }

    fn mean(&self, of: impl Fn(&Row) -> f64) -> f64 {
        self.rows.iter().map(of).sum::<f64>() / self.rows.len() as f64
    }

    /// A merge that changes nothing is never what was meant.
    fn refuse_what_was_lost(&self) -> Result<(), Failure> {
        if self.rows.iter().all(|row| row.zero) {
            return Err(Failure::input("the adapters together change nothing")
                .hint("look at their weights: do two of them cancel out?"));
        }
        match self.rows.iter().find(|row| row.kept <= 0.0) {
            Some(row) => Err(Failure::input(format!(
                "`{}`: the adapter's change is too small to survive rounding (‖Δ‖/‖W‖ = {:.1e})",
                row.name, row.relative
            ))
            .hint("merge with dtype = \"float32\"")),
            None => Ok(()),
        }
    }

    fn summary(&self, dtype: &str) -> String {
        format!(
            "# Merge\n\n{} tensors changed; {:.1} % of the change survives rounding to {dtype}.\n\n",
            self.rows.len(),
            self.mean(|row| row.kept) * 100.0
        )
    }

    fn table(&self) -> String {
        let mut text = String::from("| tensor | ‖Δ‖/‖W‖ | kept |\n|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {:.4} | {:.1} % |",
                row.name,
                row.relative,
                row.kept * 100.0
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;
    use step::Kind;
    use step::worker::{Input, Mode, Request};

    const CONFIG: &str = r#"{"model_type":"llama","hidden_size":8,"num_hidden_layers":1,
        "num_attention_heads":2,"num_key_value_heads":1,"intermediate_size":12,"vocab_size":10,
        "tie_word_embeddings":true,"dtype":"bfloat16"}"#;

    /// Numbers that look random and are the same each time.
    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(747_796_405).wrapping_add(1);
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    fn base(dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("config.json"), CONFIG).unwrap();
        let config = Config::read(dir).unwrap();
        let specs = names::expected(&config);
        let specs = specs.iter().map(|(n, s)| Spec::new(n, Dtype::BF16, s)).collect();
        let mut writer = Writer::create(&dir.join("model.safetensors"), specs).unwrap();
        for (i, spec) in writer.order().iter().enumerate() {
            let values = noise(spec.shape.iter().product(), i as u32);
            writer.write(&spec.name, &encode(&values, Dtype::BF16)).unwrap();
        }
        writer.finish().unwrap();
    }

    fn adapter(dir: &Path, config: &str, b: f32) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("adapter_config.json"), config).unwrap();
        let prefix = "base_model.model.model.layers.0.self_attn.q_proj";
        let specs = vec![
            Spec::new(format!("{prefix}.lora_A.weight"), Dtype::F32, &[2, 8]),
            Spec::new(format!("{prefix}.lora_B.weight"), Dtype::F32, &[8, 2]),
        ];
        let mut writer = Writer::create(&dir.join("adapter_model.safetensors"), specs).unwrap();
        for (i, spec) in writer.order().iter().enumerate() {
            let scale = if spec.name.contains("lora_B") { b } else { 1.0 };
            let values: Vec<f32> = noise(16, 99 + i as u32).iter().map(|x| x * scale).collect();
            writer.write(&spec.name, &encode(&values, Dtype::F32)).unwrap();
        }
        writer.finish().unwrap();
    }

    const PLAIN: &str = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"modules_to_save":null}"#;

    fn input(name: &str, kind: Kind, path: &Path) -> Input {
        Input { label: name.into(), kind, path: path.into(), origin: name.into() }
    }

    /// Merges what is in `inputs` into `dir`.
    fn merge_into(
        dir: &Path,
        threads: usize,
        params: Value,
        inputs: &[(&str, &[Input])],
    ) -> Result<(), String> {
        let folder = |name: &str| {
            let path = dir.join(format!("{name}{threads}"));
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let request = Request {
            format: 1,
            step: "merge/lora".into(),
            mode: Mode::Build,
            params,
            inputs: inputs.iter().map(|(name, all)| (name.to_string(), all.to_vec())).collect(),
            out: folder("out"),
            report: folder("report"),
            scratch: folder("scratch"),
            tools: BTreeMap::new(),
            threads,
        };
        run(&Job::new(request, std::io::sink())).map_err(|e| format!("{e:#}"))
    }

    fn merged(dir: &Path, threads: usize) -> Result<Vec<u8>, String> {
        let inputs = [
            ("base", [input("base", Kind::Model, &dir.join("base"))]),
            ("adapter", [input("adapter", Kind::Adapter, &dir.join("adapter"))]),
        ];
        let inputs = inputs.each_ref().map(|(name, input)| (*name, input.as_slice()));
        merge_into(dir, threads, json!({"dtype": "bfloat16"}), &inputs)?;
        Ok(std::fs::read(dir.join(format!("out{threads}/model.safetensors"))).unwrap())
    }

    /// Holds merges of one adapter and of two to PEFT's: see tests/golden/make.py.
    #[test]
    fn merges_are_those_of_peft() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR"));
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"] {
            let matrices = if architecture == "phi3" { 4 } else { 7 };
            let golden = crates.join("tests/golden").join(architecture);
            let theirs = Weights::open_file(&golden.join("merged.safetensors")).unwrap();
            let base = crates.join("../train/src/worker/golden").join(architecture);
            let base = [input("base", Kind::Model, &base)];
            let [first, second] =
                ["first", "second"].map(|name| [input(name, Kind::Adapter, &golden.join(name))]);
            let both = [second.clone(), first.clone()].concat();
            let weights = json!({"dtype": "float32", "weights": {"first": 0.7, "second": -0.4}});
            for (name, field, adapters, params) in [
                ("first", "adapter", &first[..], json!({"dtype": "float32"})),
                ("second", "adapter", &second[..], json!({"dtype": "float32"})),
                ("both", "adapters", &both[..], weights),
            ] {
                let dir = tempfile::tempdir().unwrap();
                merge_into(dir.path(), 1, params, &[("base", &base), (field, adapters)]).unwrap();
                let ours = Weights::open(&dir.path().join("out1")).unwrap();
                let prefix = format!("{name}.");
                let mut compared = 0;
                for tensor in theirs.names().filter(|t| t.starts_with(&prefix)) {
                    let want = theirs.get(tensor).unwrap().to_f32().unwrap();
                    let got = ours.get(&tensor[prefix.len()..]).unwrap().to_f32().unwrap();
                    assert_eq!(got.len(), want.len());
                    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    let off = got.iter().zip(&want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs()));
                    assert!(off <= 5e-7 * largest, "{architecture}: {tensor} is off by {off}");
                    compared += 1;
                }
                assert_eq!(compared, if name == "both" { matrices } else { 1 });
                let report = std::fs::read_to_string(dir.path().join("report1/report.md")).unwrap();
                let row = if name == "both" { "| second | -0.4 |" } else { "| 1 |" };
                assert!(report.contains(row), "{report}");
            }
        }
    }

    #[test]
    fn adapters_that_cancel_out_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let [base_dir, adapter_dir] = ["base", "adapter"].map(|name| dir.path().join(name));
        base(&base_dir);
        adapter(&adapter_dir, PLAIN, 0.5);
        let [a, b] = ["a", "b"].map(|name| input(name, Kind::Adapter, &adapter_dir));
        let base = [input("base", Kind::Model, &base_dir)];
        let params = json!({"weights": {"a": 1, "b": -1}});
        let inputs: [(&str, &[Input]); 2] = [("base", &base), ("adapters", &[a, b])];
        let error = merge_into(dir.path(), 1, params, &inputs).unwrap_err();
        assert_eq!(error, "the adapters together change nothing");
    }

    #[test]
    fn the_sum_is_rounded_once_and_threads_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        base(&dir.path().join("base"));
        adapter(&dir.path().join("adapter"), PLAIN, 0.5);
        let one = merged(dir.path(), 1).unwrap();
        assert_eq!(one, merged(dir.path(), 2).unwrap());

        let name = "model.layers.0.self_attn.q_proj.weight";
        let w =
            Weights::open(&dir.path().join("base")).unwrap().get(name).unwrap().to_f32().unwrap();
        let adapter = Adapter::read(&dir.path().join("adapter")).unwrap();
        let d = &adapter.deltas[name];
        let got =
            Weights::open(&dir.path().join("out1")).unwrap().get(name).unwrap().to_f32().unwrap();
        for (o, row) in got.chunks(8).enumerate() {
            for (i, got) in row.iter().enumerate() {
                let mut sum = 0.0f32;
                for k in 0..2 {
                    sum = d.b[o * 2 + k].mul_add(d.a[k * 8 + i], sum);
                }
                let want = bf16::from_f32(w[o * 8 + i] + sum * 2.0).to_f32();
                assert_eq!(*got, want);
            }
        }
    }

    #[test]
    fn what_cannot_be_merged_is_refused_by_name() {
        for (config, b, message) in [
            (PLAIN, 0.0, "the adapter was never trained: all of its B matrices are zero"),
            (PLAIN, 1e-9, "is too small to survive rounding"),
            (&PLAIN.replace("null", "[\"lm_head\"]"), 1.0, "modules_to_save is not built yet"),
            (
                &PLAIN.replace("\"r\":2", "\"r\":2,\"use_dora\":true"),
                1.0,
                "use_dora is not built yet",
            ),
            (&PLAIN.replace("\"r\":2", "\"r\":3"), 1.0, "the config says r = 3"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            base(&dir.path().join("base"));
            adapter(&dir.path().join("adapter"), config, b);
            let error = merged(dir.path(), 1).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
