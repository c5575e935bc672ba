//! `gguf/export`: a model as one GGUF file, tokenizer and chat template inside, and a Modelfile for
//! Ollama beside it.
//!
//! It is written from the checkpoint's own bits: nothing is rounded twice, and each tensor has the
//! bytes that llama-quantize makes of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, Known, Refusal, Step};

/// The parameters of `gguf/export`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// The type of the matrices, or llama.cpp's mix of types; vectors are always F32.
    #[serde(default)]
    pub quant: Quant,
    /// Whether the written file is read back and its logits are held to the checkpoint's.
    #[serde(default = "yes")]
    pub parity: bool,
}

fn yes() -> bool {
    true
}

/// llama.cpp's names, as users of its quantisation tool know them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Quant {
    F32,
    #[default]
    F16,
    BF16,
    #[serde(rename = "Q8_0")]
    Q8,
    #[serde(rename = "Q4_0")]
    Q4,
    #[serde(rename = "Q5_0")]
    Q5,
    #[serde(rename = "Q4_K_M")]
    Q4KM,
    #[serde(rename = "Q5_K_M")]
    Q5KM,
    #[serde(rename = "Q6_K")]
    Q6K,
}

impl Quant {
    /// The largest first.
    pub const ALL: [Quant; 9] = [
        Quant::F32,
        Quant::F16,
        Quant::BF16,
        Quant::Q8,
        Quant::Q6K,
        Quant::Q5KM,
        Quant::Q5,
        Quant::Q4KM,
        Quant::Q4,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Quant::F32 => "F32",
            Quant::F16 => "F16",
            Quant::BF16 => "BF16",
            Quant::Q8 => "Q8_0",
            Quant::Q4 => "Q4_0",
            Quant::Q5 => "Q5_0",
            Quant::Q4KM => "Q4_K_M",
            Quant::Q5KM => "Q5_K_M",
            Quant::Q6K => "Q6_K",
        }
    }
}

impl Step for Export {
    const NAME: &'static str = "gguf/export";
    const ABOUT: &'static str = "A model as one GGUF file, for llama.cpp.";
    const INPUTS: &'static [InputDef] = &[InputDef::one("model", &[Kind::Model])];
    const OUTPUT: Kind = Kind::GgufModel;

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        checkpoint::are_built(inputs.values().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use step::{Facts, StepDef};

    const DEF: StepDef = StepDef::of::<Export>();
    const QUANTS: [&str; 9] =
        ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q5_K_M", "Q6_K"];

    fn plan(quant: &str, architecture: &str) -> Result<(), String> {
        let serde_json::Value::Object(params) = json!({"quant": quant}) else { unreachable!() };
        let params = (DEF.resolve)(params).map_err(|e| e.to_string())?;
        let input = step::definition::KnownInput {
            label: "m".into(),
            kind: Kind::Model,
            facts: Facts { architecture: Some(architecture.into()), ..Facts::default() },
        };
        (DEF.supports)(&params, &Known::from([("model".into(), vec![input])]))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for quant in QUANTS {
            assert_eq!(plan(quant, "llama"), Ok(()));
        }
        for architecture in checkpoint::ARCHITECTURES {
            assert_eq!(plan("F16", architecture), Ok(()));
        }
        assert_eq!(
            plan("F16", "gemma3n_text").unwrap_err(),
            "architecture gemma3n_text is not built yet: \
             llama, mistral, qwen2, qwen3, gemma3_text and phi3 are"
        );
        assert!(plan("Q9", "llama").unwrap_err().contains("unknown variant `Q9`"));
    }

    #[test]
    fn names_are_what_recipes_say() {
        for quant in QUANTS {
            let parsed: Quant = serde_json::from_value(json!(quant)).unwrap();
            assert_eq!(parsed.name(), quant);
        }
        assert_eq!((DEF.resolve)(Default::default()), Ok(json!({"quant": "F16", "parity": true})));
    }
}
