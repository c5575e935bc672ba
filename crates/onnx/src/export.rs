//! `onnx/export`: a model as Transformers.js and ONNX Runtime read it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::{Known, ParamError};
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
}

fn four_thousand() -> u32 {
    4096
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    Fp32,
    /// 4 bits in blocks of 32 for linear layers, 8 for the embedding and the head.
    Q4,
    Fp16,
    Q4f16,
    Int8,
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
    const INPUTS: &'static [InputDef] = &[InputDef::one("model", &[Kind::Model])];
    const OUTPUT: Kind = Kind::OnnxModel;

    fn validate(&self) -> Result<(), ParamError> {
        match self.max_positions {
            0 => Err(ParamError::at("max_positions", "a graph that reads nothing")),
            _ => Ok(()),
        }
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        let facts = inputs.values().flatten().filter_map(|i| i.facts.architecture.as_deref());
        for architecture in facts {
            if !checkpoint::EXPORTED.contains(&architecture) {
                return Err(Refusal::NotBuilt {
                    what: format!("architecture {architecture}"),
                    built: checkpoint::are(checkpoint::EXPORTED),
                });
            }
        }
        match self.dtype {
            Dtype::Fp32 | Dtype::Q4 => Ok(()),
            other => Err(Refusal::NotBuilt {
                what: format!("dtype {}", other.name()),
                built: "fp32 and q4 are".into(),
            }),
        }
    }
}
