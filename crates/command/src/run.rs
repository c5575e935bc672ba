//! `command/run`: a program that reads declared inputs and makes declared outputs.
//!
//! Knows nothing of how the program is started: that is the worker's part.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use step::{InputDef, Kind, Known, Needs, ParamError, Platform, Step};

use crate::template::{self, Part};

/// The parameters of `command/run`.
///
/// In `program`, `args` and the values of `env`, `{name}` is the input of that name (the file
/// itself where the input is one file, else its folder), `{out}` the folder to write to, `{{` and
/// `}}` are braces.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// A name that `PATH` knows (`python3`), or an input (`{tool}`). Its bytes are part of the key
    /// either way.
    pub program: String,
    #[serde(default)]
    pub args: Vec<String>,
    /// Variables for the program, beside the few that every step sees.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The file below `{out}` that standard output is written to; without it, it goes to the log.
    #[serde(default)]
    pub stdout: Option<String>,
    /// The files that the program makes below `{out}`, no more and no less; if left out, any.
    #[serde(default)]
    pub outputs: Option<Vec<String>>,
    /// What the output is to other steps.
    #[serde(default = "files")]
    pub kind: Kind,
    /// How many threads the program uses: as many are kept free for it.
    #[serde(default = "one")]
    pub threads: usize,
}

fn files() -> Kind {
    Kind::Files
}

fn one() -> usize {
    1
}

impl Step for Run {
    const NAME: &'static str = "command/run";
    const ABOUT: &'static str = "Runs a program of yours, hashed like everything else.";
    const INPUTS: &'static [InputDef] = &[InputDef::many("inputs", Kind::ALL)];
    const OUTPUT: Kind = Kind::Files;
    const PLATFORM: Platform = Platform::Arch;

    fn output(params: &Map<String, Value>) -> Kind {
        let kind = params.get("kind").and_then(|kind| Kind::deserialize(kind).ok());
        kind.unwrap_or(Self::OUTPUT)
    }

    fn validate(&self) -> Result<(), ParamError> {
        let words = std::iter::once(("program".to_string(), &self.program))
            .chain(self.args.iter().enumerate().map(|(i, word)| (format!("args[{i}]"), word)))
            .chain(self.env.iter().map(|(name, word)| (format!("env.{name}"), word)));
        for (path, word) in words {
            template::parse(word).map_err(|message| {
                ParamError::at(path, message).hint("a brace itself is written twice")
            })?;
        }
        if self.program.is_empty() {
            return Err(ParamError::at("program", "a program has a name"));
        }
        if self.program.contains('/') && self.own_program().is_some() {
            return Err(ParamError::at("program", format!("`{}` is a path", self.program)).hint(
                "make it an input, so that its bytes count: inputs = [\"./tool\"], program = \"{tool}\"",
            ));
        }
        let names = self.outputs.iter().flatten().enumerate();
        let names = names.map(|(i, name)| (format!("outputs[{i}]"), name));
        for (path, name) in names.chain(self.stdout.iter().map(|n| ("stdout".to_string(), n))) {
            let inside = |part: &str| !matches!(part, "" | "." | "..");
            if !name.split('/').all(inside) {
                let message = format!("`{name}` is no file below the output folder");
                return Err(ParamError::at(path, message).hint("a relative path, without `..`"));
            }
        }
        if self.threads == 0 {
            return Err(ParamError::at("threads", "must be at least 1"));
        }
        Ok(())
    }

    fn programs(&self) -> Vec<String> {
        self.own_program().map(str::to_string).into_iter().collect()
    }

    fn needs(&self, _: &Known) -> Needs {
        Needs { threads: Some(self.threads), ..Needs::default() }
    }
}

impl Run {
    /// The name to look for on `PATH`; none where the program is an input.
    fn own_program(&self) -> Option<&str> {
        let parts = template::parse(&self.program).ok()?;
        let is_text = parts.iter().all(|part| matches!(part, Part::Text(_)));
        is_text.then_some(self.program.as_str())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use step::StepDef;

    use super::*;

    const DEF: StepDef = StepDef::of::<Run>();

    fn resolve(params: Value) -> Result<Value, ParamError> {
        let Value::Object(map) = params else { unreachable!("tests pass objects") };
        (DEF.resolve)(map)
    }

    #[test]
    fn a_program_is_enough_and_takes_part_in_the_key() {
        let params = resolve(json!({"program": "true"})).unwrap();
        assert_eq!((DEF.programs)(&params), ["true"]);
        assert_eq!((DEF.needs)(&params, &Known::new()).threads, Some(1));
        let params = resolve(json!({"program": "{tool}", "kind": "model"})).unwrap();
        assert_eq!((DEF.programs)(&params), Vec::<String>::new());
    }

    #[test]
    fn what_a_recipe_gets_wrong_is_named() {
        for (params, path) in [
            (json!({"program": ""}), "program"),
            (json!({"program": "./tool"}), "program"),
            (json!({"program": "a", "args": ["x", "{out"]}), "args[1]"),
            (json!({"program": "a", "env": {"A": "}"}}), "env.A"),
            (json!({"program": "a", "outputs": ["../x"]}), "outputs[0]"),
            (json!({"program": "a", "stdout": "/x"}), "stdout"),
            (json!({"program": "a", "threads": 0}), "threads"),
            (json!({"program": "a", "kind": "modle"}), "kind"),
        ] {
            assert_eq!(resolve(params.clone()).unwrap_err().path, path, "{params}");
        }
    }
}
