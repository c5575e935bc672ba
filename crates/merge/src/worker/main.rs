//! The worker of the `merge` family.

use std::process::ExitCode;

mod lora;

fn main() -> ExitCode {
    step::worker::main(&[("merge/lora", lora::run)])
}
