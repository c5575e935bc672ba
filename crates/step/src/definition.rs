//! What a step declares of itself: its name, inputs, output, parameters and policies.
//!
//! A step is a struct of its parameters that implements [`Step`]; a family lists its steps as
//! [`StepDef`]s. Nothing here runs a step: that is the worker's part.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, schema_for};
use serde::Serialize;
use serde::de::{self, DeserializeOwned, Deserializer, Visitor};
use serde_json::{Map, Value};

use crate::kind::Kind;

/// One crate of steps that share a worker.
#[derive(Debug)]
pub struct Family {
    /// The package, the folder under `crates/`, and the part of a step's name before the slash.
    pub name: &'static str,
    pub steps: &'static [StepDef],
    /// Tools that the worker needs to be compiled, by their names in the engine's table.
    pub build_tools: &'static [&'static str],
}

/// A step's typed parameters, as they stand in a recipe with defaults filled in.
pub trait Step: Serialize + DeserializeOwned + JsonSchema {
    /// `family/step`, and the path of the file that declares it.
    const NAME: &'static str;
    /// One line for people.
    const ABOUT: &'static str;
    const INPUTS: &'static [InputDef];
    const OUTPUT: Kind;
    /// How much of the platform is part of the key.
    const PLATFORM: Platform = Platform::Any;
    const REBUILD: Rebuild = Rebuild::BitForBit;
    /// Only `source/*` and `publish/*` may say yes.
    const NETWORK: bool = false;
    /// Whether its work is done outside, and leaves no artifact: such a target runs when it is named,
    /// each time, and never as a part of a build.
    const ACTS: bool = false;
    /// Whether `cargo xtask lock` must pin this step before it is built.
    const LOCKED: bool = false;
    /// Tools that take part in the result, by their names in the engine's table.
    const TOOLS: &'static [&'static str] = &[];

    /// The kind of the output, where the recipe's own keys decide it.
    fn output(params: &Map<String, Value>) -> Kind {
        let _ = params;
        Self::OUTPUT
    }

    /// Turns what the recipe says into a full set of keys, before it is parsed: where presets act.
    fn fill(params: Map<String, Value>) -> Result<Map<String, Value>, ParamError> {
        Ok(params)
    }

    /// What serde cannot check: ranges, combinations.
    fn validate(&self) -> Result<(), ParamError> {
        Ok(())
    }

    /// What can be said of the output before anything is built. By default it takes after the
    /// first input of which something is known.
    fn facts(&self, inputs: &Known) -> Facts {
        inputs
            .values()
            .flatten()
            .map(|k| k.facts.clone())
            .find(|f| *f != Facts::default())
            .unwrap_or_default()
    }

    /// Programs of this machine that take part in the result, by the names that find them on
    /// `PATH`: their bytes are part of the key.
    fn programs(&self) -> Vec<String> {
        Vec::new()
    }

    /// What it takes of the machine, as far as that is known beforehand.
    fn needs(&self, inputs: &Known) -> Needs {
        let _ = inputs;
        Needs::default()
    }

    /// Refuses by name what is declared but not built yet, an architecture or a dtype, and what
    /// does not go together with these inputs.
    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        let _ = inputs;
        Ok(())
    }
}

/// An input field of a step.
#[derive(Debug, Clone, Copy)]
pub struct InputDef {
    /// The key in the recipe.
    pub name: &'static str,
    pub kinds: &'static [Kind],
    pub arity: Arity,
}

impl InputDef {
    pub const fn one(name: &'static str, kinds: &'static [Kind]) -> Self {
        Self { name, kinds, arity: Arity::One }
    }
    pub const fn optional(name: &'static str, kinds: &'static [Kind]) -> Self {
        Self { name, kinds, arity: Arity::Optional }
    }
    pub const fn many(name: &'static str, kinds: &'static [Kind]) -> Self {
        Self { name, kinds, arity: Arity::Many }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arity {
    One,
    Optional,
    /// A list; each element is known to the step by its label (the target's name).
    Many,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// The same bytes everywhere.
    Any,
    /// The same bytes on one architecture and operating system.
    Arch,
    /// The same bytes on one model of processor.
    Exact,
}

/// How equal a rebuild must be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rebuild {
    BitForBit,
    /// Metrics of the same name within this relative distance.
    WithinTolerance(f64),
}

/// What is known of an artifact before it exists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// `model_type` of config.json: `llama`, `gemma3_text`.
    pub architecture: Option<String>,
    /// Tokens of the vocabulary.
    pub vocabulary: Option<usize>,
    /// A model's config.json.
    pub config: Option<Value>,
    /// A dataset's dataset.json, once it has been made.
    pub dataset: Option<Value>,
    /// What a dataset's rows have a number for, beside what they say.
    pub columns: Option<Vec<String>>,
}

/// The metric that tells how much a run computed, as [`Needs::tflop`] counts it.
pub const TFLOP: &str = "tflop";

/// What a step takes of the machine while it runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Needs {
    /// At most so many threads, and the others are free for another step; all of them, if it does
    /// not say.
    pub threads: Option<usize>,
    /// Whether it computes on an accelerator where there is one: one step at a time has it.
    pub accelerator: bool,
    pub memory: Option<Memory>,
    /// 10¹² floating-point operations that it takes. The time follows by an earlier run's.
    pub tflop: Option<f64>,
    /// What a recipe could say instead where that is too much, each on top of those before it.
    pub savings: Vec<Saving>,
}

/// A change to a recipe, and what the step would take then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saving {
    /// `bits = 4`
    pub change: String,
    pub memory: Memory,
}

/// Bytes that a step needs at its peak, by where it computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    pub on_processor: u64,
    pub on_accelerator: u64,
}

/// An input at plan time.
#[derive(Debug, Clone)]
pub struct KnownInput {
    pub label: String,
    pub kind: Kind,
    pub facts: Facts,
}

/// Input name → what is known of the artifacts it takes.
pub type Known = BTreeMap<String, Vec<KnownInput>>;

/// Why a step will not do what a recipe asks of it with these inputs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{what} is not built yet: {built}")]
    NotBuilt {
        /// `architecture gemma3_text`, `dtype int8`.
        what: String,
        /// What is: `llama is`.
        built: String,
    },
    #[error("{message}: {hint}")]
    Wrong {
        message: String,
        /// What to write instead.
        hint: String,
    },
}

/// A parameter that a recipe got wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ParamError {
    /// The key, dots between nested ones; empty for the table as a whole.
    pub path: String,
    pub message: String,
    /// The nearest known key, the allowed range.
    pub hint: Option<String>,
}

impl ParamError {
    pub fn at(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A [`Step`] as a value: what a registry lists.
#[derive(Debug)]
pub struct StepDef {
    pub name: &'static str,
    pub about: &'static str,
    pub inputs: &'static [InputDef],
    /// What the recipe says → the kind of the output.
    pub output: fn(&Map<String, Value>) -> Kind,
    pub platform: Platform,
    pub rebuild: Rebuild,
    pub network: bool,
    pub acts: bool,
    pub locked: bool,
    pub tools: &'static [&'static str],
    /// The keys of its table, inputs and `step` left out.
    pub keys: fn() -> &'static [&'static str],
    /// The JSON Schema of those keys.
    pub schema: fn() -> Schema,
    /// Recipe parameters → the full set, in canonical form.
    pub resolve: fn(Map<String, Value>) -> Result<Value, ParamError>,
    /// Resolved parameters and known inputs → what is known of the output.
    pub facts: fn(&Value, &Known) -> Facts,
    pub supports: fn(&Value, &Known) -> Result<(), Refusal>,
    pub programs: fn(&Value) -> Vec<String>,
    pub needs: fn(&Value, &Known) -> Needs,
}

impl StepDef {
    pub const fn of<S: Step>() -> Self {
        Self {
            name: S::NAME,
            about: S::ABOUT,
            inputs: S::INPUTS,
            output: S::output,
            platform: S::PLATFORM,
            rebuild: S::REBUILD,
            network: S::NETWORK,
            acts: S::ACTS,
            locked: S::LOCKED,
            tools: S::TOOLS,
            keys: field_names::<S>,
            schema: schema::<S>,
            resolve: resolve::<S>,
            facts: |params, inputs| typed::<S>(params).facts(inputs),
            supports: |params, inputs| typed::<S>(params).supports(inputs),
            programs: |params| typed::<S>(params).programs(),
            needs: |params, inputs| typed::<S>(params).needs(inputs),
        }
    }
}

/// The schema of what a recipe writes: keys that [`Step::fill`] supplies may be left out.
fn schema<S: Step>() -> Schema {
    let mut schema = schema_for!(S);
    let filled = S::fill(Map::new()).unwrap_or_default();
    if let Some(Value::Array(required)) = schema.get_mut("required") {
        required.retain(|key| key.as_str().is_none_or(|key| !filled.contains_key(key)));
    }
    schema
}

fn resolve<S: Step>(params: Map<String, Value>) -> Result<Value, ParamError> {
    let filled = Value::Object(S::fill(params)?);
    let step: S = serde_path_to_error::deserialize(filled).map_err(|e| {
        let path = e.path().to_string();
        ParamError::at(if path == "." { String::new() } else { path }, e.inner().to_string())
    })?;
    step.validate()?;
    Ok(serde_json::to_value(&step).expect("parameters serialise to JSON"))
}

/// # Panics
/// If `params` did not come out of [`resolve`].
fn typed<S: Step>(params: &Value) -> S {
    S::deserialize(params).expect("resolved parameters parse again")
}

/// The field names that `T`'s derived `Deserialize` asks for: a struct tells them before it reads
/// anything, so a deserializer that only listens is enough.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Listen<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Listen<'_> {
        type Error = de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("only listening"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            Err(de::Error::custom("only listening"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    let _ = T::deserialize(Listen(&mut names));
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Demo {
        rank: u32,
        #[serde(default = "half")]
        rate: f64,
    }

    fn half() -> f64 {
        0.5
    }

    impl Step for Demo {
        const NAME: &'static str = "demo/step";
        const ABOUT: &'static str = "A step of the tests.";
        const INPUTS: &'static [InputDef] = &[];
        const OUTPUT: Kind = Kind::Files;
    }

    const DEF: StepDef = StepDef::of::<Demo>();

    fn resolve(value: Value) -> Result<Value, ParamError> {
        let Value::Object(map) = value else { unreachable!("tests pass objects") };
        (DEF.resolve)(map)
    }

    #[test]
    fn defaults_are_filled_in() {
        assert_eq!(resolve(json!({"rank": 4})), Ok(json!({"rank": 4, "rate": 0.5})));
    }

    #[test]
    fn errors_name_the_key() {
        assert_eq!(resolve(json!({"rank": "x"})).unwrap_err().path, "rank");
        assert_eq!((DEF.keys)(), ["rank", "rate"]);
    }
}
