//! The worker of the `gguf` family.

use std::process::ExitCode;

mod adapter;
mod decode;
mod encode;
mod export;
mod format;
mod keys;
mod mix;
mod modelfile;
mod parity;
mod read;
mod report;
mod tensors;
mod tokenizer;

#[cfg(test)]
mod tests;

fn main() -> ExitCode {
    step::worker::main(&[("gguf/export", export::run), ("gguf/adapter", adapter::run)])
}
