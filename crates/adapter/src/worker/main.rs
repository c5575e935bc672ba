//! The worker of the `adapter` family.

use std::process::ExitCode;

mod peft;

fn main() -> ExitCode {
    step::worker::main(&[("adapter/peft", peft::run)])
}
