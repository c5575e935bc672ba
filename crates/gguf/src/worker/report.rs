//! What an export tells people: where its bytes are, and what the model would weigh in other types.
//!
//! Knows nothing of values.

use std::collections::BTreeMap;
use std::fmt::Write;

use checkpoint::config::Config;
use checkpoint::names;
use gguf::export::Quant;

use crate::format::Type;
use crate::tensors::{self, Tensor};

/// The report of a file of so many bytes and bits a weight.
pub fn write(
    config: &Config,
    tensors: &[Tensor],
    (bytes, bits): (usize, f64),
    notes: &[String],
) -> String {
    let mut text = format!("# GGUF\n\n{bytes} bytes, {bits:.2} bits a weight.\n\n");
    for note in notes {
        _ = writeln!(text, "- {note}");
    }
    text += "\n| part | tensors | bytes | share |\n|---|---|---|---|\n";
    let all = weight(tensors);
    let mut parts: BTreeMap<Part, Vec<&Tensor>> = BTreeMap::new();
    for tensor in tensors {
        parts.entry(Part::of(tensor)).or_default().push(tensor);
    }
    for (part, of) in parts {
        let bytes: usize = of.iter().map(|t| t.info.bytes()).sum();
        let share = bytes as f64 / all as f64 * 100.0;
        _ = writeln!(text, "| {} | {} | {bytes} | {share:.1} % |", part.name(), of.len());
    }
    text += "\n| type | tensors | bytes |\n|---|---|---|\n";
    let mut kinds: BTreeMap<Type, (usize, usize)> = BTreeMap::new();
    for Tensor { info, .. } in tensors {
        let (count, bytes) = kinds.entry(info.kind).or_default();
        (*count, *bytes) = (*count + 1, *bytes + info.bytes());
    }
    for (kind, (count, bytes)) in kinds {
        _ = writeln!(text, "| {} | {count} | {bytes} |", kind.name());
    }
    text += "\nThe tensors would weigh\n\n| quant | bytes | bits a weight |\n|---|---|---|\n";
    for quant in Quant::ALL {
        let bytes = weight(&tensors::plan(config, quant));
        let bits = bytes as f64 * 8.0 / config.parameters() as f64;
        _ = writeln!(text, "| {} | {bytes} | {bits:.2} |", quant.name());
    }
    text += "\n## Tensor by tensor\n\n| tensor | shape | type |\n|---|---|---|\n";
    for Tensor { info, .. } in tensors {
        _ = writeln!(text, "| {} | {:?} | {} |", info.name, info.shape, info.kind.name());
    }
    text
}

fn weight(tensors: &[Tensor]) -> usize {
    tensors.iter().map(|t| t.info.bytes()).sum()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Vocabulary,
    Linear,
    Rest,
}

impl Part {
    fn of(tensor: &Tensor) -> Self {
        match tensor.source.as_str() {
            names::EMBED | names::LM_HEAD => Part::Vocabulary,
            name if names::is_linear(name) => Part::Linear,
            _ => Part::Rest,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Part::Vocabulary => "embedding and head",
            Part::Linear => "linear layers",
            Part::Rest => "norms and biases",
        }
    }
}
