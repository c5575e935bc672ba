//! `bench train`: LoRA of ours beside transformers and PEFT, on the same weights, rows, first adapter
//! and keys. Both say how far they are in the worker's protocol, and what they took is read from
//! /proc whenever they do: start-up and the first steps are left out.
//!
//! Knows nothing of libtorch or of how either side trains.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use step::worker::Event;
use step::{BlobDigest, Failure, Kind, Known, StepDef};

use super::{median, time};
use crate::cli::Cases;
use crate::display::{self, Table};
use crate::registry::REGISTRY;

const LORA: StepDef = StepDef::of::<train::Lora>();
const OURS: &str = "anneal";
const THEIRS: &str = "transformers + PEFT";
/// Of theirs: time on the processor (on a GPU: time), and memory.
const GOALS: [f64; 2] = [0.9, 0.5];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    Cpu,
    /// Whole models too, packed, and QLoRA.
    Cuda,
}

/// A model of random weights, and what it is trained on.
struct Shape {
    name: &'static str,
    /// config.json
    config: Value,
    /// Rows of so many positions are one batch, the same one at every step.
    rows: usize,
    positions: usize,
    /// Whether the rows lie end to end in one sequence.
    packed: bool,
    rank: usize,
    steps: u64,
    /// So small that one thread is the best: `Job::threads_for`.
    small: bool,
}

/// What a run took of the processor and the clock for a step, in seconds, and of memory at its peak.
#[derive(Clone, Copy)]
struct Sample {
    cpu: f64,
    wall: f64,
    /// Bytes: resident, libraries and all; on a GPU, there.
    memory: f64,
    /// At the last step.
    loss: f64,
}

/// One line of the table: a side, with so many threads, in so many rounds.
struct Side {
    name: &'static str,
    threads: usize,
    samples: Vec<Sample>,
    /// Why there are none.
    refused: Option<String>,
}

pub fn run(root: &Path, device: Device, cases: &Cases) -> anyhow::Result<()> {
    let bench = Bench::new(root, device, cases)?;
    let mut table = Table::new([
        "case",
        "side",
        "threads",
        "cpu/step",
        "wall/step",
        "tokens/s",
        "memory",
        "loss",
    ]);
    let mut ratios = Table::new(["case", "time", "memory", "loss apart", ""]);
    for shape in shapes(device) {
        let mut made = false;
        for (compute, bits) in kinds(device) {
            let case = format!("{}, {}", shape.name, if bits == 4 { "NF4" } else { compute });
            if !cases.wants(&case) {
                continue;
            }
            if !made {
                bench.make(&shape).with_context(|| shape.name)?;
                made = true;
            }
            let sides = bench.case(&case, &shape, compute, bits)?;
            for side in &sides {
                table.row(side.row(&case, shape.rows * shape.positions));
            }
            ratios.row(bench.ratio(&case, &sides));
        }
        bench.unmake(&shape)?;
    }
    print!("{table}\n{ratios}");
    Ok(())
}

struct Bench<'a> {
    device: Device,
    cases: &'a Cases,
    /// Below the target folder: models are large.
    dir: tempfile::TempDir,
    worker: PathBuf,
    python: PathBuf,
    peer: PathBuf,
}

impl<'a> Bench<'a> {
    fn new(root: &Path, device: Device, cases: &'a Cases) -> anyhow::Result<Self> {
        let engine = engine::Engine::open(root, REGISTRY)?;
        let libtorch = engine.tool("libtorch", &mut |_| {})?;
        let worker = engine.compile("train", &libtorch.env, &mut |_| {})?;
        let venv =
            Command::new("bash").args(["tests/venv.sh", "interop"]).current_dir(root).output()?;
        if !venv.status.success() {
            let said = String::from_utf8_lossy(&venv.stderr);
            bail!(Failure::environment(format!("tests/venv.sh interop: {}\n{said}", venv.status)));
        }
        let python = root.join(String::from_utf8(venv.stdout)?.trim());
        let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(root.join("target"))?;
        let peer = root.join("xtask/src/bench/train.py");
        Ok(Self { device, cases, dir, worker, python, peer })
    }

    /// A model folder with random weights, and a dataset folder with random tokens.
    fn make(&self, shape: &Shape) -> anyhow::Result<()> {
        let (model, data) = (self.dir.path().join("model"), self.dir.path().join("data"));
        fs::create_dir_all(&model)?;
        fs::create_dir_all(&data)?;
        fs::write(model.join("config.json"), shape.config.to_string())?;
        // Nothing is tokenised: it only has to be the dataset's.
        let tokenizer = b"{}";
        fs::write(model.join("tokenizer.json"), tokenizer)?;
        let about = json!({"format": 1, "tokenizer": BlobDigest::of(tokenizer).to_string()});
        fs::write(data.join("dataset.json"), about.to_string())?;
        write_rows(&data.join("train.safetensors"), shape)?;
        let mut make = Command::new(&self.python);
        make.arg(&self.peer).arg("--make").arg(&model).arg(self.device());
        super::run(&mut make)
    }

    fn unmake(&self, shape: &Shape) -> anyhow::Result<()> {
        let model = self.dir.path().join("model");
        if model.exists() {
            fs::remove_dir_all(model).with_context(|| shape.name)?;
        }
        Ok(())
    }

    /// Ours and theirs by turns.
    fn case(
        &self,
        case: &str,
        shape: &Shape,
        compute: &str,
        bits: u8,
    ) -> anyhow::Result<Vec<Side>> {
        let most = self.cases.threads;
        let own = if shape.small { 1 } else { most };
        let mut sides = vec![Side::new(OURS, own), Side::new(THEIRS, own)];
        if own != most && self.device == Device::Cpu {
            sides.push(Side::new(THEIRS, most));
        }
        let params = self.params(shape, compute, bits)?;
        if let Err(unsupported) = (LORA.supports)(&params, &Known::new()) {
            sides[0].refused = Some(unsupported.to_string());
        }
        for round in 1..=self.cases.rounds {
            for side in sides.iter_mut().filter(|side| side.refused.is_none()) {
                eprintln!("{case}: {}, {} threads, round {round}", side.name, side.threads);
                let (request, log) = self.request(&params, side.threads)?;
                let mut command = if side.name == OURS {
                    Command::new(&self.worker)
                } else {
                    let mut python = Command::new(&self.python);
                    python.arg(&self.peer);
                    python
                };
                command.arg(request);
                // Ours sets it for itself. On a busy machine threads that spin cost many times more.
                command.env("OMP_WAIT_POLICY", "passive");
                if self.device == Device::Cuda {
                    command.env("LD_LIBRARY_PATH", self.cuda_libraries()?);
                }
                match measure(&mut command, &log, self.device)? {
                    Ok(sample) => side.samples.push(sample),
                    Err(said) => side.refused = Some(said),
                }
            }
        }
        Ok(sides)
    }

    fn params(&self, shape: &Shape, compute: &str, bits: u8) -> anyhow::Result<Value> {
        let params = json!({
            "rank": shape.rank,
            "alpha": shape.rank,
            "dropout": 0,
            "target_modules": "all-linear",
            "bits": bits,
            // Higher, one batch over and over becomes chaos, in which the last bit decides.
            "learning_rate": 2e-5,
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": 0,
            "epochs": shape.steps,
            "batch_tokens": shape.rows * shape.positions,
            "gradient_accumulation": 1,
            "packing": if shape.packed { "always" } else { "never" },
            "compute": compute,
            "device": self.device(),
            // Never.
            "checkpoint_every": shape.steps + 1,
        });
        let Value::Object(params) = params else { unreachable!("the table above is an object") };
        (LORA.resolve)(params).context("the parameters of the bench")
    }

    /// The request of one run, in folders of its own, and where its standard error goes.
    fn request(&self, params: &Value, threads: usize) -> anyhow::Result<(PathBuf, PathBuf)> {
        let run = self.dir.path().join("run");
        let _ = fs::remove_dir_all(&run);
        let folder = |name| self.dir.path().join(name);
        let inputs =
            [("base", Kind::Model, folder("model")), ("dataset", Kind::Dataset, folder("data"))];
        let path = super::request(&run, &LORA, params.clone(), &inputs, threads)?;
        Ok((path, run.join("stderr")))
    }

    fn device(&self) -> &'static str {
        match self.device {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }

    /// The pinned libtorch is its processor half; the other one comes with the peer's.
    fn cuda_libraries(&self) -> anyhow::Result<String> {
        let script =
            "import os, torch; print(os.path.join(os.path.dirname(torch.__file__), 'lib'))";
        let output = Command::new(&self.python).args(["-c", script]).output()?;
        let own = String::from_utf8(output.stdout)?.trim().to_string();
        Ok(match std::env::var("LD_LIBRARY_PATH") {
            Ok(given) => format!("{given}:{own}"),
            Err(_) => own,
        })
    }

    /// Ours over the best of theirs.
    fn ratio(&self, case: &str, sides: &[Side]) -> [String; 5] {
        let of = |side: &Side| match self.device {
            Device::Cpu => side.median(|s| s.cpu),
            Device::Cuda => side.median(|s| s.wall),
        };
        let measured = |name| sides.iter().filter(move |s| s.name == name && !s.samples.is_empty());
        let ours = measured(OURS).next();
        let theirs = measured(THEIRS).min_by(|a, b| of(a).total_cmp(&of(b)));
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            return [case, "", "", "", "nothing to compare"].map(String::from);
        };
        let memory = |side: &Side| side.median(|s| s.memory);
        let ratios = [of(ours) / of(theirs), memory(ours) / memory(theirs)];
        let [cpu, memory] = [0, 1].map(|i| {
            let sign = if ratios[i] <= GOALS[i] { "≤" } else { "above" };
            format!("{:.2}, {sign} {}", ratios[i], GOALS[i])
        });
        let apart = (ours.median(|s| s.loss) - theirs.median(|s| s.loss)).abs();
        let reached = ratios[0] <= GOALS[0] && ratios[1] <= GOALS[1];
        let reached = if reached { "both goals" } else { "misses a goal" };
        [case.into(), cpu, memory, format!("{apart:.1e}"), reached.into()]
    }
}

impl Side {
    fn new(name: &'static str, threads: usize) -> Self {
        Self { name, threads, samples: vec![], refused: None }
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of).collect())
    }

    fn row(&self, case: &str, tokens: usize) -> [String; 8] {
        let head = [case.to_string(), self.name.to_string(), self.threads.to_string()];
        let [case, side, threads] = head;
        if let Some(why) = &self.refused {
            let blank = String::new;
            return [case, side, threads, why.clone(), blank(), blank(), blank(), blank()];
        }
        let wall = self.median(|s| s.wall);
        [
            case,
            side,
            threads,
            time(self.median(|s| s.cpu)),
            time(wall),
            format!("{:.0}", tokens as f64 / wall),
            display::bytes(self.median(|s| s.memory) as u64),
            format!("{:.5}", self.median(|s| s.loss)),
        ]
    }
}

/// How far a process was, and what it had taken by then.
struct Mark {
    done: u64,
    at: Instant,
    cpu: f64,
}

/// Runs one side. The inner error is what it said instead of training.
fn measure(
    command: &mut Command,
    log: &Path,
    device: Device,
) -> anyhow::Result<Result<Sample, String>> {
    let before = if device == Device::Cuda { gpu_memory()? } else { 0.0 };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(log)?);
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let stdout = child.stdout.take().expect("standard output is piped");
    let (mut first, mut last, mut said): (Option<Mark>, Option<Mark>, _) = (None, None, None);
    let (mut memory, mut loss) = (0.0, f64::NAN);
    for line in BufReader::new(stdout).lines() {
        match serde_json::from_str::<Event>(&line?) {
            Ok(Event::Progress(progress)) => {
                let mark = Mark { done: progress.done, at: Instant::now(), cpu: cpu(&child)? };
                loss = progress.values.get("loss").copied().unwrap_or(loss);
                // It may have ended by its last line, and has no memory then.
                if device == Device::Cpu {
                    memory = resident(&child).unwrap_or(memory);
                }
                if first.is_some() {
                    last = Some(mark);
                } else if 5 * progress.done >= progress.total {
                    // Warm by now: what a process has taken of a GPU it keeps.
                    first = Some(mark);
                    if device == Device::Cuda {
                        memory = gpu_memory()? - before;
                    }
                }
            }
            Ok(Event::Failed(failure)) => said = Some(failure.message),
            Ok(Event::Note { text }) => said = Some(text),
            _ => {}
        }
    }
    let status = child.wait()?;
    let (Some(first), Some(last), true) = (first, last, status.success()) else {
        let log = fs::read_to_string(log).unwrap_or_default();
        let line = log.lines().rev().find(|line| !line.trim().is_empty());
        let said = said.or(line.map(String::from));
        return Ok(Err(said.unwrap_or_else(|| status.to_string())));
    };
    let steps = (last.done - first.done) as f64;
    Ok(Ok(Sample {
        cpu: (last.cpu - first.cpu) / steps,
        wall: (last.at - first.at).as_secs_f64() / steps,
        memory,
        loss,
    }))
}

/// Seconds of processor time that a process has taken so far.
fn cpu(child: &Child) -> anyhow::Result<f64> {
    let path = format!("/proc/{}/stat", child.id());
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // Fields 14 and 15 (user and system time, in hundredths), counted after the name in brackets.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / 100.0)
}

/// The most bytes of a process that were resident, while it is alive.
fn resident(child: &Child) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(peak.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0)
}

/// Bytes in use on the first GPU, whoever uses them: in a container processes have other numbers.
fn gpu_memory() -> anyhow::Result<f64> {
    let args = ["--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"];
    let output =
        Command::new("nvidia-smi").args(args).output().context("cannot start nvidia-smi")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mib: f64 = text.trim().parse().with_context(|| format!("nvidia-smi says `{text}`"))?;
    Ok(mib * 1_048_576.0)
}

/// What products are computed in, and what the base is held in.
fn kinds(device: Device) -> Vec<(&'static str, u8)> {
    match device {
        Device::Cpu => vec![("float32", 16), ("bfloat16", 16)],
        Device::Cuda => vec![("float32", 16), ("bfloat16", 16), ("bfloat16", 4)],
    }
}

fn shapes(device: Device) -> Vec<Shape> {
    let mut shapes = vec![
        Shape {
            name: "demo",
            config: llama([256, 4, 4, 2, 512, 768, 256], true, 1e4),
            rows: 8,
            positions: 32,
            packed: false,
            rank: 32,
            steps: 200,
            small: true,
        },
        Shape {
            name: "4 layers of Gemma-3-270M",
            config: gemma(4, 4),
            rows: 1,
            positions: 512,
            packed: false,
            rank: 16,
            steps: 7,
            small: false,
        },
    ];
    if device == Device::Cuda {
        let whole = |name, config| Shape {
            name,
            config,
            rows: 4,
            positions: 512,
            packed: true,
            rank: 16,
            steps: 30,
            small: false,
        };
        shapes.extend([
            whole("Gemma-3-270M", gemma(18, 6)),
            whole("TinyLlama-1.1B", llama([2048, 22, 32, 4, 5632, 32_000, 2048], false, 1e4)),
            whole("Llama-3-8B", llama([4096, 32, 32, 8, 14_336, 128_256, 8192], false, 5e5)),
        ]);
    }
    shapes
}

fn llama(sizes: [usize; 7], tied: bool, rope_theta: f64) -> Value {
    let [hidden, layers, heads, kv_heads, intermediate, vocabulary, positions] = sizes;
    json!({
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
    })
}

/// Gemma-3-270M's text, of which each `full`th layer has no window.
fn gemma(layers: usize, full: usize) -> Value {
    let types =
        (1..=layers).map(|i| if i % full == 0 { "full_attention" } else { "sliding_attention" });
    json!({
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 2048,
        "vocab_size": 262_144,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": types.collect::<Vec<_>>(),
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": true,
    })
}

/// Rows of random tokens, all supervised: no side gains by what it leaves out.
fn write_rows(path: &Path, shape: &Shape) -> anyhow::Result<()> {
    let vocabulary =
        shape.config["vocab_size"].as_u64().expect("the config above has a vocabulary");
    let length = shape.positions + 1; // the last token is only predicted
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut ids = Vec::new();
    for _ in 0..shape.rows * length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ids.extend_from_slice(&((state % vocabulary) as i32).to_le_bytes());
    }
    let supervised = vec![1_u8; shape.rows * length];
    let offsets = (0..=shape.rows).flat_map(|row| ((row * length) as i64).to_le_bytes());
    let offsets: Vec<u8> = offsets.collect();
    let tokens = vec![shape.rows * length];
    let tensors = [
        ("input_ids", TensorView::new(Dtype::I32, tokens.clone(), &ids)?),
        ("supervised", TensorView::new(Dtype::U8, tokens, &supervised)?),
        ("offsets", TensorView::new(Dtype::I64, vec![shape.rows + 1], &offsets)?),
    ];
    Ok(safetensors::serialize_to_file(tensors, None, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_measured_as_it_is() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/demo.toml");
        let recipe: toml::Table = fs::read_to_string(path).unwrap().parse().unwrap();
        let demo = &shapes(Device::Cpu)[0];
        let number = |target: &str, key: &str| recipe[target][key].as_integer().unwrap() as u64;
        for (key, written) in [
            ("hidden_size", "hidden_size"),
            ("num_hidden_layers", "num_layers"),
            ("num_attention_heads", "num_heads"),
            ("num_key_value_heads", "num_kv_heads"),
            ("intermediate_size", "intermediate_size"),
            ("max_position_embeddings", "max_positions"),
        ] {
            assert_eq!(demo.config[key], number("base", written), "{key}");
        }
        assert_eq!(demo.config["vocab_size"], number("tokenizer", "vocab_size"));
        assert_eq!(demo.rank as u64, number("adapter", "rank"));
        assert_eq!((demo.rows * demo.positions) as u64, number("adapter", "batch_tokens"));
    }
}
