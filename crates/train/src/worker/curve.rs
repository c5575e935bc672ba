//! The loss over time as a picture: an SVG that stands alone, light or dark as the reader's page.
//!
//! Knows nothing of training beyond its records.

use std::fmt::Write;

use crate::fit::Record;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 440.0;
/// The plot's edges: left, right, top, bottom.
const FRAME: [f64; 4] = [64.0, 836.0, 48.0, 392.0];

const STYLE: &str = "\
svg { color-scheme: light dark; --ink: #1f2328; --soft: #8b949e; --line: #d8dee4; --paper: #fff; --train: #2f6feb; --held: #d1570a }
@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --soft: #8b949e; --line: #30363d; --paper: #0d1117; --train: #6ea8fe; --held: #ffa657 } }
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums }
.title { font-size: 15px; font-weight: 600; fill: var(--ink) }
.grid { stroke: var(--line); stroke-width: 1 }
path { fill: none; stroke-linejoin: round; stroke-linecap: round }
.raw { stroke: var(--train); stroke-width: 1; opacity: .28 }
.train { stroke: var(--train); stroke-width: 2.2 }
.held { stroke: var(--held); stroke-width: 1.6; stroke-dasharray: 5 4 }
.kept { stroke: var(--held); stroke-width: 1; stroke-dasharray: 1 4 }
circle { fill: var(--held); stroke: var(--paper); stroke-width: 1.5 }
.train-name { fill: var(--train) } .held-name { fill: var(--held) }";

/// Training loss of each step, the same smoothed, validation loss as points, and a line at the step
/// whose weights were kept, where it was chosen.
pub fn svg(records: &[Record], kept: Option<usize>) -> String {
    let train: Vec<_> = records.iter().map(|r| (r.step as f64, r.loss)).collect();
    let smooth = smoothed(&train);
    let held: Vec<_> =
        records.iter().filter_map(|r| Some((r.step as f64, r.validation_loss?))).collect();
    let scale = Scale::of(&train, &held);

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"Loss over {} steps\">\n<style>\n{STYLE}\n</style>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"8\" fill=\"var(--paper)\"/>\n",
        records.len()
    );
    axes(&mut out, &scale);
    legend(&mut out, smooth.last(), held.last());
    if let Some(point) = held.iter().find(|(step, _)| kept.is_some_and(|kept| kept as f64 == *step))
    {
        mark(&mut out, &scale, *point);
    }
    path(&mut out, "raw", &scale, &thinned(&train));
    path(&mut out, "train", &scale, &thinned(&smooth));
    path(&mut out, "held", &scale, &held);
    for point in &held {
        let (x, y) = scale.place(*point);
        _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>");
    }
    out.push_str("</svg>\n");
    out
}

/// Steps and losses → where they stand in the picture. The loss axis is logarithmic where losses
/// differ much, as they do from scratch.
struct Scale {
    steps: f64,
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    fn of(train: &[(f64, f64)], held: &[(f64, f64)]) -> Self {
        let losses = || train.iter().chain(held).map(|(_, loss)| *loss);
        let (low, high) = (losses().fold(f64::MAX, f64::min), losses().fold(f64::MIN, f64::max));
        // Losses of 0 happen: a task learned by heart.
        let low = low.max(high * 1e-4).max(1e-9);
        let high = high.max(low * 1.01);
        let log = high / low > 5.0;
        let steps = train.last().map_or(1.0, |(step, _)| *step).max(2.0);
        if log {
            Self { steps, low: low * 0.92, high: high * 1.08, log }
        } else {
            let room = (high - low) * 0.06;
            Self { steps, low: low - room, high: high + room, log }
        }
    }

    fn place(&self, (step, loss): (f64, f64)) -> (f64, f64) {
        let [left, right, top, bottom] = FRAME;
        let part = |low: f64, x: f64, high: f64| ((x - low) / (high - low)).clamp(0.0, 1.0);
        let up = match self.log {
            true => part(self.low.ln(), loss.max(1e-12).ln(), self.high.ln()),
            false => part(self.low, loss, self.high),
        };
        (left + part(1.0, step, self.steps) * (right - left), bottom - up * (bottom - top))
    }

    fn loss_ticks(&self) -> Vec<f64> {
        if !self.log {
            return ticks(self.low, self.high, 6.0);
        }
        let decades = (self.low.log10().floor() as i32)..=(self.high.log10().ceil() as i32);
        let wide = self.high / self.low > 1e3;
        let parts: &[f64] = if wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let all = decades.flat_map(|d| parts.iter().map(move |part| part * 10_f64.powi(d)));
        all.filter(|tick| (self.low..=self.high).contains(tick)).collect()
    }
}

fn axes(out: &mut String, scale: &Scale) {
    let [left, right, top, bottom] = FRAME;
    for tick in scale.loss_ticks() {
        let (_, y) = scale.place((1.0, tick));
        _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 10.0,
            y + 4.5,
            short(tick)
        );
    }
    for tick in ticks(1.0, scale.steps, 7.0) {
        let (x, _) = scale.place((tick, scale.low));
        _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 5.0,
            bottom + 22.0,
            short(tick)
        );
    }
    _ = writeln!(
        out,
        "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
         <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">optimiser steps</text>\
         <text class=\"title\" x=\"{left}\" y=\"{:.1}\">Loss{}</text>",
        bottom + 40.0,
        top - 20.0,
        if scale.log { " (log scale)" } else { "" }
    );
}

fn legend(out: &mut String, train: Option<&(f64, f64)>, held: Option<&(f64, f64)>) {
    let [_, right, top, _] = FRAME;
    let entries = [("held", "validation", held), ("train", "training", train)];
    let mut x = right;
    for (class, name, last) in entries {
        let Some((_, loss)) = last else { continue };
        let text = format!("{name} {loss:.4}");
        _ = writeln!(
            out,
            "<text class=\"{class}-name\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            top - 20.0
        );
        x -= 7.4 * text.len() as f64 + 20.0;
    }
}

fn mark(out: &mut String, scale: &Scale, (step, loss): (f64, f64)) {
    let [left, right, top, bottom] = FRAME;
    let (x, _) = scale.place((step, loss));
    let (at, anchor) = if x > (left + right) / 2.0 { (-6.0, "end") } else { (6.0, "start") };
    _ = writeln!(
        out,
        "<line class=\"kept\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
         <text class=\"held-name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">kept: step {step}, {loss:.4}</text>",
        x + at,
        top + 12.0
    );
}

fn path(out: &mut String, class: &str, scale: &Scale, points: &[(f64, f64)]) {
    if points.len() < 2 {
        return;
    }
    let places = points.iter().map(|point| scale.place(*point));
    let places: Vec<_> = places.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    _ = writeln!(out, "<path class=\"{class}\" d=\"M{}\"/>", places.join(" L"));
}

/// An exponential mean over about a fortieth of the run, its start not drawn towards 0.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 40.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |(step, loss): &(f64, f64)| {
        sum = keep * sum + loss;
        weight = keep * weight + 1.0;
        (*step, sum / weight)
    };
    points.iter().map(mean).collect()
}

/// At most some 800 points: more than the picture has pixels for.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(800).max(1);
    let last = points.last().filter(|_| points.len() % every != 1 && every > 1);
    points.iter().step_by(every).chain(last).copied().collect()
}

/// Round numbers between `low` and `high`, about `count` of them.
fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let rough = (high - low) / count;
    let decade = 10_f64.powf(rough.log10().floor());
    let sizes = [1.0, 2.0, 5.0, 10.0].map(|size| size * decade);
    let size = sizes.into_iter().find(|size| *size >= rough).unwrap_or(rough);
    let first = (low / size).ceil() as i64;
    let last = (high / size).floor() as i64;
    (first..=last).map(|n| n as f64 * size).collect()
}

fn short(x: f64) -> String {
    let text = format!("{x:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: usize, loss: f64, validation_loss: Option<f64>) -> Record {
        Record {
            step,
            loss,
            learning_rate: 0.0,
            grad_norm: 0.0,
            tokens: 0,
            tokens_per_second: 0.0,
            peak_memory: None,
            seconds_left: 0.0,
            validation_loss,
        }
    }

    #[test]
    fn every_point_lies_in_the_frame() {
        for records in [
            vec![record(1, 3.0, Some(2.0))],
            (1..=2000).map(|i| record(i, 7.0 / i as f64, (i % 200 == 0).then_some(0.1))).collect(),
            (1..=9).map(|i| record(i, 0.0, None)).collect(),
        ] {
            let kept = records.iter().find(|r| r.validation_loss.is_some()).map(|r| r.step);
            let picture = svg(&records, kept);
            assert_eq!(picture.contains("kept: step"), kept.is_some());
            assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
            let held = records.iter().filter(|r| r.validation_loss.is_some()).count();
            assert_eq!(picture.matches("<circle").count(), held);
            assert!(picture.len() < 64_000, "{} bytes", picture.len());
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        for (low, high, expected) in [
            (1.0, 555.0, vec![100.0, 200.0, 300.0, 400.0, 500.0]),
            (0.0, 1.0, vec![0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ] {
            let got: Vec<_> =
                ticks(low, high, 6.0).iter().map(|t| (t * 1e9).round() / 1e9).collect();
            assert_eq!(got, expected);
        }
    }
}
