//! The worker of the `gguf` family.

use std::process::ExitCode;

mod encode;
mod export;
mod format;
mod keys;
mod mix;
mod tensors;
mod tokenizer;

#[cfg(test)]
mod tests;

fn main() -> ExitCode {
    step::worker::main(&[("gguf/export", export::run)])
}
