//! The worker of the `dataset` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
