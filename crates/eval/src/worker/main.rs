//! The worker of the `eval` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
