//! The worker of the `publish` family.

use std::process::ExitCode;

use step::worker::Job;

mod check;
mod cloudfront;
mod release;
mod s3;
mod setup;

fn main() -> ExitCode {
    step::worker::main(&[("publish/s3", s3::run), (publish::CHECK, check::run)])
}

/// Hands the answer to whoever asked.
fn answer(job: &Job, answer: &serde_json::Value) -> anyhow::Result<()> {
    Ok(std::fs::write(job.out().join("answer.json"), serde_json::to_vec(answer)?)?)
}
