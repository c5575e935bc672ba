//! Pictures of a graph: text for a terminal, dot for Graphviz, mermaid for Markdown, a page.

mod html;

pub use html::page;

use std::fmt::Write;

use crate::plan::{Plan, Status};
use crate::resolve::{Graph, Origin};
use crate::target::TargetId;

/// A tree from the targets that nobody uses down to the files. A target that was shown before is
/// named again, not unfolded.
pub fn text(graph: &Graph, plan: &Plan) -> String {
    let used = |id: &TargetId| {
        graph.nodes.iter().flat_map(|n| &n.inputs).any(|i| i.from == Origin::Target(id.clone()))
    };
    let mut out = String::new();
    let mut shown = Vec::new();
    for node in graph.nodes.iter().filter(|n| !used(&n.id)) {
        branch(graph, plan, &node.id, "", "", &mut shown, &mut out);
    }
    out
}

fn branch(
    graph: &Graph,
    plan: &Plan,
    id: &TargetId,
    lead: &str,
    below: &str,
    shown: &mut Vec<TargetId>,
    out: &mut String,
) {
    let Some(node) = graph.get(id) else { return };
    let mark = match plan.get(id).map(|p| &p.status) {
        Some(Status::Cached(_)) => "●",
        Some(Status::Blocked(_)) => "✗",
        _ => "○",
    };
    let again = shown.contains(id);
    let more = if again && !node.inputs.is_empty() { " …" } else { "" };
    let _ = writeln!(out, "{lead}{mark} {id}  {}{more}", node.def.name);
    if again {
        return;
    }
    shown.push(id.clone());
    for (i, input) in node.inputs.iter().enumerate() {
        let last = i + 1 == node.inputs.len();
        let lead = format!("{below}{}", if last { "└─ " } else { "├─ " });
        let next = format!("{below}{}", if last { "   " } else { "│  " });
        match &input.from {
            Origin::Target(id) => branch(graph, plan, id, &lead, &next, shown, out),
            Origin::Path { shown: path, .. } => {
                let _ = writeln!(out, "{lead}{path}");
            }
        }
    }
}

/// Graphviz.
pub fn dot(graph: &Graph) -> String {
    let mut out = String::from("digraph anneal {\n  rankdir=LR;\n  node [shape=box];\n");
    for node in &graph.nodes {
        let _ = writeln!(out, "  \"{}\" [label=\"{}\\n{}\"];", node.id, node.id, node.def.name);
        for input in &node.inputs {
            let from = match &input.from {
                Origin::Target(id) => id.to_string(),
                Origin::Path { shown, .. } => shown.clone(),
            };
            let _ = writeln!(out, "  \"{from}\" -> \"{}\" [label=\"{}\"];", node.id, input.name);
        }
    }
    out.push_str("}\n");
    out
}

/// Mermaid, as GitHub draws it in Markdown.
pub fn mermaid(graph: &Graph) -> String {
    let mut out = String::from("flowchart LR\n");
    let name = |text: &str| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
    };
    for node in &graph.nodes {
        let id = node.id.to_string();
        let _ = writeln!(out, "  {}[\"{}<br/><small>{}</small>\"]", name(&id), id, node.def.name);
        for input in &node.inputs {
            match &input.from {
                Origin::Target(from) => {
                    let _ = writeln!(out, "  {} --> {}", name(&from.to_string()), name(&id));
                }
                Origin::Path { shown, .. } => {
                    let file = name(shown);
                    let _ = writeln!(out, "  {file}([\"{shown}\"]) --> {}", name(&id));
                }
            }
        }
    }
    out
}
