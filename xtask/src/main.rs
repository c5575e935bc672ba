//! The command line of Anneal: parses, calls the engine, prints. The only room that prints.
//!
//! Knows nothing of how a step works: it links the families' light halves only.

mod bench;
mod cli;
mod commands;
mod display;
mod error;
mod registry;
mod release;
mod scaffold;
mod schema;
mod signals;
mod suite;
mod tensors;
mod tidy;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    signals::end_with_the_reader();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // Help and version are no mistakes.
            return if error.use_stderr() { error::INPUT.into() } else { ExitCode::SUCCESS };
        }
    };
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => error::report(&error),
    }
}
