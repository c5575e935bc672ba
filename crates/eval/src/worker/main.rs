//! The worker of the `eval` family.

mod chart;
mod dataset;
mod exact_match;
mod gates;
mod perplexity;
mod report;
mod scored;

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[
        ("eval/perplexity", perplexity::run),
        ("eval/exact-match", exact_match::run),
    ])
}
