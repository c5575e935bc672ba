//! How a build looks: a live line for each running step, plain lines where nobody watches, JSON
//! lines for scripts, one table at the end.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant, UNIX_EPOCH};

use engine::{Engine, Event, Graph, Outcome};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use step::worker::Progress;

enum Mode {
    Json,
    /// Somebody watches: a line that moves for each running step, and one for all else.
    Live(MultiProgress),
    /// A log file or CI: a line now and then.
    Plain {
        last: Instant,
    },
}

pub struct Display {
    mode: Mode,
    /// Widest target name, so that columns stand.
    width: usize,
    /// What moves now, by who it is: a target, a family being compiled, a tool.
    moving: BTreeMap<String, Moving>,
    compiled: usize,
    /// Bytes that came from the shared cache.
    fetched: u64,
}

struct Moving {
    /// Where somebody watches.
    bar: Option<ProgressBar>,
    losses: VecDeque<f64>,
    started: Instant,
}

impl Display {
    pub fn new(json: bool, graph: &Graph) -> Self {
        let mode = if json {
            Mode::Json
        } else if std::io::stderr().is_terminal() {
            Mode::Live(MultiProgress::new())
        } else {
            Mode::Plain { last: Instant::now() }
        };
        let width = graph.nodes.iter().map(|n| n.id.to_string().chars().count()).max();
        Self { mode, width: width.unwrap_or(0), moving: BTreeMap::new(), compiled: 0, fetched: 0 }
    }

    pub fn event(&mut self, event: &Event) {
        if let Mode::Json = self.mode {
            if let Some(line) = to_json(event) {
                println!("{line}");
            }
            return;
        }
        match event {
            Event::Tool { tool, text } => self.moving(tool, text),
            Event::Compiling { family, line } => {
                let line = line.trim();
                if line.starts_with("Compiling") || line.starts_with("Building") {
                    self.compiled += 1;
                    let text = format!("compiling the worker ({}): {line}", self.compiled);
                    self.moving(family, &text);
                }
            }
            Event::Compiled { family, wall } => {
                self.still(family);
                if wall.as_secs() >= 2 {
                    self.line(
                        family,
                        &format!("worker compiled in {}", seconds(wall.as_secs_f64())),
                    );
                }
                self.compiled = 0;
            }
            Event::Cached { .. } => {}
            Event::Waiting { target, holder } => {
                let text = format!("waits for {}, which makes the same", holder_name(holder));
                self.moving(&target.to_string(), &text);
            }
            Event::Held { target, holder } => {
                self.line(
                    &target.to_string(),
                    &format!("waits for {holder}, which makes the same"),
                );
                self.moving(&target.to_string(), "waits");
            }
            Event::Fetched { target, transferred, .. } => {
                let who = target.to_string();
                self.still(&who);
                self.fetched += transferred;
                self.line(&who, &format!("fetched, {}", bytes(*transferred)));
            }
            Event::Shared { target, transferred, shared, .. } => {
                let who = target.to_string();
                self.still(&who);
                let shared = match shared {
                    0 => String::new(),
                    there => format!(", {} were there", bytes(*there)),
                };
                self.line(&who, &format!("shared, {}{shared}", bytes(*transferred)));
            }
            Event::Warning { failure } => {
                self.line("warning:", &failure.message);
                failure.hint.iter().for_each(|hint| self.line("", &format!("hint: {hint}")));
            }
            Event::Started { target, reason, .. } => {
                self.line(&target.to_string(), &reason.to_string());
                self.moving(&target.to_string(), "");
            }
            Event::Progress { target, progress } => {
                let who = target.to_string();
                let moving = self.start(&who);
                if let Some(loss) = progress.values.get("loss") {
                    moving.losses.push_back(*loss);
                    while moving.losses.len() > 24 {
                        moving.losses.pop_front();
                    }
                }
                let text = moving.text(progress);
                self.moving(&who, &text);
            }
            Event::Note { target, text } => self.line(&target.to_string(), text),
            Event::Finished { target, result, size } => {
                let who = target.to_string();
                self.still(&who);
                let wall = seconds(result.provenance.wall_seconds);
                self.line(&who, &format!("made in {wall}, {}", bytes(*size)));
            }
            Event::Failed { target, failure } => {
                let who = target.to_string();
                self.still(&who);
                self.line(&who, &format!("FAILED: {}", failure.message));
            }
        }
    }

    /// Takes away what moves.
    pub fn clear(&mut self) {
        for moving in std::mem::take(&mut self.moving).into_values() {
            moving.bar.into_iter().for_each(|bar| bar.finish_and_clear());
        }
    }

    /// What came of a build, beside which so many targets were known to be made.
    pub fn summary(&mut self, engine: &Engine, outcome: &Outcome, resting: usize) {
        self.clear();
        let Outcome { built, failed, lost } = outcome;
        let ran = built.iter().filter(|b| b.ran).count();
        let fetched = built.iter().filter(|b| b.fetched.is_some()).count();
        if let Mode::Json = self.mode {
            let cached = built.len() - ran - fetched;
            let (failed, lost) = (failed.len(), lost.len());
            let done = json!({"event": "done", "made": ran, "fetched": fetched, "cached": cached, "failed": failed, "lost": lost});
            println!("{done}");
            return;
        }
        if ran == 0 && fetched == 0 && failed.is_empty() {
            println!("{}", up_to_date(built.len() + resting));
            return;
        }
        // Of many targets, only those that something happened to.
        const MANY: usize = 40;
        let mut table = Table::new(["target", "", "time", "cpu", "size", "figures"]);
        for one in
            built.iter().filter(|one| one.ran || one.fetched.is_some() || built.len() <= MANY)
        {
            let Some(result) = engine.result(one.key) else { continue };
            let p = &result.provenance;
            let (state, wall, cpu) = if one.ran {
                ("made", seconds(p.wall_seconds), seconds(p.cpu_seconds))
            } else {
                let state = if one.fetched.is_some() { "fetched" } else { "cached" };
                (state, String::new(), String::new())
            };
            table.row([
                one.id.to_string(),
                state.into(),
                wall,
                cpu,
                engine.store().tree(one.output).map_or(String::new(), |tree| bytes(tree.size())),
                figures(&result.metrics),
            ]);
        }
        let stopped = engine.running().is_stopped();
        let failures =
            failed.iter().map(|(id, _)| (id, if stopped { "stopped" } else { "FAILED" }));
        for (id, state) in failures.chain(lost.iter().map(|id| (id, "not made"))) {
            table.row([id.to_string().as_str(), state, "", "", "", ""].map(String::from));
        }
        print!("{table}");
        if !failed.is_empty() {
            return;
        }
        if let Some(last) = built.last() {
            let link = engine.link(&last.id);
            let link = link.strip_prefix(engine.root()).unwrap_or(&link);
            let fetched_too = match fetched {
                0 => String::new(),
                n => format!("{n} fetched ({}), ", bytes(self.fetched)),
            };
            println!(
                "\n{} made, {fetched_too}{} cached; {} is in {}",
                ran,
                built.len() + resting - ran - fetched,
                last.id,
                link.display()
            );
            if engine.result(last.key).is_some_and(|result| result.kind == step::Kind::Site) {
                println!("look at it: cargo xtask serve {}", last.id);
            }
        }
    }

    /// What moves under this name, from now on if it did not.
    fn start(&mut self, who: &str) -> &mut Moving {
        let mode = &self.mode;
        self.moving.entry(who.to_string()).or_insert_with(|| {
            let bar = match mode {
                Mode::Live(all) => {
                    let bar = all.add(ProgressBar::new_spinner());
                    bar.set_style(style("{spinner:.cyan} {prefix} {wide_msg}"));
                    bar.enable_steady_tick(Duration::from_millis(120));
                    Some(bar)
                }
                _ => None,
            };
            Moving { bar, losses: VecDeque::new(), started: Instant::now() }
        })
    }

    fn still(&mut self, who: &str) {
        let bar = self.moving.remove(who).and_then(|moving| moving.bar);
        bar.into_iter().for_each(|bar| bar.finish_and_clear());
    }

    /// A line that the next one of the same name replaces.
    fn moving(&mut self, who: &str, text: &str) {
        let width = self.width;
        if let Some(bar) = &self.start(who).bar {
            bar.set_prefix(format!("{who:width$}"));
            bar.set_message(text.to_string());
        }
        if let Mode::Plain { last } = &mut self.mode
            && last.elapsed() > Duration::from_secs(15)
        {
            *last = Instant::now();
            eprintln!("{who:width$}  {text}");
        }
    }

    /// A line that stays.
    fn line(&mut self, who: &str, text: &str) {
        let width = self.width;
        for (i, part) in text.lines().enumerate() {
            let who = if i == 0 { who } else { "" };
            let line = format!("{who:width$}  {part}");
            match &mut self.mode {
                // A terminal that is gone is no reason to stop.
                Mode::Live(all) => _ = all.println(format!("  {line}")),
                Mode::Plain { last } => {
                    *last = Instant::now();
                    eprintln!("{line}");
                }
                Mode::Json => {}
            }
        }
    }
}

impl Moving {
    /// How far it is.
    fn text(&self, p: &Progress) -> String {
        let mut parts = vec![p.phase.clone()];
        let show = |n: u64| if p.unit == "bytes" { bytes(n) } else { n.to_string() };
        if p.total > 0 {
            let share = p.done as f64 / p.total as f64;
            parts.push(format!("{}{:>4.0} %", meter(share, 20), share * 100.0));
            let unit = if p.unit == "bytes" { "" } else { p.unit.as_str() };
            parts.push(format!("{}/{} {unit}", show(p.done), show(p.total)).trim_end().to_string());
            let gone = self.started.elapsed().as_secs_f64();
            if share > 0.02 && share < 1.0 && gone > 2.0 {
                // Who goes on from a checkpoint knows better.
                let left = p.values.get("seconds_left").copied();
                parts.push(format!("{} left", seconds(left.unwrap_or(gone / share - gone))));
            }
        } else if p.done > 0 {
            parts.push(format!("{} {}", show(p.done), p.unit));
        }
        // What says most first: a narrow terminal cuts the end off.
        const FIRST: [&str; 5] = ["loss", "tokens/s", "learning_rate", "grad_norm", "peak_memory"];
        let place = |name: &str| FIRST.iter().position(|first| *first == name);
        let mut values: Vec<_> =
            p.values.iter().filter(|(name, _)| *name != "seconds_left").collect();
        values.sort_by_key(|(name, _)| place(name).unwrap_or(FIRST.len()));
        parts.extend(values.into_iter().map(|(name, value)| match name.as_str() {
            "loss" => format!("loss {value:.3} {}", sparkline(&self.losses)),
            "tokens/s" => format!("{value:.0} tokens/s"),
            "learning_rate" => format!("rate {value:.1e}"),
            "grad_norm" => format!("gradient {value:.2}"),
            "peak_memory" => bytes(*value as u64),
            other => format!("{other} {value:.3}"),
        }));
        parts.join("  ")
    }
}

fn to_json(event: &Event) -> Option<serde_json::Value> {
    Some(match event {
        Event::Tool { tool, text } => json!({"event": "tool", "tool": tool, "text": text}),
        Event::Compiling { .. } => return None,
        Event::Compiled { family, wall } => {
            json!({"event": "compiled", "family": family, "wall_seconds": wall.as_secs_f64()})
        }
        Event::Cached { target, key, output } => {
            json!({"event": "cached", "target": target, "key": key, "output": output})
        }
        Event::Waiting { target, holder } => {
            json!({"event": "waiting", "target": target, "holder": holder_name(holder)})
        }
        Event::Held { target, holder } => {
            json!({"event": "held", "target": target, "holder": holder})
        }
        Event::Fetched { target, key, output, transferred } => json!({
            "event": "fetched", "target": target, "key": key, "output": output,
            "transferred": transferred,
        }),
        Event::Shared { target, key, transferred, shared } => json!({
            "event": "shared", "target": target, "key": key, "transferred": transferred,
            "shared": shared,
        }),
        Event::Warning { failure } => json!({"event": "warning", "failure": failure}),
        Event::Started { target, key, reason } => {
            json!({"event": "started", "target": target, "key": key, "reason": reason})
        }
        Event::Progress { target, progress } => {
            json!({"event": "progress", "target": target, "progress": progress})
        }
        Event::Note { target, text } => json!({"event": "note", "target": target, "text": text}),
        Event::Finished { target, result, size } => json!({
            "event": "finished", "target": target, "key": result.key, "output": result.output,
            "bytes": size, "wall_seconds": result.provenance.wall_seconds,
            "cpu_seconds": result.provenance.cpu_seconds, "metrics": result.metrics,
        }),
        Event::Failed { target, failure } => {
            json!({"event": "failed", "target": target, "failure": failure})
        }
    })
}

fn holder_name(holder: &store::Holder) -> String {
    let pid = holder.pid.map_or("another process".to_string(), |pid| format!("process {pid}"));
    match &holder.host {
        Some(host) => format!("{pid} on {host}"),
        None => pid,
    }
}

pub fn up_to_date(targets: usize) -> String {
    format!("up to date: {targets} targets")
}

/// A bar over bytes, hidden for scripts.
pub fn byte_bar(json: bool, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    bar.set_style(style("{prefix} {wide_bar:.cyan} {bytes}/{total_bytes} {bytes_per_sec} {eta}"));
    bar.set_prefix(what.to_string());
    if json || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("templates are constants")
}

/// The figures that say most, at most three.
fn figures(metrics: &BTreeMap<String, f64>) -> String {
    let all: Vec<String> =
        metrics.iter().map(|(name, value)| format!("{name} {}", figure(*value))).collect();
    match all.len() {
        0..=3 => all.join(", "),
        n => format!("{}, … {} more", all[..2].join(", "), n - 2),
    }
}

pub fn figure(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        format!("{value:.0}")
    } else {
        format!("{value:.4}")
    }
}

/// `▕████▏`: a share of 1 as a bar of `width` cells.
fn meter(share: f64, width: usize) -> String {
    let full = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
    format!("{}{}", "━".repeat(full), "─".repeat(width - full))
}

fn sparkline(values: &VecDeque<f64>) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = (high - low).max(1e-9);
    values.iter().map(|v| LEVELS[(((v - low) / span) * 7.0).round() as usize]).collect()
}

/// `3.2 s`, `4 min 10 s`, `2 h 5 min`.
pub fn seconds(s: f64) -> String {
    match s {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 60.0 => format!("{s:.0} s"),
        s if s < 3600.0 => format!("{} min {:02} s", s as u64 / 60, s as u64 % 60),
        s => format!("{} h {:02} min", s as u64 / 3600, s as u64 % 3600 / 60),
    }
}

/// Seconds since 1970 as `2026-11-20T19:30:00Z`.
pub fn when(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

/// Bytes in decimal units, as disks and networks count.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A plain table: columns as wide as what is in them, two spaces between, a rule below the head.
pub struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub fn new(head: [&str; N]) -> Self {
        Self { rows: vec![head.map(str::to_string)] }
    }

    pub fn row(&mut self, row: [String; N]) {
        self.rows.push(row);
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |i: usize| self.rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        for (n, row) in self.rows.iter().enumerate() {
            let cells = row.iter().zip(widths).map(|(cell, w)| format!("{cell:w$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            writeln!(f, "{}", line.trim_end())?;
            if n == 0 {
                let total = widths.iter().sum::<usize>() + 2 * (N - 1);
                writeln!(f, "{}", "─".repeat(total))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_tells_what_says_most_first() {
        let values = [
            ("grad_norm", 0.517),
            ("learning_rate", 2.5e-4),
            ("loss", 1.25),
            ("peak_memory", 2.5e9),
            ("seconds_left", 250.0),
            ("tokens/s", 1234.4),
        ];
        let progress = Progress {
            phase: "train".into(),
            done: 30,
            total: 60,
            unit: "steps".into(),
            values: values.map(|(name, value)| (name.into(), value)).into(),
        };
        let started = Instant::now() - Duration::from_secs(9);
        let moving = Moving { bar: None, losses: VecDeque::from([2.0, 1.25]), started };
        assert_eq!(
            moving.text(&progress),
            "train  ━━━━━━━━━━──────────  50 %  30/60 steps  4 min 10 s left  loss 1.250 █▁  \
             1234 tokens/s  rate 2.5e-4  gradient 0.52  2.5 GB"
        );
    }

    #[test]
    fn units_people_read() {
        for (n, text) in [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (530_604_548, "530.6 MB")]
        {
            assert_eq!(bytes(n), text);
        }
        for (s, text) in
            [(0.04, "0.0 s"), (42.4, "42 s"), (250.0, "4 min 10 s"), (7500.0, "2 h 05 min")]
        {
            assert_eq!(seconds(s), text);
        }
    }
}
