//! The worker of the `onnx` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
