//! A graph as one page that needs nothing else: targets in columns, what they hang on to the left.

use std::collections::HashMap;
use std::fmt::Write;

use crate::plan::{Plan, Planned, Status};
use crate::resolve::{Graph, Node, Origin};

const WIDTH: usize = 208;
const HEIGHT: usize = 74;
/// Between two columns, and between two cards in one.
const GAP: (usize, usize) = (72, 26);
const MARGIN: usize = 24;

/// One page of HTML.
pub fn page(graph: &Graph, plan: &Plan) -> String {
    let places = places(graph);
    let columns = places.iter().map(|(column, _)| column + 1).max().unwrap_or(0);
    let rows = places.iter().map(|(_, row)| row + 1).max().unwrap_or(0);
    let (width, height) = (
        2 * MARGIN + columns * (WIDTH + GAP.0) - GAP.0.min(columns * GAP.0),
        2 * MARGIN + rows * (HEIGHT + GAP.1) - GAP.1.min(rows * GAP.1),
    );
    let corner = |(column, row): (usize, usize)| {
        (MARGIN + column * (WIDTH + GAP.0), MARGIN + row * (HEIGHT + GAP.1))
    };
    let place_of: HashMap<_, _> = graph.nodes.iter().map(|n| &n.id).zip(&places).collect();

    let mut edges = String::new();
    let mut cards = String::new();
    for (node, place) in graph.nodes.iter().zip(&places) {
        let (x, y) = corner(*place);
        for id in node.targets() {
            let Some(from) = place_of.get(id) else { continue };
            let (from_x, from_y) = corner(**from);
            let (x1, y1) = (from_x + WIDTH, from_y + HEIGHT / 2);
            let (x2, y2) = (x, y + HEIGHT / 2);
            let bend = (x2 - x1.min(x2)).max(GAP.0) / 2;
            let _ = writeln!(
                edges,
                "<path d=\"M{x1} {y1} C{} {y1} {} {y2} {x2} {y2}\" data-from=\"{}\" data-to=\"{}\"/>",
                x1 + bend,
                x2 - bend.min(x2),
                escape(&id.to_string()),
                escape(&node.id.to_string()),
            );
        }
        card(node, plan.get(&node.id), x, y, &mut cards);
    }
    let title = graph.wanted.iter().next().map(|id| id.recipe.clone()).unwrap_or_default();
    include_str!("page.html")
        .replace("{title}", &escape(&title))
        .replace("{width}", &width.to_string())
        .replace("{height}", &height.to_string())
        .replace("{summary}", &summary(plan))
        .replace("{edges}", &edges)
        .replace("{cards}", &cards)
}

fn card(node: &Node, planned: Option<&Planned>, x: usize, y: usize, out: &mut String) {
    let (class, status) = match planned.map(|p| &p.status) {
        Some(Status::Cached(_)) => ("cached", "made".to_string()),
        Some(Status::Stale(stale)) => ("stale", stale.to_string()),
        Some(Status::Blocked(blocked)) => ("blocked", blocked.to_string()),
        None => ("stale", String::new()),
    };
    let last = planned.and_then(|p| p.last.as_ref());
    let cost = last.map(|r| format!("{:.1} s", r.provenance.wall_seconds)).unwrap_or_default();
    let mut tip = format!("{}\n{}\n{status}", node.id, node.def.about);
    for input in &node.inputs {
        if let Origin::Path { shown, .. } = &input.from {
            let _ = write!(tip, "\nreads {shown}");
        }
    }
    if let Some(last) = last {
        for (name, value) in last.metrics.iter().take(12) {
            let _ = write!(tip, "\n{name} = {value}");
        }
    }
    let _ = writeln!(
        out,
        "<g class=\"{class}\" data-id=\"{id}\" transform=\"translate({x} {y})\" tabindex=\"0\"><title>{tip}</title>\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"10\"/><circle cx=\"18\" cy=\"22\" r=\"5\"/>\
         <text class=\"name\" x=\"32\" y=\"27\">{name}</text><text x=\"32\" y=\"45\">{step}</text>\
         <text class=\"small\" x=\"32\" y=\"62\">{what}</text><text class=\"small cost\" x=\"{right}\" y=\"27\">{cost}</text></g>",
        id = escape(&node.id.to_string()),
        tip = escape(&tip),
        name = escape(&shortened(&node.id.target, 14)),
        step = escape(node.def.name),
        what = escape(&shortened(&status, 26)),
        right = WIDTH - 12,
    );
}

fn summary(plan: &Plan) -> String {
    let count = |of: fn(&Status) -> bool| plan.targets.iter().filter(|t| of(&t.status)).count();
    let made = count(|s| matches!(s, Status::Cached(_)));
    let stale = count(|s| matches!(s, Status::Stale(_)));
    let blocked = count(|s| matches!(s, Status::Blocked(_)));
    format!("{made} made · {stale} stale · {blocked} blocked")
}

/// Column and row of each node: to the right of all that it hangs on, near the middle of them.
fn places(graph: &Graph) -> Vec<(usize, usize)> {
    let index: HashMap<_, _> = graph.nodes.iter().map(|n| &n.id).zip(0..).collect();
    let inputs: Vec<Vec<usize>> = graph
        .nodes
        .iter()
        .map(|node| node.targets().filter_map(|id| index.get(id).copied()).collect())
        .collect();
    let mut column = vec![0; graph.nodes.len()];
    for place in 0..graph.nodes.len() {
        column[place] = inputs[place].iter().map(|i| column[*i] + 1).max().unwrap_or(0);
    }
    let mut row = vec![0; graph.nodes.len()];
    for at in 0..=column.iter().copied().max().unwrap_or(0) {
        let mut here: Vec<usize> = (0..graph.nodes.len()).filter(|i| column[*i] == at).collect();
        // Twice the row that is the middle of its inputs': twice, to keep the halves.
        let middle: HashMap<usize, usize> = here
            .iter()
            .map(|place| {
                let rows = inputs[*place].iter().map(|i| 2 * row[*i]);
                (*place, rows.clone().sum::<usize>().checked_div(rows.count()).unwrap_or(0))
            })
            .collect();
        here.sort_by_key(|place| (middle[place], *place));
        let mut free = 0;
        for place in here {
            row[place] = free.max(middle[&place] / 2);
            free = row[place] + 1;
        }
    }
    column.into_iter().zip(row).collect()
}

fn shortened(text: &str, most: usize) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.chars().count() {
        n if n <= most => line.to_string(),
        _ => line.chars().take(most - 1).chain(['…']).collect(),
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}
