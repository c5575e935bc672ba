//! The worker of the `merge` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
