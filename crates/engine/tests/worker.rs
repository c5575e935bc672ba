//! The worker of the engine's tests: steps that are quick, and steps that go wrong on purpose.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use step::Failure;
use step::definition::TFLOP;
use step::worker::Job;

fn main() -> ExitCode {
    step::worker::main(&[
        ("demo/upper", upper),
        ("demo/rough", upper),
        ("demo/lines", lines),
        ("demo/fail", fail),
        ("demo/slow", slow),
        ("demo/careful", careful),
        ("demo/full", full),
        ("demo/babble", babble),
        ("demo/nosy", nosy),
        ("demo/send", send),
    ])
}

/// The input's text in capitals. Counts its runs in a file beside the input's origin.
fn upper(job: &Job) -> anyhow::Result<()> {
    let text = read(job, "text")?;
    write(&job.out().join("text.txt"), text.to_uppercase())?;
    write(&job.report().join("when.txt"), format!("{:?}", std::time::SystemTime::now()))?;
    job.metric("letters", text.chars().count() as f64);
    job.note("done");
    Ok(())
}

/// How many lines the input has: many inputs give one output, for early cut-off.
fn lines(job: &Job) -> anyhow::Result<()> {
    job.metric(TFLOP, job.request.params["level"].as_f64().unwrap_or(0.0));
    let count = read(job, "text")?.lines().count();
    std::fs::write(job.out().join("text.txt"), count.to_string())?;
    Ok(())
}

fn fail(_: &Job) -> anyhow::Result<()> {
    Err(Failure::input("rows.txt:3: no verb in this sentence").hint("write one").into())
}

/// Writes half of its output, waits, reads its input, writes the rest. Says when it begins and ends.
fn slow(job: &Job) -> anyhow::Result<()> {
    job.note("begins");
    let out = job.out().join("text.txt");
    std::fs::write(&out, "half")?;
    std::fs::write(job.scratch().join("checkpoint"), "1")?;
    std::thread::sleep(Duration::from_millis(400));
    std::fs::write(&out, read(job, "text")?)?;
    job.note("ends");
    Ok(())
}

/// Works until it is asked to end, and then keeps what it has; at level 1 it has no end.
fn careful(job: &Job) -> anyhow::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    extern "C" fn note(_: libc::c_int) {
        ASKED.store(true, Ordering::Relaxed);
    }
    // SAFETY: the handler does nothing but store to an atomic.
    unsafe {
        libc::signal(libc::SIGTERM, note as extern "C" fn(libc::c_int) as libc::sighandler_t)
    };
    job.note("begins");
    while !ASKED.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let end = if job.request.params["level"] == 1 { 600_000 } else { 100 };
    std::thread::sleep(Duration::from_millis(end));
    Err(Failure::environment("stopped at row 3").into())
}

/// Writes to the device that is always full.
fn full(_: &Job) -> anyhow::Result<()> {
    std::fs::write("/dev/full", "text").context("cannot write /dev/full")
}

/// Prints what is no event: bytes that are no text, and half a line at the end.
fn babble(job: &Job) -> anyhow::Result<()> {
    use std::io::Write;
    let mut stdout = std::io::stdout();
    stdout.write_all(b"\xff\xfe\n{\"event\": \"metric\", \"name\": 3}\n\n{\"event\": \"pro\n")?;
    std::fs::write(job.out().join("text.txt"), "said")?;
    job.metric("words", 1.0);
    stdout.write_all(b"{\"event\": \"metric\", \"name\": \"half")?;
    Ok(stdout.flush()?)
}

/// Tries what no step may do, and says what came of it.
fn nosy(job: &Job) -> anyhow::Result<()> {
    let store = job.out().ancestors().nth(3).context("an attempt lies in a store")?;
    let workspace = store.ancestors().nth(2).context("a store lies in a workspace")?;
    let said = |result: std::io::Result<()>| match result {
        Ok(()) => "done".to_string(),
        Err(e) => format!("{:?}", e.kind()),
    };
    let mut text = String::new();
    for (what, result) in [
        ("read its input", read(job, "text").map(drop).map_err(std::io::Error::other)),
        ("read a recipe", std::fs::read(workspace.join("recipes/r.toml")).map(drop)),
        ("list the store", std::fs::read_dir(store.join("cas")).map(drop)),
        ("write beside", std::fs::write(workspace.join("recipes/new"), "x")),
        ("write its input", std::fs::write(job.input("text")?.path.join("new"), "x")),
        ("write its scratch", std::fs::write(job.scratch().join("new"), "x")),
        ("write /dev/null", std::fs::write("/dev/null", "x")),
        ("make a device", std::fs::write("/dev/anneal-nosy", "x")),
        ("connect", std::net::TcpStream::connect("127.0.0.1:9").map(drop)),
    ] {
        text += &format!("{what}: {}\n", said(result));
    }
    Ok(std::fs::write(job.out().join("text.txt"), text)?)
}

/// Sends nothing: answers what it was asked, and what it would send.
fn send(job: &Job) -> anyhow::Result<()> {
    let act: step::worker::Act = job.params()?;
    let answer = serde_json::json!({
        "to": act.target["to"], "task": act.task, "text": read(job, "text")?,
    });
    Ok(std::fs::write(job.out().join("answer.json"), answer.to_string())?)
}

fn write(path: &Path, text: String) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The text of all files below an input, in the order of their paths.
fn read(job: &Job, input: &str) -> anyhow::Result<String> {
    fn visit(dir: &Path, out: &mut BTreeMap<PathBuf, String>) -> anyhow::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                visit(&path, out)?;
            } else {
                out.insert(path.clone(), std::fs::read_to_string(&path)?);
            }
        }
        Ok(())
    }
    let mut files = BTreeMap::new();
    visit(&job.input(input)?.path, &mut files)?;
    Ok(files.into_values().collect())
}
