//! The worker of the engine's tests: steps that are quick, and steps that go wrong on purpose.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use step::Failure;
use step::worker::Job;

fn main() -> ExitCode {
    step::worker::main(&[
        ("demo/upper", upper),
        ("demo/lines", lines),
        ("demo/fail", fail),
        ("demo/slow", slow),
        ("demo/full", full),
    ])
}

/// The input's text in capitals. Counts its runs in a file beside the input's origin.
fn upper(job: &Job) -> anyhow::Result<()> {
    let text = read(job, "text")?;
    std::fs::write(job.out().join("text.txt"), text.to_uppercase())?;
    std::fs::write(job.report().join("when.txt"), format!("{:?}", std::time::SystemTime::now()))?;
    job.metric("letters", text.chars().count() as f64);
    job.note("done");
    Ok(())
}

/// How many lines the input has: many inputs give one output, for early cut-off.
fn lines(job: &Job) -> anyhow::Result<()> {
    let count = read(job, "text")?.lines().count();
    std::fs::write(job.out().join("text.txt"), count.to_string())?;
    Ok(())
}

fn fail(_: &Job) -> anyhow::Result<()> {
    Err(Failure::input("rows.txt:3: no verb in this sentence").hint("write one").into())
}

/// Writes half of its output, waits, writes the rest.
fn slow(job: &Job) -> anyhow::Result<()> {
    let text = read(job, "text")?;
    let out = job.out().join("text.txt");
    std::fs::write(&out, "half")?;
    std::fs::write(job.scratch().join("checkpoint"), "1")?;
    std::thread::sleep(Duration::from_millis(400));
    Ok(std::fs::write(&out, text)?)
}

/// Writes to the device that is always full.
fn full(_: &Job) -> anyhow::Result<()> {
    std::fs::write("/dev/full", "text").context("cannot write /dev/full")
}

fn read(job: &Job, input: &str) -> anyhow::Result<String> {
    let folder = &job.input(input)?.path;
    let mut files: Vec<_> = std::fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    files.sort_by_key(|f| f.file_name());
    files.iter().map(|f| Ok(std::fs::read_to_string(f.path())?)).collect()
}
