//! What a recipe requires, held against what was measured.
//!
//! Knows nothing of how a figure came about.

use eval::require::Require;
use serde::Serialize;
use step::Failure;
use step::worker::Input;

use crate::report::Measured;

/// One bound and the figure that it is about.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gate {
    pub model: String,
    pub figure: String,
    pub bound: String,
    pub value: f64,
    pub met: bool,
}

/// Refuses bounds on models that are not there, before any is opened.
pub fn check(require: &Require, models: &[&Input]) -> Result<(), Failure> {
    match require.keys().find(|label| !models.iter().any(|m| m.label == **label)) {
        Some(label) => Err(unknown("require", label, models)),
        None => Ok(()),
    }
}

/// The model that the others are compared with: the one that `name` says, else the first.
pub fn reference(name: Option<&str>, models: &[&Input]) -> Result<usize, Failure> {
    let Some(name) = name else { return Ok(0) };
    let found = models.iter().position(|m| m.label == name);
    found.ok_or_else(|| unknown("reference", name, models))
}

fn unknown(key: &str, label: &str, models: &[&Input]) -> Failure {
    let labels: Vec<&str> = models.iter().map(|m| m.label.as_str()).collect();
    Failure::input(format!("`{key}` names `{label}`, which is not among the models"))
        .hint(format!("the models are {}", labels.join(", ")))
}

/// Every bound with its verdict, in the recipe's order of names.
pub fn verdicts(require: &Require, models: &[Measured]) -> Vec<Gate> {
    let mut gates = Vec::new();
    for model in models {
        for (figure, bound) in require.get(&model.label).into_iter().flatten() {
            let value = model.figures.get(figure).copied().unwrap_or(f64::NAN);
            gates.push(Gate {
                model: model.label.clone(),
                figure: figure.clone(),
                bound: bound.to_string(),
                value,
                met: bound.holds(value),
            });
        }
    }
    gates
}

/// All that is unmet, as one failure.
pub fn hold(gates: &[Gate]) -> Result<(), Failure> {
    let unmet: Vec<String> = gates
        .iter()
        .filter(|g| !g.met)
        .map(|g| format!("{}: {} is {}, required {}", g.model, g.figure, g.value, g.bound))
        .collect();
    if unmet.is_empty() {
        return Ok(());
    }
    let count = match unmet.len() {
        1 => "a requirement is not met".into(),
        n => format!("{n} requirements are not met"),
    };
    Err(Failure::input(format!("{count}: {}", unmet.join("; "))).hint(
        "the table above has all figures: train longer, quantise less, or change `require` in the recipe",
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use step::Kind;

    use super::*;

    fn measured(label: &str, figures: &[(&str, f64)]) -> Measured {
        let figures = figures.iter().map(|(k, v)| (k.to_string(), *v)).collect();
        Measured {
            label: label.into(),
            kind: Kind::Model,
            size: 0,
            figures,
            tokens: 0,
            seconds: 0.0,
        }
    }

    #[test]
    fn all_that_is_unmet_is_named() {
        let models = [
            measured("a", &[("em", 0.5), ("drop", 0.0)]),
            measured("b", &[("em", 0.4), ("drop", 0.1)]),
        ];
        let bounds = |list: &[(&str, &str)]| -> BTreeMap<_, _> {
            list.iter().map(|(k, b)| (k.to_string(), b.parse().unwrap())).collect()
        };
        let require: Require = [
            ("a".to_string(), bounds(&[("em", ">= 0.9")])),
            ("b".to_string(), bounds(&[("em", ">= 0.4"), ("drop", "<= 0.02")])),
        ]
        .into();
        let gates = verdicts(&require, &models);
        assert_eq!(gates.iter().map(|g| g.met).collect::<Vec<_>>(), [false, false, true]);
        let failure = hold(&gates).unwrap_err();
        assert_eq!(
            failure.message,
            "2 requirements are not met: a: em is 0.5, required >= 0.9; b: drop is 0.1, required <= 0.02"
        );
        assert_eq!(failure.class, step::Class::Input);
        assert_eq!(hold(&gates[2..]), Ok(()));
    }
}
