//! What a recipe requires of a model: bounds on figures, parsed before anything is built.
//!
//! Knows no step: each says which figures it measures.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::ParamError;

/// Model's label → figure → bound.
pub type Require = BTreeMap<String, BTreeMap<String, Bound>>;

/// A bound on a figure, `>= 0.9` in a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Bound {
    relation: Relation,
    value: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
}

impl Relation {
    /// The longer ones first: `<` begins `<=`.
    const ALL: [(&str, Relation); 5] = [
        ("<=", Relation::LessOrEqual),
        (">=", Relation::GreaterOrEqual),
        ("==", Relation::Equal),
        ("<", Relation::Less),
        (">", Relation::Greater),
    ];
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no bound: write `<`, `<=`, `==`, `>=` or `>` and a number, for example `>= 0.9`")]
pub struct NoBound(String);

impl Bound {
    pub fn holds(self, figure: f64) -> bool {
        match self.relation {
            Relation::Less => figure < self.value,
            Relation::LessOrEqual => figure <= self.value,
            Relation::Equal => figure == self.value,
            Relation::GreaterOrEqual => figure >= self.value,
            Relation::Greater => figure > self.value,
        }
    }
}

impl FromStr for Bound {
    type Err = NoBound;

    fn from_str(text: &str) -> Result<Self, NoBound> {
        let trimmed = text.trim();
        Relation::ALL
            .into_iter()
            .find_map(|(sign, relation)| Some((trimmed.strip_prefix(sign)?, relation)))
            .and_then(|(number, relation)| {
                let value: f64 = number.trim().parse().ok()?;
                value.is_finite().then_some(Bound { relation, value })
            })
            .ok_or_else(|| NoBound(text.into()))
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, _) =
            Relation::ALL.into_iter().find(|(_, r)| *r == self.relation).expect("all are listed");
        write!(f, "{sign} {}", self.value)
    }
}

impl TryFrom<String> for Bound {
    type Error = NoBound;

    fn try_from(text: String) -> Result<Self, NoBound> {
        text.parse()
    }
}

impl From<Bound> for String {
    fn from(bound: Bound) -> String {
        bound.to_string()
    }
}

/// Refuses a figure that the step does not measure.
pub(crate) fn check(require: &Require, measured: &[&str]) -> Result<(), ParamError> {
    for (model, bounds) in require {
        if let Some(figure) = bounds.keys().find(|f| !measured.contains(&f.as_str())) {
            let message = format!("`{figure}` is not measured by this step");
            return Err(ParamError::at(format!("require.{model}.{figure}"), message)
                .hint(format!("it measures {}", measured.join(", "))));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_parse_and_hold() {
        for (text, canonical, inside, outside) in [
            (">= 0.9", ">= 0.9", 0.9, 0.89),
            ("<=0.02", "<= 0.02", -1.0, 0.021),
            (" <  1.05 ", "< 1.05", 1.0, 1.05),
            ("> 1e-3", "> 0.001", 0.002, 0.001),
            ("==1", "== 1", 1.0, 0.999),
        ] {
            let bound: Bound = text.parse().unwrap();
            assert_eq!(bound.to_string(), canonical);
            assert!(bound.holds(inside) && !bound.holds(outside), "{text}");
            assert!(!bound.holds(f64::NAN), "{text}");
        }
        for text in ["", "0.9", "=> 0.9", "= 0.9", ">= ninety", "< inf", "<= 1 2"] {
            assert!(text.parse::<Bound>().is_err(), "{text}");
        }
    }
}
