//! The worker of the `source` family.

use std::process::ExitCode;

mod download;
mod huggingface;
mod url;

fn main() -> ExitCode {
    step::worker::main(&[("source/huggingface", huggingface::run), ("source/url", url::run)])
}
