//! `onnx/export`: a model as Transformers.js and ONNX Runtime read it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::{Facts, Known, ParamError};
use step::{InputDef, Kind, Refusal, Step};

/// The parameters of `onnx/export`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// How weights are stored, by the names that Transformers.js has for them.
    pub dtype: Dtype,
    /// The longest text that the graph reads; at most what the model itself can.
    #[serde(default = "four_thousand")]
    pub max_positions: u32,
    /// Where weights are quantised, how many share a scale: 32 or 128.
    #[serde(default = "thirty_two")]
    pub block_size: u32,
    /// Where weights are quantised: zero lies in the middle of a block's levels. Else each block
    /// says where, which takes a little more room and loses a little less.
    #[serde(default = "yes")]
    pub symmetric: bool,
    /// Where weights are quantised, the bits of the embedding and the head: 8 or 4.
    #[serde(default = "eight")]
    pub head_bits: u32,
    /// Where weights have 4 bits, how the range of a block is found.
    #[serde(default)]
    pub quality: Quality,
    /// Whether the folder is opened in ONNX Runtime and held to what the checkpoint computes.
    #[serde(default = "yes")]
    pub parity: bool,
}

fn four_thousand() -> u32 {
    4096
}

fn thirty_two() -> u32 {
    32
}

fn yes() -> bool {
    true
}

fn eight() -> u32 {
    8
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    Fp32,
    /// Layers in 16 bits; norms, and what is added up from layer to layer, in 32.
    Fp16,
    /// 4 bits for linear layers, `head_bits` for the embedding and the head.
    Q4,
    /// As q4, and the rest as in fp16. For GPUs: a device without `shader-f16` cannot run it.
    Q4f16,
    /// 8 bits for linear layers, `head_bits` for the embedding and the head.
    Int8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quality {
    /// From the values themselves, as ONNX Runtime's own quantiser does.
    #[default]
    Nearest,
    /// Of many ranges, the one of the smallest squared error. Of the same size.
    Searched,
    /// By what the weights are multiplied with when the model reads rows of `dataset`, those that it
    /// was trained on: GPTQ, with searched ranges. Of the same size, and the least loss; it takes the
    /// time of reading 8,192 tokens. The embedding, and with it a tied head, is searched.
    Calibrated,
}

impl Dtype {
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::Fp32 => "fp32",
            Dtype::Q4 => "q4",
            Dtype::Fp16 => "fp16",
            Dtype::Q4f16 => "q4f16",
            Dtype::Int8 => "int8",
        }
    }
}

impl Step for Export {
    const NAME: &'static str = "onnx/export";
    const ABOUT: &'static str = "A model as Transformers.js and ONNX Runtime read it.";
    const INPUTS: &'static [InputDef] =
        &[InputDef::one("model", &[Kind::Model]), InputDef::optional("dataset", &[Kind::Dataset])];
    const OUTPUT: Kind = Kind::OnnxModel;
    const TOOLS: &'static [&'static str] = &["onnxruntime"];

    fn validate(&self) -> Result<(), ParamError> {
        if self.max_positions == 0 {
            return Err(ParamError::at("max_positions", "a graph that reads nothing"));
        }
        if !matches!(self.block_size, 32 | 128) {
            return Err(ParamError::at("block_size", "32 and 128 run everywhere"));
        }
        if !matches!(self.head_bits, 4 | 8) {
            return Err(ParamError::at("head_bits", "an embedding is quantised to 4 or 8 bits"));
        }
        if matches!(self.dtype, Dtype::Fp32 | Dtype::Fp16) {
            let name = self.dtype.name();
            let none = |key| ParamError::at(key, format!("{name} has no quantised weights"));
            if self.block_size != thirty_two() {
                return Err(none("block_size"));
            }
            if !self.symmetric {
                return Err(none("symmetric"));
            }
            if self.head_bits != eight() {
                return Err(none("head_bits"));
            }
            if self.quality != Quality::Nearest {
                return Err(none("quality"));
            }
        }
        if self.quality != Quality::Nearest && self.dtype == Dtype::Int8 && self.head_bits == 8 {
            return Err(ParamError::at("quality", "of 8 bits there is nothing to search for"));
        }
        Ok(())
    }

    fn facts(&self, inputs: &Known) -> Facts {
        inputs.get("model").and_then(|m| m.first()).map(|m| m.facts.clone()).unwrap_or_default()
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        let has_dataset = inputs.get("dataset").is_some_and(|given| !given.is_empty());
        let wrong = |message: &str, hint: &str| {
            Err(Refusal::Wrong { message: message.into(), hint: hint.into() })
        };
        match (self.quality == Quality::Calibrated, has_dataset) {
            (true, false) => {
                return wrong(
                    "`quality = \"calibrated\"` has no rows to calibrate with",
                    "name the dataset that the model was trained on as `dataset`, or say \
                     `quality = \"searched\"`, which needs none",
                );
            }
            (false, true) => {
                return wrong(
                    "`dataset` is not used",
                    "say `quality = \"calibrated\"`, or leave it out",
                );
            }
            _ => {}
        }
        checkpoint::are_built(inputs.values().flatten())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use step::StepDef;
    use step::definition::KnownInput;

    use super::*;

    #[test]
    fn parameters_are_held_to_what_runs_everywhere() {
        let wrong = |params: serde_json::Value| {
            let params: Export = serde_json::from_value(params).unwrap();
            params.validate().err().map(|error| error.to_string())
        };
        assert_eq!(wrong(json!({"dtype": "q4", "block_size": 128, "head_bits": 4})), None);
        assert_eq!(wrong(json!({"dtype": "fp16"})), None);
        for (params, expected) in [
            (json!({"dtype": "q4", "max_positions": 0}), "a graph that reads nothing"),
            (json!({"dtype": "q4", "block_size": 48}), "32 and 128 run everywhere"),
            (json!({"dtype": "int8", "head_bits": 16}), "quantised to 4 or 8 bits"),
            (json!({"dtype": "fp16", "symmetric": false}), "fp16 has no quantised weights"),
            (json!({"dtype": "fp16", "quality": "searched"}), "fp16 has no quantised weights"),
            (json!({"dtype": "int8", "quality": "searched"}), "nothing to search for"),
            (json!({"dtype": "int8", "quality": "calibrated"}), "nothing to search for"),
            (json!({"dtype": "fp32", "head_bits": 4}), "fp32 has no quantised weights"),
        ] {
            let error = wrong(params).unwrap();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn rows_and_calibration_come_together() {
        let plan = |quality: &str, inputs: &[(&str, Kind)]| {
            let params = json!({"dtype": "q4", "quality": quality});
            let serde_json::Value::Object(params) = params else { unreachable!() };
            let def = StepDef::of::<Export>();
            let params = (def.resolve)(params).unwrap();
            let known = inputs.iter().map(|(name, kind)| {
                let facts = Facts { architecture: Some("llama".into()), ..Facts::default() };
                let facts = if *kind == Kind::Model { facts } else { Facts::default() };
                let input = KnownInput { label: "x".into(), kind: *kind, facts };
                (name.to_string(), vec![input])
            });
            let known: Known = known.collect();
            assert_eq!((def.facts)(&params, &known).architecture.as_deref(), Some("llama"));
            (def.supports)(&params, &known).map_err(|refusal| refusal.to_string())
        };
        let (model, dataset) = (("model", Kind::Model), ("dataset", Kind::Dataset));
        assert_eq!(plan("calibrated", &[model, dataset]), Ok(()));
        assert_eq!(plan("searched", &[model]), Ok(()));
        let error = plan("calibrated", &[model]).unwrap_err();
        assert!(error.starts_with("`quality = \"calibrated\"` has no rows"), "{error}");
        let error = plan("searched", &[model, dataset]).unwrap_err();
        assert!(error.starts_with("`dataset` is not used: say `quality"), "{error}");
    }
}
