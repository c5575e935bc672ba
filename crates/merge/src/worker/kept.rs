//! How much of each change came through: the report of a merge, and its refusals.

use std::fmt::Write;

use step::Failure;

use crate::sum::Squares;

#[derive(Default)]
pub struct Kept {
    rows: Vec<Row>,
}

struct Row {
    name: String,
    /// ‖Δ‖/‖W‖.
    relative: f64,
    /// 1 − ‖(W′ − W) − Δ‖/‖Δ‖: the share of the change that rounding left whole.
    kept: f64,
    /// Whether Δ is zero throughout: B has not moved from its start.
    zero: bool,
}

impl Kept {
    /// The sums over a weight's elements.
    pub fn push(&mut self, name: &str, [w, d, lost]: Squares) {
        let zero = d == 0.0;
        let kept = if zero { 1.0 } else { 1.0 - (lost / d).sqrt() };
        let relative = if w > 0.0 { (d / w).sqrt() } else { f64::INFINITY };
        self.rows.push(Row { name: name.into(), relative, kept, zero });
        self.rows.sort_by(|a, b| a.name.cmp(&b.name));
    }

    /// As metrics, by their names.
    pub fn figures(&self) -> [(&'static str, f64); 3] {
        [
            ("delta_norm", self.mean(|row| row.relative)),
            ("delta_kept", self.mean(|row| row.kept)),
            ("tensors_merged", self.rows.len() as f64),
        ]
    }

    fn mean(&self, of: impl Fn(&Row) -> f64) -> f64 {
        self.rows.iter().map(of).sum::<f64>() / self.rows.len() as f64
    }

    /// A merge that changes nothing is never what was meant.
    pub fn refuse_what_was_lost(&self) -> Result<(), Failure> {
        if self.rows.iter().all(|row| row.zero) {
            return Err(Failure::input("the adapters together change nothing")
                .hint("look at their weights: do two of them cancel out?"));
        }
        match self.rows.iter().find(|row| row.kept <= 0.0) {
            Some(row) => Err(Failure::input(format!(
                "`{}`: the adapter's change is too small to survive rounding (‖Δ‖/‖W‖ = {:.1e})",
                row.name, row.relative
            ))
            .hint("merge with dtype = \"float32\"")),
            None => Ok(()),
        }
    }

    /// What to say where an adapter adds nothing to a weight that it names.
    pub fn unchanged(&self) -> Option<String> {
        let mut zero = self.rows.iter().filter(|row| row.zero);
        let first = zero.next()?;
        Some(format!(
            "{} of {} tensors are the base's: the adapter adds nothing to `{}`",
            zero.count() + 1,
            self.rows.len(),
            first.name
        ))
    }

    pub fn summary(&self, dtype: &str) -> String {
        format!(
            "# Merge\n\n{} tensors changed; {:.1} % of the change survives rounding to {dtype}.\n\n",
            self.rows.len(),
            self.mean(|row| row.kept) * 100.0
        )
    }

    pub fn table(&self) -> String {
        let mut text =
            String::from("## Tensor by tensor\n\n| tensor | ‖Δ‖/‖W‖ | kept |\n|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {:.4} | {:.1} % |",
                row.name,
                row.relative,
                row.kept * 100.0
            );
        }
        text
    }
}
