//! How an error reaches a person, and the exit code that a script reads.

use std::process::ExitCode;

use step::{Class, Failure};

/// Your input: a recipe, a row, the command line.
pub const INPUT: u8 = Class::Input.exit_code();
/// Your environment: disk, network, a missing tool.
#[allow(dead_code, reason = "the list of exit codes is whole")]
pub const ENVIRONMENT: u8 = Class::Environment.exit_code();
/// A bug of ours.
#[allow(dead_code, reason = "the list of exit codes is whole")]
pub const BUG: u8 = Class::Bug.exit_code();

/// A signal stopped it: what shells say of Ctrl-C.
pub const STOPPED: u8 = 130;

/// Prints `error` on standard error.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(engine::Error::Recipe(diagnostic)) = error.downcast_ref::<engine::Error>() {
        eprintln!("{}", diagnostic.render(colour()));
        return INPUT.into();
    }
    let failure = match error.downcast_ref::<engine::Error>() {
        Some(engine::Error::Failure(failure)) => failure.clone(),
        _ => Failure::from_anyhow(error),
    };
    eprintln!("{}: {}", bold_red("error"), failure.message);
    if let Some(hint) = &failure.hint {
        eprintln!("  = hint: {hint}");
    }
    if failure.class == Class::Bug {
        eprintln!("  = note: this is a bug in Anneal; please report it with the lines above");
    }
    failure.class.exit_code().into()
}

fn bold_red(text: &str) -> String {
    if colour() { format!("\x1b[1;31m{text}\x1b[0m") } else { text.to_string() }
}

fn colour() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none()
}
