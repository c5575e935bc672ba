//! The worker as a process: asked to end, started again, diverging.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use step::StepDef;

const ROWS: usize = 240;
const TOKENIZER: &str = "{}";

/// A model of two layers, rows of chance for it, and a place for attempts.
struct Runs {
    dir: tempfile::TempDir,
}

impl Runs {
    fn new(validation: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/worker/golden/llama");
        let (base, dataset) = (dir.path().join("base"), dir.path().join("dataset"));
        [&base, &dataset].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden.join(name), base.join(name)).unwrap();
        }
        fs::write(base.join("tokenizer.json"), TOKENIZER).unwrap();
        fs::write(base.join("LICENSE"), "free").unwrap();
        let about = json!({"tokenizer": blake3::hash(TOKENIZER.as_bytes()).to_hex().as_str()});
        fs::write(dataset.join("dataset.json"), about.to_string()).unwrap();
        write_split(&dataset.join("train.safetensors"), ROWS, 1);
        if validation {
            write_split(&dataset.join("validation.safetensors"), 9, 5);
        }
        Self { dir }
    }

    fn out(&self, run: &str) -> BTreeMap<String, Vec<u8>> {
        let files = fs::read_dir(self.dir.path().join(run).join("out")).unwrap().flatten();
        files.map(|f| (f.file_name().into_string().unwrap(), fs::read(f.path()).unwrap())).collect()
    }

    fn scratch(&self, run: &str) -> PathBuf {
        self.dir.path().join(run).join("scratch")
    }

    /// An attempt: what an earlier one of the same name left in its scratch folder is there.
    fn start(&self, run: &str, change: Value) -> Child {
        let mut params = json!({
            "preset": "quick", "rank": 2, "dropout": 0.1, "batch_tokens": 64, "warmup": 0,
            "device": "cpu", "checkpoint_every": 1_000_000,
        });
        let Value::Object(change) = change else { unreachable!("tests pass objects") };
        params.as_object_mut().unwrap().extend(change);
        let Value::Object(params) = params else { unreachable!("an object") };
        let dir = self.dir.path().join(run);
        for folder in ["out", "report"] {
            let _ = fs::remove_dir_all(dir.join(folder));
        }
        for folder in ["out", "report", "scratch"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let input = |name: &str| {
            json!([{
                "label": name, "kind": if name == "base" { "model" } else { "dataset" },
                "path": self.dir.path().join(name), "origin": name,
            }])
        };
        let request = json!({
            "format": 1, "step": "train/lora", "mode": "build",
            "params": (StepDef::of::<train::Lora>().resolve)(params).unwrap(),
            "inputs": {"base": input("base"), "dataset": input("dataset")},
            "out": dir.join("out"), "report": dir.join("report"), "scratch": dir.join("scratch"),
            "tools": {}, "threads": 1,
        });
        fs::write(dir.join("request.json"), request.to_string()).unwrap();
        let mut worker = Command::new(env!("CARGO_BIN_EXE_train-worker"));
        worker.arg(dir.join("request.json")).stdout(Stdio::piped()).spawn().unwrap()
    }

    fn run(&self, name: &str, change: Value) -> Said {
        Said::until_the_end(self.start(name, change))
    }
}

/// An exit code, and all events.
struct Said {
    code: Option<i32>,
    events: Vec<Value>,
}

impl Said {
    fn until_the_end(mut worker: Child) -> Self {
        let events = events(&mut worker).collect();
        Self { code: worker.wait().unwrap().code(), events }
    }

    fn of<'a>(&'a self, event: &'a str) -> impl Iterator<Item = &'a Value> {
        self.events.iter().filter(move |e| e["event"] == event)
    }

    fn failure(&self) -> &str {
        let failed = self.of("failed").next();
        failed.and_then(|e| e["message"].as_str()).unwrap_or_else(|| panic!("{:?}", self.events))
    }

    fn metric(&self, name: &str) -> Option<f64> {
        self.of("metric").find(|e| e["name"] == name)?["value"].as_f64()
    }
}

fn events(worker: &mut Child) -> impl Iterator<Item = Value> + use<> {
    let lines = BufReader::new(worker.stdout.take().unwrap()).lines();
    lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap())
}

/// Rows whose tokens follow each other as `step` says: what one split teaches is wrong in another.
fn write_split(path: &Path, rows: usize, step: usize) {
    let lengths = (0..rows).map(|row| 4 + row * 7 % 13);
    let ends = lengths.scan(0, |end, length| {
        *end += length;
        Some(*end as i64)
    });
    let offsets: Vec<i64> = std::iter::once(0).chain(ends).collect();
    let tokens = *offsets.last().unwrap() as usize;
    let ids = (0..tokens).flat_map(|i| ((i * step % 47) as i32).to_le_bytes());
    let (ids, marks): (Vec<u8>, _) = (ids.collect(), vec![1; tokens]);
    let offset_bytes: Vec<u8> = offsets.iter().flat_map(|end| end.to_le_bytes()).collect();
    let view = |dtype, length, data| TensorView::new(dtype, vec![length], data).unwrap();
    let columns = [
        ("input_ids", view(Dtype::I32, tokens, ids.as_slice())),
        ("supervised", view(Dtype::U8, tokens, marks.as_slice())),
        ("offsets", view(Dtype::I64, offsets.len(), offset_bytes.as_slice())),
    ];
    serialize_to_file(columns, None, path).unwrap();
}

/// Beside those of the best steps, the only checkpoint is the one that the signal asked for.
#[test]
fn a_training_that_is_asked_to_end_goes_on_from_that_step_to_the_same_bytes() {
    let runs = Runs::new(true);
    let change = || json!({"epochs": 10, "keep": "best", "eval_every": 2, "learning_rate": 0.02});
    let whole = runs.run("whole", change());
    assert_eq!(whole.code, Some(0), "{:?}", whole.events);

    let mut worker = runs.start("broken", change());
    let mut stopped = Said { code: None, events: Vec::new() };
    for event in events(&mut worker) {
        // What is best was found by then: a validation loss that only rises.
        let (done, total) = (event["done"].as_f64(), event["total"].as_f64());
        if done.zip(total).is_some_and(|(done, total)| done > 0.3 * total) {
            // SAFETY: the process is ours, and nobody has waited for it yet.
            unsafe { libc::kill(worker.id() as i32, libc::SIGTERM) };
        }
        stopped.events.push(event);
    }
    stopped.code = worker.wait().unwrap().code();
    assert_eq!(stopped.code, Some(2), "{:?}", stopped.events);
    let message = stopped.failure().to_string();
    let after = message.strip_prefix("stopped after ").and_then(|rest| rest.split(',').next());
    let after = after.unwrap_or_else(|| panic!("{message}"));

    let step: f64 = after.split(' ').nth(1).and_then(|step| step.parse().ok()).unwrap();
    assert!(whole.metric("kept_step").is_some_and(|kept| kept < step), "{message}");

    let resumed = runs.run("broken", change());
    assert_eq!(resumed.code, Some(0), "{:?}", resumed.events);
    let notes: Vec<_> = resumed.of("note").map(|note| &note["text"]).collect();
    assert!(notes.contains(&&json!(format!("going on after {after}"))), "{after}: {notes:?}");
    assert_eq!(runs.out("broken"), runs.out("whole"));
    assert_eq!(runs.out("whole")["LICENSE"], b"free");
    for name in ["kept_step", "validation_loss", "loss"] {
        assert_eq!(resumed.metric(name), whole.metric(name), "{name}");
    }
    // An attempt tells what it computed itself: so much belongs to its time.
    let share = resumed.metric("tflop").unwrap() / whole.metric("tflop").unwrap();
    assert!((share - (1.0 - step / whole.metric("steps").unwrap())).abs() < 1e-9, "{share}");
}

#[test]
fn the_best_weights_are_those_of_the_lowest_validation_loss() {
    let runs = Runs::new(true);
    let change = json!({"learning_rate": 0.02, "schedule": "constant", "eval_every": 5});
    let last = runs.run("last", change.clone());
    assert_eq!(last.metric("kept_step"), None);
    let with = |key: &str, value: Value| {
        let mut change = change.clone();
        change[key] = value;
        change
    };
    let best = runs.run("best", with("keep", json!("best")));
    let (kept, steps) = (best.metric("kept_step").unwrap(), best.metric("steps").unwrap());
    assert!(kept < steps, "{kept} of {steps}: the rate is too low for this test");
    assert!(best.metric("validation_loss") < last.metric("validation_loss"));
    let adapters = |run| runs.out(run).remove("adapter_model.safetensors").unwrap();
    assert_ne!(adapters("best"), adapters("last"));
    let kept_then = fs::read(runs.scratch("best").join("best.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&kept_then).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["step"], kept.to_string());
    let (kept_then, artifact) = (SafeTensors::deserialize(&kept_then).unwrap(), adapters("best"));
    for (name, tensor) in SafeTensors::deserialize(&artifact).unwrap().tensors() {
        let then = kept_then.tensor(&format!("param/{name}")).unwrap();
        assert_eq!(tensor.data(), then.data(), "{name}");
    }
    let card = String::from_utf8(runs.out("best").remove("README.md").unwrap()).unwrap();
    assert!(card.contains(&format!("{steps}; kept: step {kept}, of the lowest")), "{card}");
    let report = |name| fs::read_to_string(runs.dir.path().join("best/report").join(name)).unwrap();
    assert!(report("loss.svg").contains(&format!("kept: step {kept}, ")));
    for line in report("metrics.jsonl").lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        for key in [
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "peak_memory",
            "seconds_left",
        ] {
            assert!(record[key].is_number(), "{key}: {line}");
        }
    }
}

#[test]
fn the_best_needs_a_validation_split() {
    let said = Runs::new(false).run("run", json!({"keep": "best"}));
    assert_eq!(said.code, Some(1));
    assert!(said.failure().contains("no split `validation`"), "{}", said.failure());
}

#[test]
fn a_divergence_says_where_the_last_checkpoint_is_and_leaves_the_curve() {
    let runs = Runs::new(false);
    let rate = json!({"learning_rate": 1e39});
    let said = runs.run("none", rate);
    assert_eq!(said.code, Some(1), "{:?}", said.events);
    assert!(said.failure().contains("diverged at step 2"), "{}", said.failure());
    assert!(said.failure().contains("no checkpoint"), "{}", said.failure());
    assert!(runs.scratch("none").join("loss.svg").exists());

    let rate = json!({"learning_rate": 1e39, "checkpoint_every": 1});
    let said = runs.run("one", rate);
    assert!(said.failure().contains("the last checkpoint is of step 1"), "{}", said.failure());
}
