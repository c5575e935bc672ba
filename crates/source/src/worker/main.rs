//! The worker of the `source` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
