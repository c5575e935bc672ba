//! `show`: what was built under a name.

use engine::{Engine, TargetId};
use serde_json::json;
use step::{ActionResult, Failure};

use crate::display::{self, Table};

pub fn run(engine: &Engine, target: &str, log: bool, json: bool) -> anyhow::Result<()> {
    let ids = engine.resolver().expand(&[target.to_string()])?;
    for id in &ids {
        one(engine, id, log, json)?;
    }
    Ok(())
}

/// What a target stands for now.
pub fn built(engine: &Engine, id: &TargetId) -> Result<ActionResult, Failure> {
    engine.last(id).ok_or_else(|| {
        Failure::input(format!("{id} was never built"))
            .hint(format!("run `cargo xtask build {id}`"))
    })
}

fn one(engine: &Engine, id: &TargetId, log: bool, json: bool) -> anyhow::Result<()> {
    let result = built(engine, id)?;
    let tree = engine.store().tree(result.output)?;
    if json {
        println!("{}", json!({"target": id, "result": result, "files": tree}));
        return Ok(());
    }
    let p = &result.provenance;
    println!("{id}  {}", result.step);
    println!("  action  {}", result.key);
    println!("  output  {}  {}", result.output, display::bytes(tree.size()));
    println!("  made    {} on {} ({})", display::when(p.started), p.host, p.device);
    println!(
        "  took    {} ({} cpu, {} memory)",
        display::seconds(p.wall_seconds),
        display::seconds(p.cpu_seconds),
        display::bytes(p.peak_memory)
    );
    let versions: Vec<String> = p.versions.iter().map(|(n, v)| format!("{n} {v}")).collect();
    if !versions.is_empty() {
        println!("  with    {}", versions.join(", "));
    }
    if let Some(from) = p.vouched_from {
        println!("  vouched for: it was made as action {}", from.short());
    }
    if let Some(commit) = &p.git_commit {
        println!("  commit  {commit}{}", if p.git_dirty { ", with changes" } else { "" });
    }
    if let Some(action) = engine.action(result.key) {
        for (name, digest) in &action.inputs {
            println!("  input   {name} = {}", digest.short());
        }
        println!("  params  {}", action.params);
    }
    println!();
    let mut files = Table::new(["file", "size", "blake3"]);
    for entry in tree.entries() {
        files.row([entry.path.clone(), display::bytes(entry.size), entry.digest.short()]);
    }
    print!("{files}");
    if !result.metrics.is_empty() {
        println!();
        let mut metrics = Table::new(["figure", "value"]);
        for (name, value) in &result.metrics {
            metrics.row([name.clone(), display::figure(*value)]);
        }
        print!("{metrics}");
    }
    let report = engine.store().tree(result.report)?;
    if let Some(entry) = report.entries().iter().find(|entry| entry.path == "report.md") {
        let text = engine.store().blob(entry.digest)?;
        println!("\n{}", summary(&String::from_utf8_lossy(&text)));
        println!("More of it in {}.report.", engine.link(id).display());
    }
    if log {
        println!("\n{}", String::from_utf8_lossy(&engine.store().blob(result.log)?));
    }
    Ok(())
}

/// A report up to its first section: what comes there is for those who look closer.
fn summary(report: &str) -> &str {
    report.split("\n## ").next().unwrap_or_default().trim_end()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_report_is_shown_up_to_its_first_section() {
        let report = "# Merge\n\n28 tensors.\n\n## Tensor by tensor\n| a |\n";
        assert_eq!(super::summary(report), "# Merge\n\n28 tensors.");
        assert_eq!(super::summary("all of it\n"), "all of it");
    }
}
