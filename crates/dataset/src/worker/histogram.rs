//! How long the rows are, as a picture: an SVG that stands alone, light or dark as the reader's page.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 260.0;
const BARS: usize = 40;
/// The plot's edges: left, right, top, bottom.
const FRAME: [f64; 4] = [56.0, 704.0, 40.0, 224.0];

/// The figure for rows of these many tokens each.
pub fn svg(lengths: &[usize]) -> String {
    let (least, most) =
        (lengths.iter().copied().min().unwrap_or(0), lengths.iter().copied().max().unwrap_or(0));
    let width = (most - least + 1).div_ceil(BARS);
    let mut bars = vec![0usize; (most - least + 1).div_ceil(width)];
    for length in lengths {
        bars[(length - least) / width] += 1;
    }
    let [left, right, top, bottom] = FRAME;
    let tallest = bars.iter().copied().max().unwrap_or(1).max(1) as f64;
    let step = (right - left) / bars.len() as f64;
    let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"Tokens of {} rows: {least} to {most}, {mean:.1} on average\">\n<style>\n\
         svg {{ color-scheme: light dark }}\n\
         rect {{ fill: light-dark(#2f6feb, #6ea8fe) }}\n\
         .paper {{ fill: light-dark(#fff, #0d1117) }}\n\
         text {{ font: 13px ui-sans-serif, system-ui, sans-serif; fill: light-dark(#59636e, #9198a1) }}\n\
         .title {{ font-weight: 600; fill: light-dark(#1f2328, #e6edf3) }}\n\
         line {{ stroke: light-dark(#d8dee4, #30363d) }}\n</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"8\"/>\n\
         <text class=\"title\" x=\"{left}\" y=\"24\">Tokens of a row</text>\n\
         <text x=\"{right}\" y=\"24\" text-anchor=\"end\">{} rows, {mean:.1} tokens on average</text>\n\
         <line x1=\"{left}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\n",
        lengths.len(),
        lengths.len(),
    );
    for (n, count) in bars.iter().enumerate() {
        let height = (bottom - top) * *count as f64 / tallest;
        let from = least + n * width;
        let range =
            if width == 1 { format!("{from}") } else { format!("{from}–{}", from + width - 1) };
        _ = writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"1.5\"><title>{range} tokens: {count} rows</title></rect>",
            left + n as f64 * step + 0.1 * step,
            bottom - height,
            0.8 * step,
        );
    }
    for (x, anchor, value) in [(left, "start", least), (right, "end", most)] {
        _ = writeln!(
            out,
            "<text x=\"{x}\" y=\"{}\" text-anchor=\"{anchor}\">{value}</text>",
            bottom + 20.0
        );
    }
    _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{tallest}</text>\n</svg>",
        left - 8.0,
        top + 6.0
    );
    out
}
