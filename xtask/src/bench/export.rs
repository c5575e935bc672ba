//! `bench export`: merges and exports of ours beside the tools that people use for them, on the same
//! models of random weights. Whole processes by turns, medians.
//!
//! Knows nothing of what any side writes: the files are held to each other by tests. Without our gates
//! (`parity`), since no other side has one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use engine::Engine;
use serde_json::{Value, json};
use step::Kind;

use super::{Usage, median, time, used};
use crate::cli::Cases;
use crate::display::{self, Table};
use crate::registry::REGISTRY;

const OURS: &str = "anneal";
/// As `export.py` names them, and their folders.
const MODELS: [(&str, &str); 2] =
    [("Llama 270M", "llama-270m"), ("TinyLlama 1.1B", "tinyllama-1.1b")];

/// What one side took for a case, all its processes together.
#[derive(Clone, Copy, Default)]
struct Sample {
    used: Usage,
    /// Bytes that were written.
    size: f64,
}

struct Side {
    name: &'static str,
    samples: Vec<Sample>,
}

pub fn run(root: &Path, cases: &Cases) -> anyhow::Result<()> {
    let bench = Bench::new(root, cases)?;
    let mut table = Table::new(["case", "side", "wall", "cpu", "memory", "size"]);
    let mut ratios = Table::new(["case", "beside", "wall", "cpu", "memory"]);
    for (model, folder) in MODELS {
        for case in CASES {
            let name = format!("{model}, {}", case.name);
            if !cases.wants(&name) {
                continue;
            }
            let sides = bench.case(&name, &bench.model(model, folder)?, &case)?;
            for side in &sides {
                table.row(side.row(&name));
            }
            for peer in &sides[1..] {
                ratios.row(sides[0].beside(&name, peer));
            }
        }
    }
    print!("{table}\n{ratios}");
    Ok(())
}

/// One thing to make of a model.
struct Case {
    name: &'static str,
    step: &'static str,
    params: fn() -> Value,
    peers: &'static [Peer],
}

/// Somebody else's way there: the commands, one after the other, that write into `out`.
struct Peer {
    name: &'static str,
    commands: fn(&Bench, model: &Path, out: &Path) -> Vec<Command>,
}

const CASES: [Case; 4] = [
    Case {
        name: "merge",
        step: "merge/lora",
        params: || json!({"dtype": "bfloat16", "weights": {}}),
        peers: &[
            Peer {
                name: "PEFT",
                commands: |bench, model, out| {
                    let mut python = bench.python();
                    python.arg(&bench.script).arg("merge").args([model, out]);
                    vec![python]
                },
            },
            Peer {
                name: "dd",
                commands: |_, model, out| {
                    let from = model.join("model/model.safetensors");
                    let to = out.join("model.safetensors");
                    let mut dd = Command::new("dd");
                    dd.arg(format!("if={}", from.display())).arg(format!("of={}", to.display()));
                    dd.arg("bs=1M");
                    vec![dd]
                },
            },
        ],
    },
    Case {
        name: "ONNX q4",
        step: "onnx/export",
        params: || json!({"dtype": "q4", "parity": false}),
        peers: &[Peer {
            name: "onnxruntime-genai",
            commands: |bench, model, out| {
                let mut python = bench.python();
                python.args(["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]);
                python.arg("-i").arg(model.join("model")).arg("-o").arg(out);
                python.arg("-c").arg(bench.dir.join("builder-cache"));
                vec![python]
            },
        }],
    },
    Case {
        name: "GGUF Q8_0",
        step: "gguf/export",
        params: || json!({"quant": "Q8_0", "parity": false}),
        peers: &[Peer {
            name: "llama.cpp",
            commands: |bench, model, out| {
                vec![bench.convert(model, "q8_0", &out.join("q8_0.gguf"))]
            },
        }],
    },
    Case {
        name: "GGUF Q4_K_M",
        step: "gguf/export",
        params: || json!({"quant": "Q4_K_M", "parity": false}),
        peers: &[Peer {
            name: "llama.cpp",
            commands: |bench, model, out| {
                // There is no way but over a file in between.
                let between = bench.dir.join("between.gguf");
                let mut quantize =
                    Command::new(bench.dir.join("llama.cpp/build/bin/llama-quantize"));
                quantize.args([between.as_path(), &out.join("q4_k_m.gguf")]);
                quantize.arg("Q4_K_M").arg(bench.cases.threads.to_string());
                vec![bench.convert(model, "bf16", &between), quantize]
            },
        }],
    },
];

struct Bench<'a> {
    cases: &'a Cases,
    engine: Engine,
    /// Below the target folder, and kept: models and peers take a while to make.
    dir: PathBuf,
    script: PathBuf,
}

impl<'a> Bench<'a> {
    fn new(root: &Path, cases: &'a Cases) -> anyhow::Result<Self> {
        let engine = Engine::open(root, REGISTRY)?;
        let dir = root.join("target/bench-export");
        let cmake = engine.tool("cmake", &mut |_| {})?;
        eprintln!("setting up the peers in {}", dir.display());
        let mut set_up = Command::new("bash");
        set_up.arg("xtask/src/bench/export.sh").arg(&dir).current_dir(root).envs(cmake.env);
        super::run(&mut set_up)?;
        Ok(Self { cases, engine, dir, script: root.join("xtask/src/bench/export.py") })
    }

    fn python(&self) -> Command {
        let mut python = Command::new(self.dir.join("venv/bin/python"));
        python.env("OMP_NUM_THREADS", self.cases.threads.to_string());
        python
    }

    fn convert(&self, model: &Path, kind: &str, to: &Path) -> Command {
        let mut python = self.python();
        python.arg(self.dir.join("llama.cpp/convert_hf_to_gguf.py")).arg(model.join("model"));
        python.args(["--outtype", kind]).arg("--outfile").arg(to);
        python
    }

    /// The folder of a model and its adapter, made if it is not there.
    fn model(&self, name: &str, folder: &str) -> anyhow::Result<PathBuf> {
        let dir = self.dir.join("models").join(folder);
        if !dir.exists() {
            eprintln!("making {name}");
            let part = dir.with_extension("part");
            let _ = fs::remove_dir_all(&part);
            fs::create_dir_all(&part)?;
            super::run(self.python().arg(&self.script).arg("make").arg(name).arg(&part))?;
            fs::rename(&part, &dir)?;
        }
        Ok(dir)
    }

    fn case(&self, name: &str, model: &Path, case: &Case) -> anyhow::Result<Vec<Side>> {
        let side = |name| Side { name, samples: Vec::new() };
        let mut sides = vec![side(OURS)];
        sides.extend(case.peers.iter().map(|peer| side(peer.name)));
        let family = case.step.split('/').next().unwrap_or_default();
        let worker = self.engine.compile(family, &Default::default(), &mut |_| {})?;
        for round in 1..=self.cases.rounds {
            for (i, side) in sides.iter_mut().enumerate() {
                eprintln!("{name}: {}, round {round}", side.name);
                let run = self.dir.join("run");
                let _ = fs::remove_dir_all(&run);
                let out = run.join("out");
                fs::create_dir_all(&out)?;
                let commands = match i.checked_sub(1) {
                    Some(peer) => (case.peers[peer].commands)(self, model, &out),
                    None => {
                        let mut ours = Command::new(&worker);
                        ours.arg(self.request(case, model, &run)?);
                        vec![ours]
                    }
                };
                super::settle();
                let mut sample = Sample::default();
                for mut command in commands {
                    sample.used += measure(&mut command, &run.join("log"))?;
                }
                sample.size = size(&out)? as f64;
                side.samples.push(sample);
                fs::remove_dir_all(&run)?;
            }
        }
        Ok(sides)
    }

    /// The request of one run of ours.
    fn request(&self, case: &Case, model: &Path, run: &Path) -> anyhow::Result<PathBuf> {
        let def = REGISTRY.steps().find(|def| def.name == case.step).context("a known step")?;
        let folder = |name| model.join(name);
        let inputs = match case.step {
            "merge/lora" => vec![
                ("base", Kind::Model, folder("model")),
                ("adapter", Kind::Adapter, folder("adapter")),
            ],
            _ => vec![("model", Kind::Model, folder("model"))],
        };
        let Value::Object(params) = (case.params)() else { unreachable!("an object") };
        super::request(run, def, (def.resolve)(params)?, &inputs, self.cases.threads)
    }
}

impl Side {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of).collect())
    }

    fn row(&self, case: &str) -> [String; 6] {
        let bytes = |of: fn(&Sample) -> f64| display::bytes(self.median(of) as u64);
        [
            case.into(),
            self.name.into(),
            time(self.median(|s| s.used.wall)),
            time(self.median(|s| s.used.cpu)),
            bytes(|s| s.used.memory),
            bytes(|s| s.size),
        ]
    }

    /// Ours over theirs.
    fn beside(&self, case: &str, peer: &Side) -> [String; 5] {
        let ratio = |of: fn(&Sample) -> f64| format!("{:.2}", self.median(of) / peer.median(of));
        let ratios = [ratio(|s| s.used.wall), ratio(|s| s.used.cpu), ratio(|s| s.used.memory)];
        let [wall, cpu, memory] = ratios;
        [case.into(), peer.name.into(), wall, cpu, memory]
    }
}

/// Runs a command to its end.
fn measure(command: &mut Command, log: &Path) -> anyhow::Result<Usage> {
    let file = fs::File::create(log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let clock = Instant::now();
    let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    used(&child, clock).with_context(|| {
        let said = fs::read_to_string(log).unwrap_or_default();
        format!("{command:?}\n{said}")
    })
}

/// Bytes of all files in a folder.
fn size(dir: &Path) -> std::io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        sum += match entry.file_type()?.is_dir() {
            true => size(&entry.path())?,
            false => entry.metadata()?.len(),
        };
    }
    Ok(sum)
}
