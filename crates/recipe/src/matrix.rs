//! `[adapter.matrix]`: one table that stands for several, one for each combination of values.
//!
//! Knows nothing of what the keys mean.

use serde_json::Value;

use crate::parse::{NAME_RULE, check_name};
use crate::{Diagnostic, Entry, Source, Span, Spanned, Table};

/// More of them were meant by nobody.
const MOST: usize = 200;

/// The tables that `table` stands for: itself, unless it has a matrix. `adapter` with
/// `rank = [8, 16]` becomes `adapter-rank-8` and `adapter-rank-16`.
pub(crate) fn expand(
    mut table: Table,
    source: &std::sync::Arc<Source>,
) -> Result<Vec<Table>, Diagnostic> {
    let Some(at) = table.entries.iter().position(|e| e.key.value == "matrix") else {
        return Ok(vec![table]);
    };
    let matrix = table.entries.remove(at);
    let error = |span: Span, message: String| Diagnostic::at(source, span, message);
    let Value::Object(axes) = &matrix.value.value else {
        return Err(error(matrix.value.span, "`matrix` is a table of lists".into())
            .help("for example `matrix = { rank = [8, 16, 32] }`"));
    };
    let mut variants = vec![Table { matrix: Some(table.name.clone()), ..table.clone() }];
    for (key, values) in axes {
        let span = matrix.span_of(&[key]);
        if let Some(twin) = table.entries.iter().find(|e| e.key.value == *key) {
            let message = format!("`{key}` stands in the table and in its matrix");
            return Err(error(twin.key.span.clone(), message).help("take one of them away"));
        }
        let values = match values {
            Value::Array(values) if !values.is_empty() => values,
            _ => {
                return Err(error(span, format!("`{key}` takes a list of values in a matrix"))
                    .help(format!("one value alone belongs into the table: `{key} = …`")));
            }
        };
        if variants.len() * values.len() > MOST {
            let message = format!("the matrix stands for more than {MOST} targets");
            return Err(error(matrix.value.span, message).help("split it into several tables"));
        }
        let with = |variant: &Table, i: usize, value: &Value| {
            let span = matrix.span_of(&[key, &i.to_string()]);
            let mut variant = variant.clone();
            variant.name = format!("{}-{key}-{}", variant.name, word(value));
            variant.entries.push(Entry {
                key: Spanned { value: key.clone(), span: span.clone() },
                value: Spanned { value: value.clone(), span },
                nested: Vec::new(),
            });
            variant
        };
        variants = variants
            .iter()
            .flat_map(|variant| values.iter().enumerate().map(|(i, v)| with(variant, i, v)))
            .collect();
    }
    for variant in &variants {
        if let Err(why) = check_name(&variant.name) {
            let message = format!("`{}` cannot be a target's name: {why}", variant.name);
            return Err(error(matrix.value.span, message).help(NAME_RULE));
        }
    }
    Ok(variants)
}

/// A value as a part of a name: `0.5` is `0_5`.
fn word(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(word).collect::<Vec<_>>().join("_"),
        other => other.to_string(),
    };
    text.chars().map(|c| if c.is_alphanumeric() || c == '-' { c } else { '_' }).collect()
}
