//! `publish`: a site goes out, an earlier one comes back, a live one is looked at.

use std::collections::BTreeMap;
use std::process::ExitCode;

use engine::{Engine, Errand, Graph, Node, Options, TargetId};
use publish::{CHECK, Check, Task};
use serde_json::Value;
use step::Failure;
use step::worker::{self, Act};

use super::resolve;
use crate::cli::{Publish, Targets};
use crate::display::{Display, Table, bytes};
use crate::error;
use crate::release::{self, Figures};

pub fn run(
    engine: &Engine,
    what: Option<Publish>,
    target: &str,
    dry_run: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let (target, task) = match what {
        Some(Publish::Check { url }) => return check(engine, url, json),
        Some(Publish::Releases { target }) => (target, Task::Releases),
        Some(Publish::Rollback { target, release }) => (target, Task::Rollback { release }),
        Some(Publish::Setup { target }) => (target, Task::Setup),
        None => {
            let place = Place::of(engine, target)?;
            let built = super::build(engine, &place.sites(), Options::default(), json)?;
            if built != ExitCode::SUCCESS {
                return Ok(built);
            }
            let made = release::collect(engine, &resolve(engine, &place.sites())?)?;
            let documents = release::documents(&made, place.figures(engine)?.as_ref());
            return place.publish(engine, documents, dry_run, json);
        }
    };
    let told = Place::of(engine, &target)?.act(engine, &task, Inputs::new(), json)?;
    if json {
        println!("{told}");
    } else {
        match task {
            Task::Rollback { .. } => {
                println!("{} is what {} gives again", text(&told, "release"), text(&told, "place"));
            }
            Task::Setup => set_up(&told),
            Task::Releases | Task::Publish { .. } => releases(&told),
        }
    }
    Ok(looked_at(&told, json))
}

type Inputs = BTreeMap<String, Vec<worker::Input>>;

/// A target that is published to.
pub struct Place {
    graph: Graph,
}

impl Place {
    pub fn of(engine: &Engine, target: &str) -> anyhow::Result<Self> {
        let graph = resolve(engine, &Targets { targets: vec![target.into()] })?;
        let place = Self { graph };
        let node = place.node();
        if !node.def.acts {
            let hint = "name a table with `step = \"publish/s3\"`";
            let message = format!("{} is no place to publish to: `{}`", node.id, node.def.name);
            return Err(Failure::input(message).hint(hint).into());
        }
        Ok(place)
    }

    fn node(&self) -> &Node {
        self.graph.nodes.last().expect("a graph holds what it was asked for")
    }

    /// What goes out there.
    pub fn sites(&self) -> Targets {
        Targets { targets: self.node().targets().map(ToString::to_string).collect() }
    }

    /// Those of the release that is there now, if it has any.
    pub fn figures(&self, engine: &Engine) -> anyhow::Result<Option<Figures>> {
        let mut told = self.act(engine, &Task::Releases, Inputs::new(), true)?;
        Ok(serde_json::from_value(told["figures"].take())?)
    }

    /// Hands out what was built.
    pub fn publish(
        &self,
        engine: &Engine,
        documents: BTreeMap<String, String>,
        dry_run: bool,
        json: bool,
    ) -> anyhow::Result<ExitCode> {
        let inputs = engine.inputs_of(self.node())?;
        let told = self.act(engine, &Task::Publish { dry_run, documents }, inputs, json)?;
        if json {
            println!("{told}");
        } else {
            published(&told);
        }
        Ok(looked_at(&told, json))
    }

    fn act(
        &self,
        engine: &Engine,
        task: &Task,
        inputs: Inputs,
        json: bool,
    ) -> anyhow::Result<Value> {
        let node = self.node();
        let act = Act { target: node.params.clone(), task: serde_json::to_value(task)? };
        let mut display = Display::new(json, &self.graph);
        let errand = Errand { target: &node.id, step: node.def.name, act, inputs };
        let told = engine.act(errand, &mut |event| display.event(&event));
        display.clear();
        Ok(told?)
    }
}

/// What the look at the live site came to, if there was one.
fn looked_at(told: &Value, json: bool) -> ExitCode {
    if told["check"].is_object() { judged(&told["check"], json) } else { ExitCode::SUCCESS }
}

fn check(engine: &Engine, url: String, json: bool) -> anyhow::Result<ExitCode> {
    if !url.starts_with("https://") && !url.starts_with("http://") {
        let message = format!("`{url}` is no http(s) URL");
        return Err(Failure::input(message).into());
    }
    let task = serde_json::to_value(Check { url, release: None })?;
    let id = TargetId::new("publish", "check");
    let act = Act { target: Value::Null, task };
    let mut display = Display::new(json, &Graph::default());
    let errand = Errand { target: &id, step: CHECK, act, inputs: Default::default() };
    let told = engine.act(errand, &mut |event| display.event(&event));
    display.clear();
    let told = told?;
    if json {
        println!("{told}");
    }
    Ok(judged(&told, json))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("–")
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_default()
}

fn published(told: &Value) {
    let dry = told["dry_run"] == true;
    let mut table = Table::new(["new file", "size", "encoding", "type", "cache"]);
    let new = told["new"].as_array().map(Vec::as_slice).unwrap_or_default();
    for file in new {
        let cache =
            if text(file, "cache-control").contains("immutable") { "for ever" } else { "no" };
        table.row([
            text(file, "path").to_string(),
            bytes(number(file, "bytes")),
            file["encoding"].as_str().unwrap_or_default().to_string(),
            text(file, "type").to_string(),
            cache.to_string(),
        ]);
    }
    if !new.is_empty() {
        print!("{table}");
    }
    let (all, fresh) = (number(told, "bytes"), number(told, "bytes_new"));
    let share = if all > 0 { fresh as f64 / all as f64 * 100.0 } else { 0.0 };
    println!(
        "{} of {} files, {} of {} ({share:.1} %) {}",
        new.len(),
        number(told, "files"),
        bytes(fresh),
        bytes(all),
        if dry { "would be sent" } else { "were not there yet" },
    );
    if dry {
        for header in told["headers"].as_array().into_iter().flatten() {
            println!(
                "every response: {}: {}",
                header[0].as_str().unwrap_or_default(),
                header[1].as_str().unwrap_or_default()
            );
        }
    } else {
        println!("sent: {}", bytes(number(told, "bytes_sent")));
    }
    let (before, release) = (text(told, "before"), text(told, "release"));
    let verb = if dry { "would become" } else { "is now" };
    match before == release {
        true => println!("{} stays release {release}", text(told, "place")),
        false => println!("{} {verb} release {release} (before: {before})", text(told, "place")),
    }
}

fn releases(told: &Value) {
    let mut table = Table::new(["release", "first published", "files", "size", ""]);
    for release in told["releases"].as_array().into_iter().flatten() {
        let current = release["release"] == told["current"];
        table.row([
            text(release, "release").to_string(),
            crate::display::when(number(release, "published")),
            number(release, "files").to_string(),
            bytes(number(release, "bytes")),
            if current { "current".into() } else { String::new() },
        ]);
    }
    print!("{table}");
}

fn set_up(told: &Value) {
    let mut table = Table::new(["what", "name", ""]);
    for one in told["done"].as_array().into_iter().flatten() {
        table.row(["what", "name", "how"].map(|key| text(one, key).to_string()));
    }
    print!("{table}");
    println!("\nin the recipe: distribution = \"{}\"", text(told, "distribution"));
    println!("               url = \"{}\"", text(told, "url"));
    for who in ["publisher", "setup"] {
        println!("\nwhat the {who} must be allowed (IAM):\n{:#}", told["policies"][who]);
    }
}

/// Tells what is wrong with a live site; nothing is the exit code 0.
fn judged(told: &Value, json: bool) -> ExitCode {
    let wrong = told["wrong"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !json {
        let mut table = Table::new(["path", "wrong"]);
        for one in wrong {
            table.row([text(one, "path").to_string(), text(one, "wrong").to_string()]);
        }
        if !wrong.is_empty() {
            print!("{table}");
        }
        println!(
            "{}: release {}, {} files, {}: {}",
            text(told, "url"),
            text(told, "release"),
            number(told, "files"),
            bytes(number(told, "bytes")),
            if wrong.is_empty() {
                "all as it should be".into()
            } else {
                format!("{} things are wrong", wrong.len())
            },
        );
    }
    if wrong.is_empty() { ExitCode::SUCCESS } else { error::ENVIRONMENT.into() }
}
