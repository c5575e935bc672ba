//! The worker of the `command` family.

mod run;

use std::process::ExitCode;

fn main() -> ExitCode {
    step::worker::main(&[("command/run", run::run)])
}
