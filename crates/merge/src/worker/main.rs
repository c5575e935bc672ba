//! The worker of the `merge` family.

use std::process::ExitCode;

mod kept;
mod lora;
mod sum;

fn main() -> ExitCode {
    step::worker::main(&[("merge/lora", lora::run)])
}
