//! The demo from end to end: built, built again, edited, killed, rebuilt. `cargo xtask test demo`
//! runs this; it takes minutes the first time, since the workers are compiled and the models made.
//!
//! Edits happen in copies of the workspace, whose stores share the real one's files.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

fn xtask(workspace: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("--workspace").arg(workspace).args(args).current_dir(workspace);
    // One folder of compiled workers for all copies: what they link is the same.
    command.env("CARGO_TARGET_DIR", root().join("target")).env_remove("ANNEAL_WORKSPACE");
    command
}

/// What a command printed; the test fails if the command did.
fn said(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// The workspace, its demo built.
fn built() -> &'static Path {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut build = xtask(root(), &["build"]);
        let status = build.stdout(Stdio::inherit()).stderr(Stdio::inherit()).status().unwrap();
        assert!(status.success(), "the demo does not build");
    });
    root()
}

/// A copy of the workspace's sources, with the real store's files in a store of its own.
struct Copy {
    dir: tempfile::TempDir,
}

impl Copy {
    fn new() -> Self {
        let copy = Self::of_sources();
        let (store, to) = (root().join("artifacts/v1"), copy.path().join("artifacts/v1"));
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(&store).unwrap() {
            let name = entry.unwrap().file_name();
            if name == "tools" {
                // The very folder: libtorch is not compiled against again for another path of it.
                std::os::unix::fs::symlink(store.join(&name), to.join(&name)).unwrap();
            } else {
                let mut link = Command::new("cp");
                link.arg("-al").arg(store.join(&name)).arg(&to);
                said_in(link, root());
            }
        }
        copy
    }

    /// Without anything that was made.
    fn of_sources() -> Self {
        let from = built();
        // Beside the target folder: hard links do not leave a file system.
        let dir = tempfile::tempdir_in(from.join("target")).unwrap();
        let mut list = Command::new("git");
        list.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        for name in said_in(list, from).split_terminator('\0') {
            let (from, to) = (from.join(name), dir.path().join(name));
            // Deleted, but still in the index.
            if from.exists() {
                fs::create_dir_all(to.parent().unwrap()).unwrap();
                fs::copy(from, to).unwrap();
            }
        }
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap()
    }

    fn edit(&self, name: &str, change: impl Fn(String) -> String) {
        fs::write(self.path().join(name), change(self.read(name))).unwrap();
    }

    /// Target → status, with the reason of a stale one.
    fn plan(&self) -> BTreeMap<String, String> {
        let lines = said(xtask(self.path(), &["--json", "plan"]));
        let of = |line: &str| {
            let planned: Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| planned[key].as_str().unwrap_or_default().to_string();
            (text("target").replace("demo/", ""), text("status"))
        };
        lines.lines().map(of).collect()
    }

    fn stale(&self) -> Vec<String> {
        self.plan().into_iter().filter(|(_, s)| s != "cached").map(|(target, _)| target).collect()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // The store's folders are read-only. Its files stay so: they are those of the real store.
        let folders = ["-type", "d", "-exec", "chmod", "u+w", "{}", "+"];
        let _ = Command::new("find").arg(self.path()).args(folders).status();
    }
}

fn said_in(mut command: Command, dir: &Path) -> String {
    command.current_dir(dir);
    said(command)
}

#[test]
fn a_second_build_is_up_to_date() {
    assert_eq!(said(xtask(built(), &["build"])), "up to date: 16 targets\n");
}

#[test]
fn a_comment_in_a_crate_makes_nothing_stale() {
    let copy = Copy::new();
    for family in ["step", "checkpoint", "dataset", "train", "merge", "onnx", "gguf", "eval"] {
        let name = format!("crates/{family}/src/lib.rs");
        copy.edit(&name, |text| text + "\n// A comment,\n/* and another */\n");
    }
    assert_eq!(copy.stale(), Vec::<String>::new());
}

#[test]
fn a_row_makes_stale_what_hangs_on_it_and_nothing_else() {
    let copy = Copy::new();
    copy.edit("recipes/demo/schedules.jsonl", |text| text.replacen("work", "play", 1));
    assert_eq!(
        copy.stale(),
        [
            "adapter",
            "dataset",
            "eval",
            "gguf",
            "gguf-q4",
            "gguf-q8",
            "int8",
            "merged",
            "onnx-fp32",
            "onnx-int4",
            "perplexity",
            "site"
        ]
    );
    let why = said(xtask(copy.path(), &["why", "demo/dataset"]));
    assert!(why.contains("schedules.jsonl"), "{why}");
}

#[test]
fn the_page_makes_only_the_page_stale() {
    let copy = Copy::new();
    copy.edit("site/index.html", |text| text + "<!-- changed -->\n");
    assert_eq!(copy.stale(), ["site"]);
}

#[test]
fn a_change_that_is_cleaned_away_stops_at_the_dataset() {
    let copy = Copy::new();
    let broken = "{\"messages\": [{\"role\": \"user\", \"content\": \"at fi\n";
    copy.edit("recipes/demo/schedules.jsonl", |text| text + broken);
    let lines = said(xtask(copy.path(), &["--json", "build"]));
    let done: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((done["made"].as_u64(), done["cached"].as_u64()), (Some(1), Some(15)), "{done}");
}

#[test]
fn a_broken_line_is_named_where_nobody_said_to_skip_it() {
    let copy = Copy::new();
    let broken = "{\"messages\": [{\"role\": \"user\", \"content\": \"at fi\n";
    copy.edit("recipes/demo/held-out.jsonl", |text| text + broken);
    let output = xtask(copy.path(), &["build", "held-out"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("held-out.jsonl:601"), "{said}");
    assert!(said.contains("hint:"), "{said}");
}

/// Everything that one checkout made, in the store of another through a shared cache: no step runs,
/// no tool is fetched. And from there into a release, as CI makes it.
#[test]
fn a_second_checkout_fetches_everything_and_releases_it() {
    let mut compile = Command::new("cargo");
    // As the stage of the workers has compiled it.
    compile
        .args(["build", "--quiet", "--release", "--package", "s3", "--package", "cache"])
        .args(["--features", "s3/testing,cache/testing", "--bin", "s3-test-server"])
        .env("CARGO_TARGET_DIR", root().join("target"));
    said_in(compile, root());
    let mut serve = Command::new(root().join("target/release/s3-test-server"));
    let mut server = serve.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let at: Value = serde_json::from_str(&line).unwrap();
    let (first, second) = (Copy::new(), Copy::of_sources());
    let key = first.path().join("signing.key");
    let with_cache = |workspace: &Path, args: &[&str]| {
        let mut command = xtask(workspace, args);
        command.env("AWS_ACCESS_KEY_ID", at["id"].as_str().unwrap());
        command.env("AWS_SECRET_ACCESS_KEY", at["secret"].as_str().unwrap());
        command.env("ANNEAL_REMOTE_ENDPOINT", at["endpoint"].as_str().unwrap());
        command.env("ANNEAL_SIGNING_KEY_FILE", &key).env("ANNEAL_REMOTE_PATH_STYLE", "1");
        said(command)
    };
    let file = key.to_str().unwrap();
    let made = with_cache(first.path(), &["--json", "cache", "keygen", "ci", "--file", file]);
    let made: Value = serde_json::from_str(&made).unwrap();
    let public = made["public"].as_str().unwrap();
    for copy in [&first, &second] {
        copy.edit("Cargo.toml", |text| {
            let head = "[workspace.metadata.anneal]\n";
            let remote = format!("{head}remote = \"s3://bucket/demo\"\ntrusted = [\"{public}\"]\n");
            text.replace(head, &remote)
        });
    }
    with_cache(first.path(), &["cache", "push"]);
    // Compiles what speaks to the cache, if need be, before the clock runs.
    with_cache(second.path(), &["cache", "status"]);
    let clock = std::time::Instant::now();
    let lines = with_cache(second.path(), &["--json", "build"]);
    let took = clock.elapsed();
    let done: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((done["made"].as_u64(), done["fetched"].as_u64()), (Some(0), Some(16)), "{done}");
    assert!(took.as_secs() < 10, "{took:?}");
    let tools = second.path().join("artifacts/v1/tools");
    assert_eq!(fs::read_dir(tools).unwrap().count(), 0, "a tool was fetched");
    assert_eq!(said(xtask(second.path(), &["--offline", "build"])), "up to date: 16 targets\n");

    second.edit("recipes/demo.toml", |text| {
        let endpoint = &at["endpoint"];
        format!(
            "{text}\n[publish]\nstep = \"publish/s3\"\nsite = \"site\"\nbucket = \"bucket\"\n\
             prefix = \"live\"\nendpoint = {endpoint}\npath_style = true\n"
        )
    });
    let release = || with_cache(second.path(), &["ci", "demo", "demo/publish"]);
    let first = release();
    assert!(first.contains("is now release"), "{first}");
    // The one before is known from the bucket.
    fs::remove_dir_all(second.path().join("artifacts/demo.release")).unwrap();
    let again = release();
    assert!(again.contains("stays release"), "{again}");
    assert!(again.lines().any(|l| l.starts_with("demo/site ") && l.ends_with("same")), "{again}");
    server.kill().unwrap();
    server.wait().unwrap();
}

/// The engine dies in the middle of training; the next build goes on from the last checkpoint, and
/// its bytes are those of a training that nobody killed.
#[test]
fn a_killed_training_resumes_to_the_same_bytes() {
    let copy = Copy::new();
    let recipe = r#"
[adapter]
step = "train/lora"
base = "demo/base"
dataset = "demo/dataset"
preset = "quick"
epochs = 0.08
batch_tokens = 1024
checkpoint_every = 5
"#;
    fs::write(copy.path().join("recipes/killed.toml"), recipe).unwrap();
    let mut build = xtask(copy.path(), &["--json", "build", "killed/adapter"]);
    let mut child = build.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut half = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let progress = &event["progress"];
        let (done, total) = (progress["done"].as_f64(), progress["total"].as_f64());
        if progress["unit"] == "steps" && done.unwrap_or(0.0) > 0.5 * total.unwrap_or(f64::MAX) {
            half = true;
            child.kill().unwrap();
            break;
        }
    }
    child.wait().unwrap();
    assert!(half, "the training ended before it could be killed");

    let lines = said(xtask(copy.path(), &["--json", "build", "killed/adapter"]));
    assert!(lines.contains("going on after step"), "{lines}");
    said(xtask(copy.path(), &["verify", "--rebuild", "killed/adapter"]));
}

/// QLoRA, going on from its adapter, both merged by weight, and all weights, with each optimiser.
#[test]
fn every_way_of_training_builds() {
    let copy = Copy::new();
    let recipe = r#"
[qlora]
step = "train/lora"
base = "demo/base"
dataset = "demo/dataset"
bits = 4
rank = 8
alpha = 16
rslora = true
optimiser = "adamw-8bit"
gradient_checkpointing = true
packing = "always"
epochs = 0.03
batch_tokens = 512

[further]
step = "train/lora"
base = "demo/base"
dataset = "demo/dataset"
adapter = "qlora"
rank = 8
alpha = 16
rslora = true
learning_rate = 2e-3
epochs = 0.03
batch_tokens = 512

[average]
step = "merge/lora"
base = "demo/base"
adapters = ["qlora", "further"]
weights = { qlora = 0.4, further = 0.6 }

[full]
step = "train/full"
base = "average"
dataset = "demo/dataset"
optimiser = "adafactor"
learning_rate = 1e-4
compute = "bfloat16"
epochs = 0.03
batch_tokens = 512
"#;
    fs::write(copy.path().join("recipes/ways.toml"), recipe).unwrap();
    said(xtask(copy.path(), &["build", "ways"]));
    let loss = |target: &str| {
        let shown = said(xtask(copy.path(), &["--json", "show", target]));
        let shown: Value = serde_json::from_str(&shown).unwrap();
        shown["result"]["metrics"]["loss"].as_f64().unwrap_or_else(|| panic!("{shown}"))
    };
    let [first, second, third] = ["ways/qlora", "ways/further", "ways/full"].map(loss);
    assert!(second < first && third < first, "{first} {second} {third}");
    said(xtask(copy.path(), &["verify", "--rebuild", "ways/qlora"]));
}

/// Steps of the demo again, from empty folders: the same bytes, or an exit code. All but the base, which
/// takes longer than the rest together, in the same training loop as the adapter.
#[test]
fn a_rebuild_gives_the_same_bytes() {
    let targets = [
        "adapter",
        "merged",
        "int8",
        "onnx-fp32",
        "onnx-int4",
        "gguf",
        "gguf-q8",
        "gguf-q4",
        "site",
    ]
    .map(|target| format!("demo/{target}"));
    let mut verify = vec!["verify", "--rebuild"];
    verify.extend(targets.iter().map(String::as_str));
    let table = said(xtask(built(), &verify));
    for target in &targets {
        let line = table.lines().find(|l| l.starts_with(&format!("{target} ")));
        assert!(line.is_some_and(|l| l.contains("identical")), "{target}\n{table}");
    }
}

#[test]
fn a_new_step_builds_as_it_is() {
    let copy = Copy::new();
    said(xtask(copy.path(), &["new", "step", "merge/average"]));
    let mut check = Command::new("cargo");
    check
        .args(["check", "--quiet", "--package", "xtask", "--package", "merge"])
        .args(["--features", "merge/worker"])
        .env("CARGO_TARGET_DIR", root().join("target"));
    said_in(check, copy.path());
    let lib = copy.read("crates/merge/src/lib.rs");
    assert!(lib.contains("StepDef::of::<average::Average>()"), "{lib}");
}
