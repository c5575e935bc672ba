//! The JSON Schema of recipes, from the steps' own types: editors complete and check with it.
//!
//! Draft 4, which Taplo reads. Steps' schemas come in a later draft; what differs is rewritten.

use engine::Registry;
use serde_json::{Map, Value, json};
use step::{Arity, InputDef, StepDef};

/// The schema of a recipe file.
pub fn of_recipes(registry: Registry) -> Value {
    let mut definitions = Map::new();
    let tables: Vec<Value> = registry.steps().map(|def| table(def, &mut definitions)).collect();
    json!({
        "$schema": "http://json-schema.org/draft-04/schema#",
        "title": "Anneal recipe",
        "description": "One table an artifact: its name is the word typed after `build`.",
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"anyOf": tables},
        "definitions": definitions,
    })
}

/// The table of a target that is made by this step.
fn table(def: &StepDef, definitions: &mut Map<String, Value>) -> Value {
    let mut schema = (def.schema)().to_value();
    // Definitions of all steps share one place: each gets its step's name in front.
    let prefix = def.name.replace('/', "-");
    let own = schema.as_object_mut().and_then(|s| s.remove("$defs")).unwrap_or_default();
    for (name, definition) in own.as_object().into_iter().flatten() {
        let mut definition = definition.clone();
        to_draft_4(&mut definition, &prefix);
        definitions.insert(format!("{prefix}-{name}"), definition);
    }
    let mut keys = match schema.get_mut("properties").map(Value::take) {
        Some(Value::Object(keys)) => keys,
        _ => Map::new(),
    };
    // The pin of a locked source stands in the lock file.
    keys.remove("lock");
    let probe = Probe { def, sample: sample(&keys, &own) };
    let mut required: Vec<Value> =
        keys.keys().filter(|key| probe.needs(key)).map(|key| json!(key)).collect();
    for (key, schema) in &mut keys {
        let list = schema["type"] == "array" && schema["items"]["type"] == "string";
        if list && probe.takes_one(key) {
            let description = schema.as_object_mut().and_then(|s| s.remove("description"));
            *schema = json!({"anyOf": [{"type": "string"}, schema.take()]});
            schema["description"] = description.unwrap_or_default();
        }
        to_draft_4(schema, &prefix);
    }

    let mut properties = Map::from_iter([(
        "step".to_string(),
        json!({"description": def.about, "enum": [def.name]}),
    )]);
    required.push(json!("step"));
    for input in def.inputs {
        properties.insert(input.name.into(), of_input(input));
        if input.arity == Arity::One {
            required.push(json!(input.name));
        }
    }
    properties.extend(keys);
    properties.insert(
        "matrix".into(),
        json!({
            "description": "Makes one target for each combination of values: `{ rank = [8, 16] }`.",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": "array", "minItems": 1},
        }),
    );
    json!({
        "title": def.name,
        "description": def.about,
        "type": "object",
        "properties": properties,
        // What is required may stand in the matrix.
        "anyOf": [{"required": required}, {"required": ["step", "matrix"]}],
        "additionalProperties": false,
    })
}

/// Asks a step itself what its types do not tell: what it fills in, what it takes in two forms.
struct Probe<'a> {
    def: &'a StepDef,
    /// Every key with some value of its type.
    sample: Map<String, Value>,
}

impl Probe<'_> {
    /// Whether a recipe must write this key, be all the others written.
    fn needs(&self, key: &str) -> bool {
        let mut given = self.sample.clone();
        given.remove(key);
        let missing = format!("missing field `{key}`");
        (self.def.resolve)(given).is_err_and(|error| error.message.contains(&missing))
    }

    /// Whether a string does for a list of one.
    fn takes_one(&self, key: &str) -> bool {
        let mut given = self.sample.clone();
        given.insert(key.into(), json!("x"));
        !(self.def.resolve)(given).is_err_and(|error| error.message.contains("invalid type"))
    }
}

fn sample(keys: &Map<String, Value>, definitions: &Value) -> Map<String, Value> {
    fn of(schema: &Value, definitions: &Value) -> Value {
        if let Some(name) = schema["$ref"].as_str().and_then(|to| to.strip_prefix("#/$defs/")) {
            return of(&definitions[name], definitions);
        }
        let choice = ["oneOf", "anyOf"].iter().find_map(|of| schema[*of].get(0));
        if let Some(first) = choice {
            return of(first, definitions);
        }
        if let Some(value) = schema.get("const").or_else(|| schema["enum"].get(0)) {
            return value.clone();
        }
        let kind = schema["type"].as_str().or_else(|| schema["type"][0].as_str());
        match kind.unwrap_or_default() {
            "integer" | "number" => json!(64),
            "boolean" => json!(true),
            "string" => json!("x"),
            "array" => {
                let items = schema["minItems"].as_u64().unwrap_or(0);
                (0..items).map(|_| of(&schema["items"], definitions)).collect()
            }
            "object" => json!({}),
            _ => Value::Null,
        }
    }
    keys.iter().map(|(key, schema)| (key.clone(), of(schema, definitions))).collect()
}

fn of_input(input: &InputDef) -> Value {
    let kinds: Vec<&str> = input.kinds.iter().map(|kind| kind.article()).collect();
    let one = "a target of this recipe, `recipe/target`, or a file as `./path`";
    let description = format!("{}: {one}.", kinds.join(" or "));
    match input.arity {
        Arity::Many => json!({
            "description": description,
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        }),
        _ => json!({"description": description, "type": "string"}),
    }
}

/// Rewrites what draft 4 says otherwise, all the way down.
fn to_draft_4(schema: &mut Value, prefix: &str) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| to_draft_4(item, prefix)),
        Value::Object(object) => {
            object.remove("$schema");
            if let Some(constant) = object.remove("const") {
                object.insert("enum".into(), json!([constant]));
            }
            for (bound, exclusive) in
                [("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")]
            {
                if let Some(number) = object.get(exclusive).filter(|v| v.is_number()).cloned() {
                    object.insert(bound.into(), number);
                    object.insert(exclusive.into(), json!(true));
                }
            }
            if let Some(Value::String(to)) = object.get_mut("$ref")
                && let Some(name) = to.strip_prefix("#/$defs/")
            {
                *to = format!("#/definitions/{prefix}-{name}");
            }
            object.values_mut().for_each(|value| to_draft_4(value, prefix));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::registry::REGISTRY;

    #[test]
    fn the_committed_schema_is_that_of_the_steps() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/recipe.schema.json");
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        let now = format!("{:#}\n", of_recipes(REGISTRY));
        assert!(there == now, "run `cargo xtask schema > recipes/recipe.schema.json`");
    }

    #[test]
    fn every_key_of_every_step_is_in_it() {
        let schema = of_recipes(REGISTRY);
        let tables = schema["additionalProperties"]["anyOf"].as_array().unwrap();
        for (def, table) in REGISTRY.steps().zip(tables) {
            for key in (def.keys)().iter().filter(|key| **key != "lock") {
                assert!(table["properties"][*key].is_object(), "{}: {key}", def.name);
            }
            assert!(!table.to_string().contains("$defs"), "{}", def.name);
        }
    }
}
