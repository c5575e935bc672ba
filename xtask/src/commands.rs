//! One function a command.

mod cache;
mod ci;
mod diff;
mod doctor;
mod nix;
mod publish;
mod release;
mod show;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode, Stdio};
use std::time::Duration;

use clap::CommandFactory;
use engine::gc::Keep;
use engine::verify::Verdict;
use engine::{Engine, Graph, Options, Plan, Stale, Status};
use serde_json::json;
use step::Failure;

use crate::cli::{Bench, Cli, Command, GraphFormat, New, Targets};
use crate::display::{self, Display};
use crate::registry::REGISTRY;
use crate::{bench, error, scaffold, schema, signals, suite};

pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let root = workspace(cli.workspace.as_deref())?;
    let json = cli.json;
    let open = |root: &Path| open(root, cli.offline);
    match cli.command {
        Command::New { what: New::Step { name } } => scaffold::step(&root, &name)?,
        Command::New { what: New::Recipe { name } } => scaffold::recipe(&root, &name)?,
        Command::Test { stages } => return suite::run(&root, &stages),
        Command::Build { targets, keep_going, threads, no_sandbox } => {
            let options =
                Options { keep_going, threads, words: targets.words(), ..Options::default() };
            let engine = open(&root)?;
            let engine = if no_sandbox { engine.unconfined() } else { engine };
            return build(&engine, &targets, options, json);
        }
        Command::Bench { what: Bench::Engine { gib } } => bench::engine(&root, gib)?,
        Command::Bench { what: Bench::Cache { gib, rounds } } => {
            bench::cache::run(&root, gib, rounds)?;
        }
        Command::Bench { what: Bench::Train { device, cases } } => {
            bench::train::run(&root, device, &cases)?;
        }
        Command::Bench { what: Bench::Export { cases } } => bench::export::run(&root, &cases)?,
        Command::Release { targets, documents } => {
            let engine = open(&root)?;
            let graph = resolve(&engine, &targets)?;
            let release = release::write(&engine, &graph, &documents, None)?;
            release.print(json);
        }
        Command::Ci { targets, train, documents } => {
            return ci::run(&open(&root)?, &targets, train, &documents);
        }
        Command::Schema => println!("{:#}", schema::of_recipes(REGISTRY)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "anneal", &mut std::io::stdout());
        }
        Command::Plan(targets) => return plan(&open(&root)?, &targets, json),
        Command::Why { target } => why(&open(&root)?, &target, json)?,
        Command::Vouch { targets, anyway } => vouch(&open(&root)?, &targets, anyway, json)?,
        Command::Unvouch(targets) => unvouch(&open(&root)?, &targets, json)?,
        Command::Show { target, log } => show::run(&open(&root)?, &target, log, json)?,
        Command::Diff { a, b } => diff::run(&open(&root)?, &a, b.as_deref(), json)?,
        Command::Graph { targets, format } => graph(&open(&root)?, &targets, format)?,
        Command::Serve { target, port, host } => return serve(&open(&root)?, &target, &host, port),
        Command::Publish { what, target, dry_run } => {
            return publish::run(&open(&root)?, what, &target, dry_run, json);
        }
        Command::Lock { targets, check: true } => return check(&open(&root)?, &targets, json),
        Command::Lock { targets, check: false } => lock(&open(&root)?, &targets, json)?,
        Command::Nix { what } => nix::run(&root, what)?,
        Command::Verify { targets, rebuild } => {
            return verify(&open(&root)?, &targets, rebuild, json);
        }
        Command::Gc { days, max_size, dry_run } => {
            let newer = Duration::from_secs(days * 24 * 3600);
            gc(&open(&root)?, Keep { newer, max_size }, dry_run, json)?;
        }
        Command::Cache { what } => return cache::run(open(&root)?, what, json),
        Command::Doctor => return doctor::run(&root, json),
    }
    Ok(ExitCode::SUCCESS)
}

fn open(root: &Path, offline: bool) -> anyhow::Result<Engine> {
    let engine = Engine::open(root, REGISTRY)?;
    Ok(if offline { engine.offline() } else { engine })
}

/// The folder with `recipes` in it: the current one or above.
fn workspace(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let start = match given {
        Some(dir) => dir.to_path_buf(),
        None => std::env::current_dir()?,
    };
    let start = std::fs::canonicalize(&start)
        .map_err(|e| Failure::input(format!("{}: {e}", start.display())))?;
    let found =
        start.ancestors().find(|d| d.join("recipes").is_dir() && d.join("Cargo.toml").is_file());
    match found {
        Some(dir) => Ok(dir.to_path_buf()),
        None => Err(Failure::input(format!("no workspace at {} or above it", start.display()))
            .hint("a workspace has a Cargo.toml and a folder `recipes`; name one with --workspace")
            .into()),
    }
}

fn resolve(engine: &Engine, targets: &Targets) -> anyhow::Result<Graph> {
    let mut resolver = engine.resolver();
    let wanted = resolver.expand(&targets.words())?;
    Ok(resolver.graph(&wanted)?)
}

fn build(
    engine: &Engine,
    targets: &Targets,
    options: Options,
    json: bool,
) -> anyhow::Result<ExitCode> {
    // With --json each target has its line, and of few targets each is worth one anyway.
    const MANY: usize = 100;
    let (graph, resting) = match engine.remembered(&options.words).filter(|_| !json) {
        Some(known) if known.moved.is_empty() => {
            println!("{}", display::up_to_date(known.all));
            return Ok(ExitCode::SUCCESS);
        }
        Some(known) if known.all > MANY => {
            let graph = engine.resolver().graph(&known.moved)?;
            let resting = known.all - graph.nodes.len();
            (graph, resting)
        }
        _ => (resolve(engine, targets)?, 0),
    };
    let running = engine.running();
    signals::stop(engine.running())?;
    let mut display = Display::new(json, &graph);
    let outcome = engine.build(&graph, options, &mut |event| display.event(&event))?;
    display.summary(engine, &outcome, resting);
    if let Some(swept) = engine.hold_size()?
        && !json
    {
        eprintln!("the store was full: old results went, {}", display::bytes(swept.bytes_freed));
    }
    if running.is_stopped() {
        eprintln!("stopped: what was made is kept; a training goes on from its last checkpoint");
        return Ok(error::STOPPED.into());
    }
    let codes = outcome.failed.into_iter().map(|(_, failed)| error::report(&failed.into()));
    Ok(codes.collect::<Vec<_>>().first().copied().unwrap_or(ExitCode::SUCCESS))
}

fn plan(engine: &Engine, targets: &Targets, json: bool) -> anyhow::Result<ExitCode> {
    let graph = resolve(engine, targets)?;
    let plan = engine.plan(&graph)?;
    if json {
        for (planned, node) in plan.targets.iter().zip(&graph.nodes) {
            let mut line = plan_json(planned);
            line["params"] = node.params.clone();
            println!("{line}");
        }
    } else {
        print!("{}", plan_text(&plan));
        for (tool, detail) in to_fetch(engine, &graph, &plan) {
            println!("to fetch: {tool} {detail}");
        }
        for node in graph.nodes.iter().filter(|node| targets.targets.contains(&node.id.to_string()))
        {
            print!("{}", resolved(node));
        }
    }
    let blocked = plan.targets.iter().any(|p| matches!(p.status, Status::Blocked(_)));
    Ok(if blocked { error::INPUT.into() } else { ExitCode::SUCCESS })
}

/// What stale targets need from outside: pinned tools that are not there yet, and pinned sources.
fn to_fetch(engine: &Engine, graph: &Graph, plan: &Plan) -> BTreeMap<String, String> {
    let stale = |node: &&engine::Node| {
        plan.get(&node.id).is_some_and(|planned| matches!(planned.status, Status::Stale(_)))
    };
    let needed: Vec<_> = graph.nodes.iter().filter(stale).collect();
    let names = needed.iter().flat_map(|node| node.def.tools.iter().chain(node.family.build_tools));
    let dir = engine.store().tools_dir();
    let tools = names
        .map(|name| (name.to_string(), engine::tools::status(name, engine.root(), &dir)))
        .filter(|(_, status)| status.state == "fetched on first need")
        .map(|(name, status)| (name, status.detail));
    let sources = needed.iter().filter_map(|node| {
        let files = node.params.pointer("/lock/files")?.as_object()?;
        let size = files.values().filter_map(|file| file["size"].as_u64()).sum();
        Some((node.id.to_string(), display::bytes(size)))
    });
    tools.chain(sources).collect()
}

/// What a step was given, with what its preset and its defaults fill in, as a recipe spells it.
fn resolved(node: &engine::Node) -> String {
    let params = node.params.as_object().into_iter().flatten();
    let lines: String = params.map(|(key, value)| format!("  {key} = {value}\n")).collect();
    format!("\n{}, with all that its recipe leaves out:\n{lines}", node.id)
}

fn plan_json(planned: &engine::Planned) -> serde_json::Value {
    let (status, reason) = match &planned.status {
        Status::Cached(_) => ("cached", json!(null)),
        Status::Stale(stale) => ("stale", json!(stale)),
        Status::Blocked(blocked) => ("blocked", json!(blocked.to_string())),
    };
    let last = planned.last.as_ref().map(|r| &r.provenance);
    json!({
        "target": planned.id,
        "step": planned.step,
        "status": status,
        "reason": reason,
        "last_wall_seconds": last.map(|p| p.wall_seconds),
        "expected_seconds": planned.seconds,
        "last_peak_memory": last.map(|p| p.peak_memory),
        "memory": planned.memory,
    })
}

fn plan_text(plan: &Plan) -> String {
    let mut table = display::Table::new(["target", "step", "status", "time", "memory"]);
    let mut wall = 0.0;
    for planned in &plan.targets {
        let last = planned.last.as_ref().map(|r| &r.provenance);
        let status = match &planned.status {
            Status::Cached(_) => "cached".to_string(),
            Status::Stale(stale) => {
                wall += planned.seconds.or(last.map(|p| p.wall_seconds)).unwrap_or(0.0);
                match stale {
                    Stale::Waits(_) => stale.to_string(),
                    _ => format!("stale: {stale}"),
                }
            }
            Status::Blocked(blocked) => format!("blocked: {blocked}"),
        };
        table.row([
            planned.id.to_string(),
            planned.step.to_string(),
            status,
            time(planned),
            memory(planned),
        ]);
    }
    let stale = plan.targets.iter().filter(|p| matches!(p.status, Status::Stale(_))).count();
    let line = match stale {
        0 if plan.up_to_date() => "up to date\n".to_string(),
        0 => String::new(),
        n if wall > 0.0 => {
            format!("{n} to make, about {} by what was made before\n", display::seconds(wall))
        }
        n => format!("{n} to make\n"),
    };
    format!("{table}{line}")
}

/// What it would take by its own numbers, where it knows them; else what it took last time.
fn time(planned: &engine::Planned) -> String {
    let last = planned.last.as_ref().map(|r| display::seconds(r.provenance.wall_seconds));
    match planned.seconds {
        Some(seconds) => format!("~{}", display::seconds(seconds)),
        None => last.unwrap_or_default(),
    }
}

/// What it took last time; of a step that knows its numbers, what it will take, and where.
fn memory(planned: &engine::Planned) -> String {
    let last = planned.last.as_ref().map(|r| display::bytes(r.provenance.peak_memory));
    match (planned.memory, &planned.status) {
        (Some(memory), Status::Stale(_)) => format!(
            "about {}, or {} on a GPU",
            display::bytes(memory.on_processor),
            display::bytes(memory.on_accelerator)
        ),
        _ => last.unwrap_or_default(),
    }
}

fn why(engine: &Engine, target: &str, json: bool) -> anyhow::Result<()> {
    let graph = resolve(engine, &Targets { targets: vec![target.into()] })?;
    let plan = engine.plan(&graph)?;
    let wanted = graph.nodes.last().expect("a graph holds what it was asked for");
    let planned = plan.get(&wanted.id).expect("every node is planned");
    if json {
        println!("{}", plan_json(planned));
        return Ok(());
    }
    match &planned.status {
        Status::Cached(result) => {
            println!("{} is up to date: action {}", planned.id, result.key.short());
        }
        Status::Blocked(blocked) => println!("{} is blocked: {blocked}", planned.id),
        Status::Stale(Stale::Changed(differences)) => {
            println!("{} is stale:", planned.id);
            for difference in differences {
                println!("  {difference}");
            }
        }
        Status::Stale(Stale::Waits(_)) => {
            println!("{} waits for what it is made of:", planned.id);
            for before in &plan.targets {
                if let Status::Stale(reason) = &before.status
                    && !matches!(reason, Stale::Waits(_))
                {
                    println!("  {}: {reason}", before.id);
                }
            }
        }
        Status::Stale(reason) => println!("{} is stale: {reason}", planned.id),
    }
    Ok(())
}

fn vouch(engine: &Engine, targets: &Targets, anyway: bool, json: bool) -> anyhow::Result<()> {
    let graph = resolve(engine, targets)?;
    for one in engine.vouch(&graph, anyway)? {
        if json {
            println!(
                "{}",
                json!({"target": one.id, "from": one.from, "key": one.key, "differences": one.differences})
            );
            continue;
        }
        println!("{} keeps the result of action {}, though:", one.id, one.from.short());
        for difference in &one.differences {
            println!("  {difference}");
        }
    }
    Ok(())
}

fn unvouch(engine: &Engine, targets: &Targets, json: bool) -> anyhow::Result<()> {
    for id in engine.resolver().expand(&targets.words())? {
        let from = engine.unvouch(&id)?;
        match from {
            _ if json => println!("{}", json!({"target": id, "from": from})),
            Some(from) => println!("{id} stands for action {} again", from.short()),
            None => println!("{id}: nobody vouched for it"),
        }
    }
    Ok(())
}

fn graph(engine: &Engine, targets: &Targets, format: GraphFormat) -> anyhow::Result<()> {
    let graph = resolve(engine, targets)?;
    match format {
        GraphFormat::Text => print!("{}", engine::graph::text(&graph, &engine.plan(&graph)?)),
        GraphFormat::Dot => print!("{}", engine::graph::dot(&graph)),
        GraphFormat::Html => print!("{}", engine::graph::page(&graph, &engine.plan(&graph)?)),
        GraphFormat::Mermaid => print!("{}", engine::graph::mermaid(&graph)),
    }
    Ok(())
}

/// Builds what is stale, then serves. The server is a worker too: its libraries are not ours.
fn serve(engine: &Engine, target: &str, host: &str, port: u16) -> anyhow::Result<ExitCode> {
    let targets = Targets { targets: vec![target.into()] };
    let built = build(engine, &targets, Options::default(), false)?;
    if built != ExitCode::SUCCESS {
        return Ok(built);
    }
    let graph = resolve(engine, &targets)?;
    let node = graph.nodes.last().expect("a graph holds what it was asked for");
    if node.kind != step::Kind::Site {
        let what = node.kind.article();
        return Err(Failure::input(format!("{} is {what}, not a site", node.id)).into());
    }
    let server = engine.compile("serve", &BTreeMap::new(), &mut |_| {})?;
    let status = Process::new(server)
        .arg(engine.link(&node.id))
        .args(["--host", host, "--port", &port.to_string()])
        .stdin(Stdio::null())
        .status()
        .map_err(|e| Failure::environment(format!("cannot start the server: {e}")))?;
    Ok(ExitCode::from(
        status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(error::ENVIRONMENT),
    ))
}

fn lock(engine: &Engine, targets: &Targets, json: bool) -> anyhow::Result<()> {
    let graph = resolve(engine, targets)?;
    let mut display = Display::new(json, &graph);
    let locked = engine.lock(&graph, &mut |event| display.event(&event))?;
    display.clear();
    for one in &locked {
        let what = match &one.before {
            None => "pinned",
            Some(before) if *before == one.after => "unchanged",
            Some(_) => "moved",
        };
        if json {
            println!("{}", json!({"target": one.id, "lock": what, "pin": one.after}));
        } else {
            println!("{}: {what}", one.id);
        }
    }
    // With the new pins of sources.
    let results = engine.lock_results(&resolve(engine, targets)?)?;
    for one in &results {
        let what = match (&one.before, &one.after) {
            (None, _) => "pinned",
            (Some(before), Some(after)) if before == after => "unchanged",
            (Some(_), Some(_)) => "moved",
            (Some(_), None) => "no longer pinned: it is not built as it stands",
        };
        if json {
            println!("{}", json!({"target": one.id, "result": what, "pin": one.after}));
        } else {
            println!("{}: result {what}", one.id);
        }
    }
    if locked.is_empty() && results.is_empty() && !json {
        println!("nothing to pin: no outside source in these targets, and no result that needs it");
    }
    Ok(())
}

/// Whether pinned results are those of what is declared now.
fn check(engine: &Engine, targets: &Targets, json: bool) -> anyhow::Result<ExitCode> {
    let results = engine.locked_results(&resolve(engine, targets)?)?;
    for (id, pin, current) in &results {
        let what = if *current { "current" } else { "of another recipe or other files" };
        if json {
            println!("{}", json!({"target": id, "result": what, "pin": pin}));
        } else {
            println!("{id}: {what}");
        }
    }
    if results.iter().all(|(_, _, current)| *current) {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::input("pinned results are not those of what recipes say now")
        .hint("build, then run `cargo xtask lock`")
        .into())
}

fn verify(
    engine: &Engine,
    targets: &Targets,
    rebuild: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    if !rebuild {
        return scrub(engine, json);
    }
    let graph = resolve(engine, targets)?;
    let mut display = Display::new(json, &graph);
    let rebuilt = engine.rebuild(&graph, &mut |event| display.event(&event))?;
    display.clear();
    let mut table = display::Table::new(["target", "rebuild"]);
    for one in &rebuilt {
        let verdict = match &one.verdict {
            Verdict::Identical => "identical".to_string(),
            Verdict::WithinTolerance => "within tolerance".to_string(),
            Verdict::Differs(what) => format!("DIFFERS: {}", what.join(", ")),
            Verdict::Skipped => "not rebuilt: it needs the network".to_string(),
        };
        if json {
            println!("{}", json!({"target": one.id, "rebuild": verdict}));
        }
        table.row([one.id.to_string(), verdict]);
    }
    if !json {
        print!("{table}");
    }
    let differs = rebuilt.iter().any(|r| matches!(r.verdict, Verdict::Differs(_)));
    Ok(if differs { error::BUG.into() } else { ExitCode::SUCCESS })
}

fn scrub(engine: &Engine, json: bool) -> anyhow::Result<ExitCode> {
    let bar = display::byte_bar(json, "verify");
    let report = engine.store().scrub(&mut |at| {
        bar.set_length(at.of_bytes);
        bar.set_position(at.bytes);
    })?;
    bar.finish_and_clear();
    if json {
        let bad: Vec<_> = report.corrupt.iter().map(ToString::to_string).collect();
        println!("{}", json!({"files": report.blobs, "bytes": report.bytes, "corrupt": bad}));
    } else {
        println!(
            "{} files, {}: {} corrupt",
            report.blobs,
            display::bytes(report.bytes),
            report.corrupt.len()
        );
        for digest in &report.corrupt {
            println!("  {digest}: moved to quarantine; the next build makes it again");
        }
    }
    Ok(if report.corrupt.is_empty() { ExitCode::SUCCESS } else { error::ENVIRONMENT.into() })
}

fn gc(engine: &Engine, keep: Keep, dry_run: bool, json: bool) -> anyhow::Result<()> {
    let swept = engine.gc(keep, dry_run)?;
    let verb = if dry_run { "would take" } else { "took" };
    if json {
        println!(
            "{}",
            json!({"dry_run": dry_run, "results": swept.results_removed, "files": swept.blobs_removed, "bytes": swept.bytes_freed})
        );
    } else {
        println!(
            "{verb} {} results, {} files, {}",
            swept.results_removed,
            swept.blobs_removed,
            display::bytes(swept.bytes_freed)
        );
    }
    Ok(())
}
