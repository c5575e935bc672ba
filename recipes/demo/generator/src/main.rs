//! Writes the demo's rows: schedules in English and their crontab lines.
//! It does not know who trains on them.

mod clock;
mod day_words;
mod days;
mod files;
mod frames;
mod line;
mod pretrain;
mod repeats;
mod rng;
mod schedule;
mod template;
mod words;

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: demo-generator [--check] <folder>";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["--check", folder] | [folder, "--check"] => check(Path::new(folder)),
        [folder] if !folder.starts_with('-') => write(Path::new(folder)),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> Result<(), String> {
    for file in files::all() {
        let path = folder.join(file.name);
        std::fs::write(&path, file.text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

fn check(folder: &Path) -> Result<(), String> {
    for file in files::all() {
        let path = folder.join(file.name);
        let there =
            std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        if there != file.text {
            return Err(format!(
                "{}: differs from what the generator writes\nhint: cargo run -p demo-generator -- {}",
                path.display(),
                folder.display()
            ));
        }
    }
    Ok(())
}
