//! The worker of the `train` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
