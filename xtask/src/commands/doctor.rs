//! `doctor`: what is there, what is missing, and how to get it.

use std::path::Path;
use std::process::{Command, ExitCode};

use engine::tools;
use serde_json::json;

use crate::display::Table;
use crate::error;

/// A program that Anneal calls but does not fetch.
struct Program {
    name: &'static str,
    needed_for: &'static str,
    how: &'static str,
}

const PROGRAMS: &[Program] = &[
    Program { name: "cargo", needed_for: "compiling workers", how: "install Rust with rustup" },
    Program {
        name: "cc",
        needed_for: "compiling workers",
        how: "install gcc (Debian: `apt install build-essential`)",
    },
    Program {
        name: "c++",
        needed_for: "compiling workers",
        how: "install g++ (Debian: `apt install build-essential`)",
    },
    Program {
        name: "python3",
        needed_for: "fetching pinned wheels with pip; not needed once they are there",
        how: "install Python 3 with pip (Debian: `apt install python3-pip`)",
    },
    Program {
        name: "npm",
        needed_for: "fetching the page's libraries",
        how: "install Node.js (Debian: `apt install npm`)",
    },
    Program { name: "git", needed_for: "the commit in a result's provenance", how: "install git" },
];

pub fn run(root: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let mut table = Table::new(["what", "state", "detail"]);
    let mut missing = 0;
    let mut add = |what: &str, there: bool, state: &str, detail: String| {
        missing += usize::from(!there);
        if json {
            println!("{}", json!({"what": what, "there": there, "state": state, "detail": detail}));
        }
        table.row([what.to_string(), state.to_string(), detail]);
    };
    for program in PROGRAMS {
        let output = Command::new(program.name).arg("--version").output();
        match output.ok().filter(|o| o.status.success()) {
            Some(output) => {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let first = text.lines().next().unwrap_or_default().to_string();
                add(program.name, true, "there", first);
            }
            None => {
                let detail = format!("needed for {}: {}", program.needed_for, program.how);
                add(program.name, false, "MISSING", detail);
            }
        }
    }
    let dir = engine::store_path(root).join("tools");
    for tool in tools::names() {
        let status = tools::status(tool, root, &dir);
        add(tool, true, status.state, status.detail);
    }
    match engine::sandbox::available() {
        true => add("sandbox", true, "there", "Landlock holds steps to their inputs".into()),
        false => add("sandbox", true, "none", "no Landlock: steps may touch any file".into()),
    }
    match std::process::Command::new("nvidia-smi").arg("-L").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            add("gpu", true, "there", text.lines().next().unwrap_or_default().to_string());
        }
        _ => add("gpu", true, "none", "training runs on the processor".into()),
    }
    if !json {
        print!("{table}");
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { error::ENVIRONMENT.into() })
}
