//! The worker of the `site` family.

use std::process::ExitCode;

mod app;
mod chat;
mod licences;

fn main() -> ExitCode {
    step::worker::main(&[("site/chat", chat::run)])
}
