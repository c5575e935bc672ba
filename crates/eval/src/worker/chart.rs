//! A picture that compares models: a bar for the figure, a bar for the size.
//!
//! Knows nothing of what the figure is.

use std::fmt::Write as _;

use step::Kind;

use crate::report::{kind, size};

pub struct Chart {
    pub title: String,
    pub subtitle: String,
    /// What the left bars show.
    pub figure: String,
    pub bars: Vec<Bar>,
    /// The value of a bar that fills the width.
    pub full: f64,
}

pub struct Bar {
    pub label: String,
    pub kind: Kind,
    pub value: f64,
    /// The value in words.
    pub shown: String,
    /// Where the true value lies with 95 % confidence, if that is known.
    pub interval: Option<(f64, f64)>,
    pub size: u64,
}

// Across, in pixels: labels, the figure's bars and their values, the sizes' bars and theirs.
const WIDTH: f64 = 860.0;
const LABEL_END: f64 = 150.0;
const FIGURE: f64 = 166.0;
const FIGURE_WIDTH: f64 = 330.0;
const SIZE: f64 = 600.0;
const SIZE_WIDTH: f64 = 170.0;
// Down: the heading, then a row for each model.
const TOP: f64 = 112.0;
const ROW: f64 = 38.0;
const BAR: f64 = 20.0;

const STYLE: &str = "
  text { font: 14px system-ui, 'Segoe UI', Roboto, sans-serif; fill: #24292f }
  .title { font-size: 20px; font-weight: 600 }
  .dim { fill: #6e7781; font-size: 13px }
  .value { font-weight: 600; font-variant-numeric: tabular-nums }
  .track { fill: #6e7781; opacity: .13 }
  .model { fill: #8c6bd1 } .onnx { fill: #2f7fd6 } .gguf { fill: #2b9d77 } .size { opacity: .55 }
  .interval { stroke: #24292f; stroke-width: 1.5; opacity: .6 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .dim { fill: #9198a1 } .interval { stroke: #e6edf3 }
  }
";

impl Chart {
    pub fn svg(&self) -> String {
        let height = TOP + ROW * self.bars.len() as f64 + 16.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             role=\"img\" aria-label=\"{}\">\n<style>{STYLE}</style>\n",
            escaped(&self.title)
        );
        text(&mut svg, "title", 24.0, 38.0, "start", &self.title);
        text(&mut svg, "dim", 24.0, 62.0, "start", &self.subtitle);
        text(&mut svg, "dim", FIGURE, TOP - 12.0, "start", &self.figure);
        text(&mut svg, "dim", SIZE, TOP - 12.0, "start", "size");
        let largest = self.bars.iter().map(|b| b.size).max().unwrap_or(1).max(1);
        for (n, bar) in self.bars.iter().enumerate() {
            let y = TOP + ROW * n as f64;
            let base = y + BAR - 5.0;
            let class = kind(bar.kind).to_lowercase();
            text(&mut svg, "", LABEL_END, base, "end", &bar.label);
            let share = (bar.value / self.full).clamp(0.0, 1.0);
            track(&mut svg, FIGURE, y, FIGURE_WIDTH, share, &class);
            if let Some((low, high)) = bar.interval {
                let x = |v: f64| FIGURE + FIGURE_WIDTH * (v / self.full).clamp(0.0, 1.0);
                let (low, high, middle) = (x(low), x(high), y + BAR / 2.0);
                let (top, bottom) = (middle - 4.0, middle + 4.0);
                let _ = writeln!(
                    svg,
                    "<path class=\"interval\" fill=\"none\" d=\"M{low:.1} {middle}H{high:.1}\
                     M{low:.1} {top}V{bottom}M{high:.1} {top}V{bottom}\"/>"
                );
            }
            text(&mut svg, "value", FIGURE + FIGURE_WIDTH + 10.0, base, "start", &bar.shown);
            let share = bar.size as f64 / largest as f64;
            track(&mut svg, SIZE, y, SIZE_WIDTH, share, &format!("{class} size"));
            text(&mut svg, "dim", SIZE + SIZE_WIDTH + 10.0, base, "start", &size(bar.size));
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, anchor: &str, content: &str) {
    let content = escaped(content);
    let _ = writeln!(
        svg,
        "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{content}</text>"
    );
}

/// A bar filled to `share` of its width.
fn track(svg: &mut String, x: f64, y: f64, width: f64, share: f64, class: &str) {
    let mut rect = |class: &str, width: f64| {
        let _ = writeln!(
            svg,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"4\"/>"
        );
    };
    rect("track", width);
    if share > 0.0 {
        // Even the least is seen.
        rect(class, (width * share).max(2.0));
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
