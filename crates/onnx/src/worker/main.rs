//! The worker of the `onnx` family.

use std::process::ExitCode;

mod calibration;
mod export;
mod parity;

fn main() -> ExitCode {
    step::worker::main(&[("onnx/export", export::run)])
}
