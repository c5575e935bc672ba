//! `cache`: gives results to the shared cache, takes them from it, tells what is there.

use std::process::ExitCode;

use engine::{Engine, Options};
use serde_json::json;

use super::resolve;
use crate::cli::Cache;
use crate::display::{self, Display};
use crate::error;

pub fn run(engine: Engine, what: Cache, json: bool) -> anyhow::Result<ExitCode> {
    match what {
        Cache::Push(targets) => {
            // Who says so writes, whatever the mode.
            let engine = match engine.remote_settings()? {
                Some(remote) => engine.with_remote(engine::Remote { write: true, ..remote }),
                None => engine,
            };
            engine.needs_remote()?;
            let graph = resolve(&engine, &targets)?;
            let mut display = Display::new(json, &graph);
            crate::signals::stop(engine.running())?;
            let pushed = engine.push(&graph, &mut |event| display.event(&event))?;
            display.clear();
            let all = graph.nodes.len();
            if !json {
                println!("{pushed} of {all} results are in the shared cache");
            }
            Ok(if pushed == all { ExitCode::SUCCESS } else { error::ENVIRONMENT.into() })
        }
        Cache::Pull(targets) => {
            engine.needs_remote()?;
            let graph = resolve(&engine, &targets)?;
            let mut display = Display::new(json, &graph);
            crate::signals::stop(engine.running())?;
            let options = Options { keep_going: true, only_fetch: true, ..Options::default() };
            let outcome = engine.build(&graph, options, &mut |event| display.event(&event))?;
            display.summary(&engine, &outcome, 0);
            Ok(if outcome.failed.is_empty() {
                ExitCode::SUCCESS
            } else {
                error::ENVIRONMENT.into()
            })
        }
        Cache::Status => status(&engine, json),
        Cache::Keygen { name, file } => {
            let public = engine.keygen(&file, &name, &mut |_| {})?;
            if json {
                println!("{}", json!({"file": file, "public": public}));
            } else {
                println!(
                    "{} holds the secret half: keep it where only CI reads it,",
                    file.display()
                );
                println!("and name it there in {}.", ::cache::SIGNING_KEY_FILE);
                println!("In Cargo.toml, for all who are to believe what it signs:\n");
                println!("[workspace.metadata.anneal]\ntrusted = [\"{public}\"]");
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn status(engine: &Engine, json: bool) -> anyhow::Result<ExitCode> {
    let remote = engine.needs_remote()?;
    let status = engine.remote_status(&mut |_| {})?;
    let mode = if remote.write { "read-write" } else { "read" };
    if json {
        let location = remote.location.to_string();
        println!("{}", json!({"remote": location, "mode": mode, "status": status}));
        return Ok(ExitCode::SUCCESS);
    }
    let ::cache::Status { results, chunks, leases, size, .. } = status;
    println!(
        "{} ({mode}): {results} results in {chunks} chunks, {}",
        remote.location,
        display::bytes(size)
    );
    if leases > 0 {
        println!("{leases} being made now");
    }
    if status.conditional == Some(false) {
        println!("the store ignores conditional writes: two machines may make the same result");
    }
    match status.signs_as {
        Some(name) if status.believed => println!("signs as `{name}`"),
        Some(name) => println!("signs as `{name}`, whom this workspace does not trust"),
        None if remote.write => println!("has no key to sign with: see `cache keygen`"),
        None => {}
    }
    match remote.trusted.as_slice() {
        [] => println!("trusts nobody: nothing is taken from it"),
        keys => {
            let names = keys.iter().filter_map(|key| key.split(':').next());
            println!("trusts {}", names.collect::<Vec<_>>().join(", "));
        }
    }
    Ok(ExitCode::SUCCESS)
}
