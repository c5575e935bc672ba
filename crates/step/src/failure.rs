//! A failure that somebody has to act on: whose it is, where, and what to do next.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whose failure it is. Decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The recipe, a dataset row, a command line.
    Input,
    /// The disk, the network, a missing tool, the device.
    Environment,
    /// Ours.
    Bug,
}

impl Class {
    pub const fn exit_code(self) -> u8 {
        match self {
            Class::Input => 1,
            Class::Environment => 2,
            Class::Bug => 3,
        }
    }
}

/// An error with an owner and a next step. Travels inside `anyhow::Error` in workers and xtask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    pub class: Class,
    /// Lower case, names the file and the place.
    pub message: String,
    /// What to do next: printed after `hint:`.
    pub hint: Option<String>,
}

impl Failure {
    pub fn input(message: impl Into<String>) -> Self {
        Self { class: Class::Input, message: message.into(), hint: None }
    }

    pub fn environment(message: impl Into<String>) -> Self {
        Self { class: Class::Environment, message: message.into(), hint: None }
    }

    pub fn bug(message: impl Into<String>) -> Self {
        Self { class: Class::Bug, message: message.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The failure inside `error`, or the best guess: an I/O error is the environment's, anything
    /// that nobody classified is ours.
    pub fn from_anyhow(error: &anyhow::Error) -> Self {
        if let Some(failure) = error.downcast_ref::<Failure>() {
            return failure.clone();
        }
        // Context above a failure is kept in front of its message.
        if let Some(failure) = error.chain().find_map(|e| e.downcast_ref::<Failure>()) {
            return Failure { message: format!("{error:#}"), ..failure.clone() };
        }
        let io = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>());
        match io {
            Some(io) if io.kind() == std::io::ErrorKind::StorageFull => {
                Failure::environment(format!("{error:#}"))
                    .hint("free some disk space, for example with `cargo xtask gc`, and build again: finished steps are kept")
            }
            Some(_) => Failure::environment(format!("{error:#}")),
            None => Failure::bug(format!("{error:#}")),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
