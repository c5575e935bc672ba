//! The worker of the `dataset` family.

use std::process::ExitCode;

mod chat;
mod histogram;
mod parse;
mod tokenised;
mod tokenizer;

fn main() -> ExitCode {
    step::worker::main(&[("dataset/chat", chat::run), ("dataset/tokenizer", tokenizer::run)])
}
