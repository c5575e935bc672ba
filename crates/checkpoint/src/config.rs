//! config.json, read strictly: a key that changes what the model computes is either understood or
//! refused by name.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Error;

/// The architectures that are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, TinyLlama, SmolLM: rotary positions, SwiGLU, RMS norms.
    Llama,
    /// As Llama, with sliding windows.
    Mistral,
    /// As Llama, with biases on queries, keys and values, and sliding windows on later layers.
    Qwen2,
    /// As Qwen2 without the biases, but with norms on queries and keys.
    Qwen3,
    /// The text part of Gemma 3: norms before and after, weights of norms from 0, GELU, a scaled
    /// embedding, and other rotary positions in sliding windows.
    Gemma3,
    /// Phi-3 and 3.5, mini and medium: as Mistral, with queries, keys and values of one matrix, gate
    /// and up of another, and rotary positions on a part of each head.
    Phi3,
}

impl Architecture {
    pub const ALL: [Architecture; 6] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma3,
        Architecture::Phi3,
    ];

    /// The architecture of a `model_type`, if it is built.
    pub fn of(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.model_type() == model_type)
    }

    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gemma3 => "gemma3_text",
            Architecture::Phi3 => "phi3",
        }
    }
}

/// The shape of a causal language model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub max_positions: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    /// How many dimensions of a head are turned by its position: the first.
    pub rotary_dim: usize,
    /// The theta of layers with a window, where it is another one.
    pub rope_theta_near: Option<f64>,
    /// Of queries, keys and values; and of what attention gives.
    pub qkv_bias: bool,
    pub o_bias: bool,
    /// Whether each head of queries and keys goes through a norm before it is turned.
    pub qk_norm: bool,
    /// For each layer, how many positions a query sees at most, itself counted; `None`: all before it.
    pub windows: Vec<Option<usize>>,
    /// Products of queries and keys are divided by the root of this.
    pub query_scale: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
    /// `bfloat16`, `float16` or `float32`.
    pub dtype: String,
    /// Whether matrices are in 8 bits, as [`int8`] has it.
    pub int8: bool,
}

/// What config.json says of matrices in 8 bits with a scale a row: compressed-tensors' W8A16, which
/// transformers and vLLM read. The one quantisation that is understood.
pub fn int8() -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel",
                "dynamic": false,
            },
            "input_activations": null,
            "output_activations": null,
        }},
        "ignore": ["lm_head"],
    })
}

/// How rotary positions are stretched beyond those of pretraining.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    Llama3(Llama3),
    LongRope(LongRope),
}

/// How Phi-3 stretches them: `rope_type` `longrope` (Ding et al., 2024).
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// What wavelengths are multiplied by in rows of at most `original_max_positions`, and in longer
    /// ones: a number for each pair of dimensions.
    pub short_factor: Vec<f64>,
    pub long_factor: Vec<f64>,
    pub original_max_positions: usize,
    /// What cosines and sines are multiplied by.
    pub attention_factor: f64,
}

/// How Llama 3.1 stretches them: `rope_type` `llama3`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3 {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_positions: f64,
}

impl Config {
    /// Reads `config.json` in a model folder.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let config = Self::read_to_run(dir)?;
        match config.int8 {
            true => Err(Error::Quantised {
                path: dir.join("config.json"),
                how: "compressed-tensors, 8 bits".into(),
            }),
            false => Ok(config),
        }
    }

    /// The same for a model that is run as it is, and nothing built on it: its matrices may be in the 8
    /// bits that `merge/lora` writes.
    pub fn read_to_run(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        Self::parse(&text, &path)
    }

    /// Reads the text of a config.json; `origin` is named in errors.
    pub fn parse(json: &str, origin: &Path) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(json)
            .map_err(|e| Error::Parse { path: origin.into(), message: e.to_string() })?;
        Self::of(&value, origin)
    }

    /// Reads a config.json; `origin` is named in errors.
    pub fn of(json: &Value, origin: &Path) -> Result<Self, Error> {
        let Value::Object(map) = json else {
            return Err(Error::Parse { path: origin.into(), message: "no JSON object".into() });
        };
        let keys = Keys { map, origin };
        let model_type = keys.text("model_type")?;
        let Some(architecture) = Architecture::of(&model_type) else {
            return Err(Error::Architecture { path: origin.into(), found: model_type });
        };
        keys.refuse_what_changes_the_maths(architecture)?;
        let (hidden_size, num_heads) =
            (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let num_layers = keys.size("num_hidden_layers")?;
        let attention_bias = keys.flag("attention_bias");
        let rope = map.get("rope_parameters").or(map.get("rope_scaling"));
        // Gemma 3 has rotary positions by the kind of layer.
        let near = rope.and_then(|rope| rope.get("sliding_attention"));
        let rope = rope.and_then(|rope| rope.get("full_attention")).or(rope);
        let theta = map.get("rope_theta").or_else(|| rope?.get("rope_theta"));
        let near = map.get("rope_local_base_freq").or_else(|| near?.get("rope_theta"));
        let head_dim = keys.size_or("head_dim", hidden_size / num_heads)?;
        let max_positions = keys.size_or("max_position_embeddings", 2048)?;
        let part = rope.and_then(|rope| rope.get(PARTIAL_ROTARY)).or(map.get(PARTIAL_ROTARY));
        let part = part.and_then(Value::as_f64).unwrap_or(1.0);
        let rotary_dim = (head_dim as f64 * part) as usize;
        let gemma = architecture == Architecture::Gemma3;
        let config = Self {
            architecture,
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads: keys.size_or("num_key_value_heads", num_heads)?,
            head_dim,
            intermediate_size: keys.size("intermediate_size")?,
            vocab_size: keys.size("vocab_size")?,
            max_positions,
            rms_norm_eps: map.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6),
            rope_theta: theta.and_then(Value::as_f64).unwrap_or(if gemma { 1e6 } else { 1e4 }),
            rope_theta_near: near.and_then(Value::as_f64).or(Some(1e4)).filter(|_| gemma),
            rope_scaling: keys.rope_scaling(rope, rotary_dim, max_positions)?,
            rotary_dim,
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            o_bias: architecture != Architecture::Qwen2 && attention_bias,
            qk_norm: gemma || architecture == Architecture::Qwen3,
            windows: keys.windows(architecture, num_layers)?,
            query_scale: match gemma {
                true => keys.size_or("query_pre_attn_scalar", 256)?,
                false => head_dim,
            },
            tied: match map.get("tie_word_embeddings") {
                Some(tied) => tied.as_bool().unwrap_or(gemma),
                None => gemma,
            },
            bos_token_id: keys.ids("bos_token_id").first().copied(),
            eos_token_ids: keys.ids("eos_token_id"),
            pad_token_id: keys.ids("pad_token_id").first().copied(),
            dtype: map
                .get("dtype")
                .or(map.get("torch_dtype"))
                .and_then(Value::as_str)
                .unwrap_or("float32")
                .to_string(),
            int8: map.get("quantization_config").is_some_and(|value| *value == int8()),
        };
        if rotary_dim != head_dim && architecture != Architecture::Phi3 {
            return Err(Error::UnsupportedKey {
                path: origin.into(),
                key: PARTIAL_ROTARY.into(),
                value: part.to_string(),
            });
        }
        if !(1..=head_dim).contains(&rotary_dim) || !rotary_dim.is_multiple_of(2) {
            return Err(Error::Config {
                path: origin.into(),
                message: format!(
                    "positions cannot turn {rotary_dim} of the {head_dim} dimensions of a head"
                ),
            });
        }
        if !config.num_heads.is_multiple_of(config.num_kv_heads) {
            return Err(Error::Config {
                path: origin.into(),
                message: format!(
                    "{} heads over {} key/value heads of {} dimensions do not go together",
                    config.num_heads, config.num_kv_heads, config.head_dim
                ),
            });
        }
        Ok(config)
    }

    /// The config.json of a plain Llama, with the spellings of transformers 4 and 5 both.
    pub fn to_json(&self) -> Value {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.architecture.model_type(),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "initializer_range": 0.02,
            "use_cache": true,
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
        })
    }

    /// Parameters, a tied head counted once.
    pub fn parameters(&self) -> usize {
        crate::names::expected(self).iter().map(|(_, s)| s.iter().product::<usize>()).sum()
    }
}

const PARTIAL_ROTARY: &str = "partial_rotary_factor";

struct Keys<'a> {
    map: &'a Map<String, Value>,
    origin: &'a Path,
}

impl Keys<'_> {
    fn text(&self, key: &'static str) -> Result<String, Error> {
        let text = self.map.get(key).and_then(Value::as_str);
        text.map(str::to_string).ok_or(Error::MissingKey { path: self.origin.into(), key })
    }

    fn size(&self, key: &'static str) -> Result<usize, Error> {
        match self.map.get(key).and_then(Value::as_u64) {
            Some(0) => {
                Err(Error::Config { path: self.origin.into(), message: format!("`{key}` is 0") })
            }
            Some(n) => Ok(n as usize),
            None => Err(Error::MissingKey { path: self.origin.into(), key }),
        }
    }

    fn size_or(&self, key: &'static str, default: usize) -> Result<usize, Error> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.size(key),
        }
    }

    fn flag(&self, key: &str) -> bool {
        self.map.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    fn rope_scaling(
        &self,
        rope: Option<&Value>,
        rotary_dim: usize,
        max_positions: usize,
    ) -> Result<Option<RopeScaling>, Error> {
        let Some(rope) = rope else { return Ok(None) };
        match rope_type(rope) {
            Some("llama3") => Ok(Some(RopeScaling::Llama3(self.llama3(rope)?))),
            // Phi-3 was published with the second name.
            Some("longrope" | "su") => {
                Ok(Some(RopeScaling::LongRope(self.long_rope(rope, rotary_dim, max_positions)?)))
            }
            _ => Ok(None),
        }
    }

    fn long_rope(
        &self,
        rope: &Value,
        rotary_dim: usize,
        max_positions: usize,
    ) -> Result<LongRope, Error> {
        let pairs = rotary_dim / 2;
        let factors = |key: &str| {
            let list = rope.get(key).and_then(Value::as_array).into_iter().flatten();
            let list: Vec<f64> = list.filter_map(Value::as_f64).filter(|x| *x > 0.0).collect();
            if list.len() == pairs {
                return Ok(list);
            }
            Err(Error::Config {
                path: self.origin.into(),
                message: format!(
                    "a `rope_type` of longrope needs `{key}`: {pairs} numbers above 0"
                ),
            })
        };
        // As transformers: the key that stands beside `rope_parameters` counts, not the one in it.
        let original = self.size_or("original_max_position_embeddings", 4096)?;
        let given = |key: &str| rope.get(key).and_then(Value::as_f64);
        let stretch = given("factor").unwrap_or(max_positions as f64 / original as f64);
        let suggested = match stretch > 1.0 {
            true => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
            false => 1.0,
        };
        Ok(LongRope {
            short_factor: factors("short_factor")?,
            long_factor: factors("long_factor")?,
            original_max_positions: original,
            attention_factor: given("attention_factor").unwrap_or(suggested),
        })
    }

    fn llama3(&self, rope: &Value) -> Result<Llama3, Error> {
        let number = |key: &'static str| match rope.get(key).and_then(Value::as_f64) {
            Some(number) if number > 0.0 => Ok(number),
            _ => Err(Error::Config {
                path: self.origin.into(),
                message: format!("a `rope_type` of llama3 needs `{key}` above 0"),
            }),
        };
        Ok(Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_positions: number("original_max_position_embeddings")?,
        })
    }

    /// The sliding window of each layer.
    fn windows(
        &self,
        architecture: Architecture,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, Error> {
        let size = match architecture {
            Architecture::Llama => None,
            Architecture::Qwen2 | Architecture::Qwen3 if !self.flag("use_sliding_window") => None,
            _ => match self.map.get("sliding_window") {
                None | Some(Value::Null) => None,
                Some(_) => Some(self.size("sliding_window")?),
            },
        };
        let Some(size) = size else { return Ok(vec![None; layers]) };
        let types = self.map.get("layer_types").and_then(Value::as_array);
        // Phi-3 has one kind of layer, whatever that list says.
        let Some(types) = types.filter(|_| architecture != Architecture::Phi3) else {
            if architecture == Architecture::Gemma3 {
                let every = self.map.get("sliding_window_pattern").and_then(Value::as_u64);
                let every = every.unwrap_or(6).max(1) as usize;
                return Ok((1..=layers).map(|i| (i % every != 0).then_some(size)).collect());
            }
            let first = match architecture {
                Architecture::Mistral | Architecture::Phi3 => 0,
                _ => self.map.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28),
            };
            return Ok((0..layers as u64).map(|i| (i >= first).then_some(size)).collect());
        };
        if types.len() != layers {
            return Err(Error::Config {
                path: self.origin.into(),
                message: format!("`layer_types` names {} layers of {layers}", types.len()),
            });
        }
        let window = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(Some(size)),
            Some("full_attention") => Ok(None),
            _ => Err(Error::UnsupportedKey {
                path: self.origin.into(),
                key: "layer_types".into(),
                value: kind.to_string(),
            }),
        };
        types.iter().map(window).collect()
    }

    /// A token id or a list of them.
    fn ids(&self, key: &str) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        match self.map.get(key) {
            Some(Value::Array(all)) => all.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        }
    }

    fn refuse_what_changes_the_maths(&self, architecture: Architecture) -> Result<(), Error> {
        let refuse = |key: &str, value: &Value| {
            Err(Error::UnsupportedKey {
                path: self.origin.into(),
                key: key.into(),
                value: value.to_string(),
            })
        };
        if let Some(value @ Value::Bool(true)) = self.map.get("mlp_bias") {
            return refuse("mlp_bias", value);
        }
        let own = match architecture {
            Architecture::Gemma3 => "gelu_pytorch_tanh",
            _ => "silu",
        };
        for key in ["hidden_act", "hidden_activation"] {
            match self.map.get(key) {
                None | Some(Value::Null) => {}
                Some(Value::String(act)) if act == own => {}
                Some(other) => return refuse(key, other),
            }
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            match self.map.get(key) {
                None | Some(Value::Null) => {}
                Some(cap) => return refuse(key, cap),
            }
        }
        if let Some(value @ Value::Bool(true)) = self.map.get("use_bidirectional_attention") {
            return refuse("use_bidirectional_attention", value);
        }
        if let Some(value @ Value::Bool(true)) = self.map.get("attention_bias")
            && architecture == Architecture::Phi3
        {
            return refuse("attention_bias", value);
        }
        let rope_types: &[&str] = match architecture {
            Architecture::Gemma3 => &["default"],
            Architecture::Phi3 => &["default", "longrope", "su"],
            _ => &["default", "llama3"],
        };
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(rope @ Value::Object(_)) = self.map.get(key) else { continue };
            let parts = ["full_attention", "sliding_attention"].map(|part| rope.get(part));
            for part in [Some(rope)].into_iter().chain(parts).flatten() {
                if rope_type(part).is_some_and(|kind| !rope_types.contains(&kind)) {
                    return refuse(key, rope);
                }
            }
        }
        match self.map.get("quantization_config") {
            None | Some(Value::Null) => Ok(()),
            Some(value) if *value == int8() => Ok(()),
            Some(value) => {
                let method = value.get("quant_method").and_then(Value::as_str);
                let bits = ["load_in_4bit", "load_in_8bit"]
                    .iter()
                    .zip(["4 bits", "8 bits"])
                    .find(|(key, _)| value.get(**key) == Some(&Value::Bool(true)));
                let how = method.into_iter().chain(bits.map(|(_, bits)| bits)).collect::<Vec<_>>();
                Err(Error::Quantised { path: self.origin.into(), how: how.join(", ") })
            }
        }
    }
}

fn rope_type(rope: &Value) -> Option<&str> {
    rope.get("rope_type").or(rope.get("type")).and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = r#"{"model_type":"llama","hidden_size":64,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"intermediate_size":128,"vocab_size":96,
        "tie_word_embeddings":true,"eos_token_id":[0,2]}"#;

    fn parse(json: &str) -> Result<Config, Error> {
        Config::parse(json, Path::new("config.json"))
    }

    #[test]
    fn what_is_written_reads_back() {
        let config = parse(TINY).unwrap();
        assert_eq!((config.head_dim, config.eos_token_ids.clone()), (16, vec![0, 2]));
        assert_eq!(parse(&config.to_json().to_string()).unwrap(), config);
        assert_eq!(
            config.parameters(),
            96 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 128) + 64
        );
    }

    #[test]
    fn windows_are_those_of_the_layers() {
        let window = r#""sliding_window":7,"use_sliding_window":true,"max_window_layers":1,"#;
        let types = r#""sliding_window":7,"layer_types":["sliding_attention","full_attention"],"#;
        for (architecture, keys, windows) in [
            ("llama", window, [None, None]),
            ("mistral", window, [Some(7), Some(7)]),
            ("mistral", types, [Some(7), None]),
            ("mistral", r#""sliding_window":null,"#, [None, None]),
            ("qwen2", window, [None, Some(7)]),
            ("qwen3", types, [None, None]),
            ("gemma3_text", window, [Some(7), Some(7)]),
            ("gemma3_text", types, [Some(7), None]),
            ("phi3", types, [Some(7), Some(7)]),
        ] {
            let json = TINY.replacen(
                "{\"model_type\":\"llama\",",
                &format!("{{{keys}\"model_type\":\"{architecture}\","),
                1,
            );
            assert_eq!(parse(&json).unwrap().windows, windows, "{json}");
        }
    }

    /// As Phi-3 was published, and as transformers 5 writes it.
    #[test]
    fn longrope_is_read_in_both_spellings() {
        let factors = r#""short_factor":[1,1.5],"long_factor":[2,4]"#;
        let old =
            format!(r#""partial_rotary_factor":0.25,"rope_scaling":{{"type":"su",{factors}}}"#);
        let new = format!(
            r#""rope_parameters":{{"rope_type":"longrope","partial_rotary_factor":0.25,{factors}}}"#
        );
        for rope in [&old, &new] {
            for (keys, original, attention) in [
                (r#""max_position_embeddings":131072,"#, 4096, (1.0_f64 + 5.0 / 12.0).sqrt()),
                (r#""original_max_position_embeddings":2048,"#, 2048, 1.0),
            ] {
                let phi = format!("{{{keys}{rope},\"model_type\":\"phi3\",");
                let config = parse(&TINY.replacen("{\"model_type\":\"llama\",", &phi, 1)).unwrap();
                let Some(RopeScaling::LongRope(scaling)) = config.rope_scaling else {
                    panic!("{phi}: no longrope");
                };
                assert_eq!(config.rotary_dim, 4);
                assert_eq!(
                    (scaling.short_factor, scaling.long_factor),
                    (vec![1.0, 1.5], vec![2.0, 4.0])
                );
                assert_eq!(scaling.original_max_positions, original);
                assert!((scaling.attention_factor - attention).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (from, to, message) in [
            (
                "llama",
                "gpt2",
                "config.json: architecture `gpt2` is not built yet; llama, mistral, qwen2, qwen3, gemma3_text and phi3 are",
            ),
            (
                "llama\"",
                "phi3\",\"rope_scaling\":{\"type\":\"yarn\"}",
                "config.json: `rope_scaling` = {\"type\":\"yarn\"} changes what the model computes, and is not built yet",
            ),
            (
                "llama\"",
                "phi3\",\"rope_scaling\":{\"type\":\"su\",\"short_factor\":[1]}",
                "config.json: a `rope_type` of longrope needs `short_factor`: 8 numbers above 0",
            ),
            (
                "llama\"",
                "phi3\",\"attention_bias\":true",
                "config.json: `attention_bias` = true changes what the model computes, and is not built yet",
            ),
            (
                "llama\"",
                "phi3\",\"partial_rotary_factor\":0.2",
                "config.json: positions cannot turn 3 of the 16 dimensions of a head",
            ),
            (
                "{\"model",
                "{\"partial_rotary_factor\":0.5,\"model",
                "config.json: `partial_rotary_factor` = 0.5 changes what the model computes, and is not built yet",
            ),
            ("\"vocab_size\":96,", "", "config.json has no `vocab_size`"),
            (
                "{\"model",
                "{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true},\"model",
                "config.json: the weights are quantised already (bitsandbytes, 4 bits)",
            ),
            (
                "{\"model",
                "{\"mlp_bias\":true,\"model",
                "config.json: `mlp_bias` = true changes what the model computes, and is not built yet",
            ),
            (
                "{\"model",
                "{\"hidden_act\":\"gelu\",\"model",
                "config.json: `hidden_act` = \"gelu\" changes what the model computes, and is not built yet",
            ),
            (
                "{\"model",
                "{\"rope_scaling\":{\"rope_type\":\"yarn\"},\"model",
                "config.json: `rope_scaling` = {\"rope_type\":\"yarn\"} changes what the model computes, and is not built yet",
            ),
            ("heads\":4", "heads\":0", "config.json: `num_attention_heads` is 0"),
        ] {
            let json = TINY.replacen(from, to, 1);
            assert_eq!(parse(&json).unwrap_err().to_string(), message);
        }
    }
}
