//! The worker of the `site` family.

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[])
}
