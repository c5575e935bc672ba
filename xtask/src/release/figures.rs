//! How large and how good each artifact of a release is, beside those of an earlier one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use step::{Failure, Kind, TreeDigest};

use super::Made;
use crate::display;

/// `release.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    format: u32,
    commit: Option<String>,
    /// What was asked for, models and measurements; inputs before what uses them.
    targets: Vec<Figure>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Figure {
    target: String,
    kind: Kind,
    output: TreeDigest,
    bytes: u64,
    metrics: BTreeMap<String, f64>,
}

impl Figures {
    const FORMAT: u32 = 1;

    pub fn of(made: &[Made]) -> Self {
        let told = |made: &&Made| {
            let kinds = [Kind::Model, Kind::Adapter, Kind::OnnxModel, Kind::GgufModel];
            made.wanted || made.kind == Kind::Metrics || kinds.contains(&made.kind)
        };
        let figure = |made: &Made| Figure {
            target: made.id.to_string(),
            kind: made.kind,
            output: made.result.output,
            bytes: made.size(),
            metrics: made.result.metrics.clone(),
        };
        let last = made.iter().rfind(|made| made.wanted);
        Self {
            format: Self::FORMAT,
            commit: last.and_then(|made| made.result.provenance.git_commit.clone()),
            targets: made.iter().filter(told).map(figure).collect(),
        }
    }

    fn get(&self, target: &str) -> Option<&Figure> {
        self.targets.iter().find(|figure| figure.target == target)
    }

    /// Of an earlier release.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |what: String| {
            Failure::input(format!("{}: {what}", path.display()))
                .hint("it is the release.json that `cargo xtask release` wrote for a release")
        };
        let text = fs::read(path).map_err(|e| wrong(e.to_string()))?;
        let figures: Self = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        match figures.format {
            Self::FORMAT => Ok(figures),
            other => Err(wrong(format!("format {other}, where {} is read", Self::FORMAT))),
        }
    }

    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self).expect("figures serialise to JSON");
        format!("{text}\n")
    }

    /// Two tables in GitHub's Markdown: sizes, then figures; each beside those before, if there are.
    pub fn to_markdown(&self, before: Option<&Self>) -> String {
        let mut text = String::from("## Artifacts\n\n");
        let head = if before.is_some() { ["before", "change"] } else { ["", ""] };
        markdown(&mut text, ["artifact", "size", head[0], head[1]], self.sizes(before));
        let figures = self.metrics(before);
        if !figures.is_empty() {
            text.push_str("\n## Figures\n\n");
            markdown(&mut text, ["figure", "now", head[0], head[1]], figures);
        }
        text
    }

    /// For a terminal: sizes, and the figures that have changed.
    pub fn to_table(&self, before: Option<&Self>) -> String {
        if before.is_none() {
            let mut table = display::Table::new(["artifact", "size"]);
            self.sizes(None).into_iter().for_each(|[name, size, ..]| table.row([name, size]));
            return table.to_string();
        }
        let mut table = display::Table::new(["", "now", "before", "change"]);
        self.sizes(before).into_iter().for_each(|row| table.row(row));
        let changed = |row: &[String; 4]| !row[2].is_empty() && row[3] != SAME;
        self.metrics(before).into_iter().filter(changed).for_each(|row| table.row(row));
        table.to_string()
    }

    fn sizes(&self, before: Option<&Self>) -> Vec<[String; 4]> {
        let mut rows = Vec::new();
        for now in &self.targets {
            let was = before.and_then(|before| before.get(&now.target));
            let change = match was {
                None => String::new(),
                Some(was) if was.output == now.output => SAME.into(),
                Some(was) if was.bytes == now.bytes => "other bytes".into(),
                Some(was) => percent(was.bytes as f64, now.bytes as f64),
            };
            let size = was.map_or(String::new(), |was| display::bytes(was.bytes));
            rows.push([now.target.clone(), display::bytes(now.bytes), size, change]);
        }
        for was in before.into_iter().flat_map(|before| &before.targets) {
            if self.get(&was.target).is_none() {
                let size = display::bytes(was.bytes);
                rows.push([was.target.clone(), String::new(), size, "gone".into()]);
            }
        }
        rows
    }

    fn metrics(&self, before: Option<&Self>) -> Vec<[String; 4]> {
        let mut rows = Vec::new();
        for now in &self.targets {
            let was = before.and_then(|before| before.get(&now.target));
            for (metric, value) in &now.metrics {
                let was = was.and_then(|was| was.metrics.get(metric).copied());
                let change = match was {
                    None => String::new(),
                    Some(was) if was == *value => SAME.into(),
                    Some(was) => format!("{:+.4}", value - was),
                };
                let was = was.map_or(String::new(), display::figure);
                let name = format!("{}: {metric}", now.target);
                rows.push([name, display::figure(*value), was, change]);
            }
        }
        rows
    }
}

const SAME: &str = "same";

fn percent(before: f64, now: f64) -> String {
    format!("{:+.1} %", (now / before - 1.0) * 100.0)
}

/// Columns that are empty in every row are left out.
fn markdown(text: &mut String, head: [&str; 4], rows: Vec<[String; 4]>) {
    let kept: Vec<usize> = (0..4).filter(|i| !head[*i].is_empty()).collect();
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    text.push_str(&line(kept.iter().map(|i| head[*i]).collect()));
    text.push_str(&line(kept.iter().map(|i| if *i == 0 { "---" } else { "---:" }).collect()));
    for row in &rows {
        _ = write!(text, "{}", line(kept.iter().map(|i| row[*i].as_str()).collect()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(targets: &[(&str, &str, u64, f64)]) -> Figures {
        let figure = |(name, content, bytes, loss): &(&str, &str, u64, f64)| {
            let output = TreeDigest::of(content.as_bytes());
            let metrics = BTreeMap::from([("loss".to_string(), *loss)]);
            Figure { target: name.to_string(), kind: Kind::Model, output, bytes: *bytes, metrics }
        };
        Figures { format: 1, commit: None, targets: targets.iter().map(figure).collect() }
    }

    #[test]
    fn a_release_is_told_beside_the_one_before() {
        let before =
            figures(&[("d/a", "1", 1000, 0.5), ("d/b", "1", 2000, 0.25), ("d/c", "1", 1, 0.0)]);
        let now =
            figures(&[("d/a", "2", 1500, 0.25), ("d/b", "1", 2000, 0.25), ("d/e", "1", 7, 1.0)]);
        assert_eq!(
            now.to_markdown(Some(&before)),
            "## Artifacts\n\n\
             | artifact | size | before | change |\n| --- | ---: | ---: | ---: |\n\
             | d/a | 1.5 kB | 1.0 kB | +50.0 % |\n\
             | d/b | 2.0 kB | 2.0 kB | same |\n\
             | d/e | 7 B |  |  |\n\
             | d/c |  | 1 B | gone |\n\
             \n## Figures\n\n\
             | figure | now | before | change |\n| --- | ---: | ---: | ---: |\n\
             | d/a: loss | 0.2500 | 0.5000 | -0.2500 |\n\
             | d/b: loss | 0.2500 | 0.2500 | same |\n\
             | d/e: loss | 1 |  |  |\n"
        );
        let first = figures(&[("d/a", "1", 1000, 0.5)]);
        assert_eq!(
            first.to_markdown(None),
            "## Artifacts\n\n| artifact | size |\n| --- | ---: |\n| d/a | 1.0 kB |\n\
             \n## Figures\n\n| figure | now |\n| --- | ---: |\n| d/a: loss | 0.5000 |\n"
        );
    }

    #[test]
    fn figures_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(publish::FIGURES);
        let written = figures(&[("d/a", "1", 1000, 0.1)]);
        fs::write(&path, written.to_json()).unwrap();
        assert_eq!(Figures::read(&path).unwrap(), written);
        fs::write(&path, "{\"format\": 2, \"commit\": null, \"targets\": []}").unwrap();
        let refused = Figures::read(&path).unwrap_err();
        assert!(refused.message.ends_with("format 2, where 1 is read"), "{refused:?}");
    }
}
