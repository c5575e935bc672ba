//! The work of `merge/lora`: W + Σ weight·scale·B·A, a few rows at a time over mmap.
//!
//! In memory are the adapters and a piece of a tensor, whatever the size of the model.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

use checkpoint::adapter::Adapter;
use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype, PACKED, SCALE, SHAPE, Spec, Weights, Writer};
use merge::lora::{self, Lora};
use rayon::prelude::*;
use step::Failure;
use step::worker::{Job, Progress};

use crate::kept::Kept;
use crate::sum::{Buffers, Change, Merged, Rows, Squares, Stored, Wrong};

/// Bytes of the base that are merged before they are written: what comes out is still in the cache.
const PIECE: usize = 1 << 20;
/// Rows that a thread takes at a time.
const BLOCK: usize = 32;

pub fn run(job: &Job) -> anyhow::Result<()> {
    let params: Lora = job.params()?;
    let base_dir = &job.input("base")?.path;
    let config = Config::read(base_dir).map_err(Failure::from)?;
    let base = Weights::open(base_dir).map_err(Failure::from)?;
    base.check(&config).map_err(Failure::from)?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(job.threads()).build()?;
    let (adapters, copied) = threads.join(
        || adapters(job, &config),
        || checkpoint::copy_companions(base_dir, job.out()).map_err(Failure::from),
    );
    let adapters = adapters?;
    copied?;
    // A weight's name → what is added to it.
    let mut changes: BTreeMap<&str, Vec<Change>> = BTreeMap::new();
    for (name, adapter) in &adapters {
        for (weight, delta) in &adapter.deltas {
            let factor = (delta.scale * params.weight(name)) as f32;
            changes.entry(weight).or_default().push(Change { delta, factor });
        }
    }

    let specs = specs(&config, params.dtype);
    let writer = Writer::model(job.out(), specs, Writer::SHARD).map_err(Failure::from)?;
    let order = writer.order();
    let mut merging = Merging {
        base: &base,
        behind: Behind::new(writer, &base),
        buffers: (0..job.threads()).map(|_| Mutex::default()).collect(),
        merged: Vec::new(),
        kept: Kept::default(),
        scales: BTreeMap::new(),
    };
    for (done, spec) in order.iter().enumerate() {
        threads.install(|| merging.tensor(spec, &changes))?;
        job.progress(Progress {
            phase: "merge".into(),
            done: done as u64 + 1,
            total: order.len() as u64,
            unit: "tensors".into(),
            ..Progress::default()
        });
    }
    let Merging { mut behind, kept, .. } = merging;
    behind.flush().and_then(|()| behind.writer.finish()).map_err(Failure::from)?;
    kept.refuse_what_was_lost()?;
    if let Some(note) = kept.unchanged() {
        job.note(note);
    }

    checkpoint::copy_config(base_dir, job.out(), params.dtype.name(), |config| {
        if params.dtype == lora::Dtype::Int8 {
            config["quantization_config"] = checkpoint::config::int8();
        }
    })
    .map_err(Failure::from)?;
    for (name, figure) in kept.figures() {
        job.metric(name, figure);
    }
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

/// The tensors of the merged model.
fn specs(config: &Config, dtype: lora::Dtype) -> Vec<Spec> {
    let float = match dtype {
        lora::Dtype::Float32 => Dtype::F32,
        lora::Dtype::Float16 => Dtype::F16,
        lora::Dtype::BFloat16 | lora::Dtype::Int8 => Dtype::BF16,
    };
    let mut specs = Vec::new();
    for (name, shape) in names::expected(config) {
        let [rows, columns] = match shape[..] {
            [rows, columns] if dtype == lora::Dtype::Int8 && names::is_linear(&name) => {
                [rows, columns]
            }
            _ => {
                specs.push(Spec::new(name, float, &shape));
                continue;
            }
        };
        specs.push(Spec::new(format!("{name}{PACKED}"), Dtype::I32, &[rows, columns.div_ceil(4)]));
        specs.push(Spec::new(format!("{name}{SCALE}"), Dtype::BF16, &[rows, 1]));
        specs.push(Spec::new(format!("{name}{SHAPE}"), Dtype::I64, &[2]));
    }
    specs
}

/// A model on its way, and what became of each change.
struct Merging<'a> {
    base: &'a Weights,
    behind: Behind<'a>,
    /// One for each thread.
    buffers: Vec<Mutex<Buffers>>,
    /// The piece at hand.
    merged: Vec<u8>,
    kept: Kept,
    /// Of matrices in 8 bits, by name: larger types come first, so their scales come after them.
    scales: BTreeMap<String, Vec<u8>>,
}

impl<'a> Merging<'a> {
    fn tensor(
        &mut self,
        spec: &Spec,
        changes: &BTreeMap<&str, Vec<Change>>,
    ) -> Result<(), Failure> {
        if let Some(name) = spec.name.strip_suffix(SHAPE) {
            let shape = self.base.get(name)?.shape;
            let bytes: Vec<u8> = shape.iter().flat_map(|n| (*n as i64).to_le_bytes()).collect();
            return Ok(self.behind.write(&spec.name, &bytes)?);
        }
        if let Some(scales) = self.scales.remove(&spec.name) {
            return Ok(self.behind.write(&spec.name, &scales)?);
        }
        let (name, stored) = match spec.name.strip_suffix(PACKED) {
            Some(name) => (name, Stored::Int8),
            None => (spec.name.as_str(), Stored::Float(spec.dtype)),
        };
        let changes = changes.get(name).map_or(&[][..], Vec::as_slice);
        let base: &'a Weights = self.base;
        let tensor = base.get(name)?;
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let row = columns * tensor.dtype.bitsize() / 8;
        let merged_row = stored.row_bytes(columns);
        let rows_a_piece = (PIECE / row).next_multiple_of(BLOCK).max(BLOCK);
        let as_it_is = changes.is_empty() && stored == Stored::Float(tensor.dtype);
        let mut sums = Squares::default();
        let mut scales = Vec::new();
        for (at, piece) in tensor.data.chunks(rows_a_piece * row).enumerate() {
            let Self { behind, buffers, merged, .. } = self;
            if !as_it_is {
                merged.resize(piece.len() / row * merged_row, 0);
            }
            let blocks = || -> Vec<Result<Merged, Wrong>> {
                let rows = |block: usize, bytes| {
                    let first = at * rows_a_piece + block * BLOCK;
                    Rows { bytes, dtype: tensor.dtype, columns, first }
                };
                let base = piece.par_chunks(BLOCK * row).enumerate();
                if as_it_is {
                    return base.map(|(block, bytes)| rows(block, bytes).check()).collect();
                }
                let blocks = base.zip(merged.par_chunks_mut(BLOCK * merged_row));
                let blocks = blocks.map(|((block, bytes), out)| {
                    let thread = rayon::current_thread_index().unwrap_or_default();
                    let mut buffers = buffers[thread].lock().expect("no thread panicked");
                    match changes {
                        [] => buffers.convert(rows(block, bytes), stored, out),
                        _ => buffers.merge(rows(block, bytes), changes, stored, out),
                    }
                });
                blocks.collect()
            };
            let (blocks, written) = rayon::join(blocks, || behind.flush());
            written?;
            // Row by row, in order: the same sums however many threads there were, the same error.
            for block in blocks {
                let block = block.map_err(|wrong| failure(spec, tensor.shape.len(), wrong))?;
                for row in block.squares {
                    sums.iter_mut().zip(row).for_each(|(sum, square)| *sum += square);
                }
                scales.extend(block.scales.iter().flat_map(|scale| scale.to_le_bytes()));
            }
            match as_it_is {
                true => behind.put_as_it_is(&spec.name, piece),
                false => behind.put(&spec.name, merged, piece),
            }
        }
        if stored == Stored::Int8 {
            self.scales.insert(format!("{name}{SCALE}"), scales);
        }
        if !changes.is_empty() {
            self.kept.push(name, sums);
        }
        Ok(())
    }
}

/// A writer, and what it is to write while the next piece is merged.
struct Behind<'a> {
    writer: Writer,
    base: &'a Weights,
    name: String,
    waits: Waits,
    /// What was merged.
    merged: Vec<u8>,
    /// What it was merged of, or is written itself.
    of: &'a [u8],
}

enum Waits {
    Nothing,
    Merged,
    AsItIs,
}

impl<'a> Behind<'a> {
    fn new(writer: Writer, base: &'a Weights) -> Self {
        let (name, merged) = (String::new(), Vec::new());
        Self { writer, base, name, waits: Waits::Nothing, merged, of: &[] }
    }

    /// Takes what was merged of a piece of the base, and leaves an older buffer for the next.
    fn put(&mut self, name: &str, merged: &mut Vec<u8>, of: &'a [u8]) {
        self.put_as_it_is(name, of);
        self.waits = Waits::Merged;
        std::mem::swap(&mut self.merged, merged);
    }

    /// Takes a piece of the base.
    fn put_as_it_is(&mut self, name: &str, of: &'a [u8]) {
        self.name = name.into();
        (self.waits, self.of) = (Waits::AsItIs, of);
    }

    /// Writes at once, after what waits.
    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), checkpoint::Error> {
        self.flush()?;
        self.writer.write(name, bytes)
    }

    fn flush(&mut self) -> Result<(), checkpoint::Error> {
        match std::mem::replace(&mut self.waits, Waits::Nothing) {
            Waits::Nothing => return Ok(()),
            Waits::Merged => self.writer.write(&self.name, &self.merged)?,
            Waits::AsItIs => self.writer.write(&self.name, self.of)?,
        }
        self.base.let_go_of(self.of);
        Ok(())
    }
}

fn failure(spec: &Spec, dims: usize, Wrong { row, column, value }: Wrong) -> Failure {
    let name = &spec.name;
    let place = if dims == 1 { format!("[{column}]") } else { format!("[{row}, {column}]") };
    match value.is_finite() {
        true => Failure::input(format!(
            "`{name}` comes to {value} at {place}, more than {:?} holds",
            spec.dtype
        ))
        .hint("merge with dtype = \"bfloat16\" or \"float32\""),
        false => Failure::input(format!("`{name}` comes to {value} at {place}"))
            .hint("the base or the adapter is broken: look at the loss of what trained it"),
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

    fn encoded(values: &[f32], dtype: Dtype) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
        crate::sum::store(values, dtype, &mut bytes, &mut vec![0.0; values.len()]);
        bytes
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
            writer.write(&spec.name, &encoded(&values, Dtype::BF16)).unwrap();
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
            writer.write(&spec.name, &encoded(&values, Dtype::F32)).unwrap();
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
                let want = half::bf16::from_f32(w[o * 8 + i] + sum * 2.0).to_f32();
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
