//! The worker of the `gguf` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
