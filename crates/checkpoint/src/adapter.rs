//! A PEFT adapter folder of plain LoRA, refused by name where it is more.
//!
//! Knows nothing of what becomes of the change that it tells. The tensors decide which layers are
//! changed, as they do when PEFT loads them; the config decides by how much.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::config::Config;
use crate::weights::{TensorRef, Weights};
use crate::{Error, names};

mod plain;

pub use plain::Plain;

pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter: the name of each weight that it changes → the change.
#[derive(Debug)]
pub struct Adapter {
    pub deltas: BTreeMap<String, Delta>,
    pub config: AdapterConfig,
    dir: PathBuf,
}

/// What an adapter adds to one linear layer: `scale · B · A`.
#[derive(Debug, PartialEq)]
pub struct Delta {
    /// \[rank, in\], row-major.
    pub a: Vec<f32>,
    /// \[out, rank\], row-major.
    pub b: Vec<f32>,
    pub rank: usize,
    pub alpha: f64,
    pub scale: f64,
}

impl Delta {
    /// \[out, in\] of the layer.
    pub fn shape(&self) -> [usize; 2] {
        [self.b.len() / self.rank, self.a.len() / self.rank]
    }
}

/// adapter_config.json, but for what it takes to train on.
#[derive(Debug, Deserialize)]
pub struct AdapterConfig {
    peft_type: String,
    pub r: usize,
    pub lora_alpha: f64,
    #[serde(default)]
    pub use_rslora: bool,
    #[serde(default)]
    pub lora_dropout: f64,
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    #[serde(default)]
    pub revision: Option<String>,
    /// Names of modules, ends of such names, or one regular expression.
    #[serde(default)]
    target_modules: Value,
    #[serde(default)]
    exclude_modules: Value,
    #[serde(default)]
    layers_to_transform: Value,
    #[serde(default)]
    rank_pattern: Option<Patterns<usize>>,
    #[serde(default)]
    alpha_pattern: Option<Patterns<f64>>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    init_lora_weights: Value,
}

/// Keys that, unless they are empty, make an adapter more than `scale · B · A`.
const MORE: [&str; 14] = [
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
];

const INSTEAD: &str = "train it as plain LoRA, or merge it with PEFT and take the merged model";
const AGAIN: &str = "save the adapter again with PEFT's `save_pretrained`";

impl Adapter {
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(CONFIG);
        if !path.is_file() {
            return Err(refused(dir, format!("there is no {CONFIG}")).hint(
                "a PEFT adapter is a folder with adapter_config.json and adapter_model.safetensors",
            ));
        }
        let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let parse =
            |e: serde_json::Error| Error::Parse { path: path.clone(), message: e.to_string() };
        let config: AdapterConfig = serde_json::from_slice(&text).map_err(parse)?;
        let all: Value = serde_json::from_slice(&text).map_err(parse)?;
        config.refuse(&all, &path)?;

        let path = dir.join(WEIGHTS);
        if !path.is_file() {
            let old = dir.join("adapter_model.bin").is_file();
            let (message, hint) = match old {
                true => (
                    "adapter_model.bin is a pickle, which is never loaded",
                    "save it as safetensors: PEFT's `save_pretrained` does so by itself",
                ),
                false => ("there is no adapter_model.safetensors", AGAIN),
            };
            return Err(refused(dir, message).hint(hint));
        }
        let weights = Weights::open_file(&path)?;
        let mut modules: Vec<&str> = Vec::new();
        for name in weights.names() {
            let module = name.strip_prefix(PREFIX);
            let parts = module.and_then(|m| m.strip_suffix(".weight")?.rsplit_once(".lora_"));
            match parts {
                Some((module, "A" | "B")) => modules.push(module),
                _ => {
                    let message = format!("`{name}` is no part of a plain LoRA adapter");
                    return Err(refused(&path, message).hint(INSTEAD));
                }
            }
        }
        modules.dedup();
        let mut deltas = BTreeMap::new();
        for module in modules {
            let part = |part| {
                let name = tensor_name(module, part);
                if !weights.contains(&name) {
                    let message = format!("`{module}` has no {part}: `{name}` is missing");
                    return Err(refused(&path, message).hint(AGAIN));
                }
                weights.get(&name)
            };
            let delta = config.delta(module, &part('A')?, &part('B')?, &path)?;
            deltas.insert(format!("{module}.weight"), delta);
        }
        if deltas.is_empty() {
            return Err(refused(&path, "the adapter changes nothing").hint(AGAIN));
        }
        Ok(Self { deltas, config, dir: dir.into() })
    }

    /// Holds names and shapes to those of a base.
    pub fn check(&self, base: &Config) -> Result<(), Error> {
        const WHICH: &str = "was the adapter trained on this base?";
        if base.tied && self.deltas.contains_key(names::LM_HEAD) {
            let message = "the adapter changes lm_head, which this base shares with its embedding";
            return Err(refused(&self.dir, message)
                .hint("train the adapter without lm_head among its target_modules"));
        }
        let there: BTreeMap<_, _> = names::expected(base).into_iter().collect();
        for (name, delta) in &self.deltas {
            let [out, width] = delta.shape();
            let message = match there.get(name) {
                Some(shape) if *shape == [out, width] => continue,
                Some(shape) => format!(
                    "`{name}` is {shape:?} in the base, the adapter changes {out} × {width}"
                ),
                None => format!("the base has no `{name}`, which the adapter changes"),
            };
            return Err(refused(&self.dir, message).hint(WHICH));
        }
        Ok(())
    }

    /// What PEFT's `target_modules` has to be: the config's own list, sorted. Where an expression or
    /// other keys choose among the layers, all of them by their full names.
    pub fn targets(&self) -> Vec<String> {
        let config = &self.config;
        let mut targets: Vec<String> = match &config.target_modules {
            Value::Array(list)
                if is_empty(&config.exclude_modules) && config.layers_to_transform.is_null() =>
            {
                list.iter().filter_map(Value::as_str).map(str::to_string).collect()
            }
            _ => self.deltas.keys().map(|name| name.trim_end_matches(".weight").into()).collect(),
        };
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    /// Whether every B is still zero, as training finds it: the adapter changes nothing.
    pub fn untrained(&self) -> bool {
        self.deltas.values().all(|delta| delta.b.iter().all(|x| *x == 0.0))
    }
}

const PREFIX: &str = "base_model.model.";

/// What PEFT calls matrix `A` or `B` of a module: `base_model.model.….q_proj.lora_A.weight`.
pub fn tensor_name(module: &str, part: char) -> String {
    format!("{PREFIX}{module}.lora_{part}.weight")
}

impl AdapterConfig {
    /// `all` is the whole of the config.
    fn refuse(&self, all: &Value, path: &Path) -> Result<(), Error> {
        let more = MORE.iter().find(|key| !is_empty(&all[**key]));
        let bias = self.bias.as_deref().unwrap_or("none");
        // PiSSA, OLoRA, CorDA, LoftQ: the matrices are the change of another base.
        let init = match &self.init_lora_weights {
            Value::Null | Value::Bool(_) => None,
            Value::String(s) if ["gaussian", "eva", "orthogonal"].contains(&s.as_str()) => None,
            other => Some(other),
        };
        let what = if self.peft_type != "LORA" {
            format!("peft_type = {}", self.peft_type)
        } else if let Some(key) = more {
            key.to_string()
        } else if bias != "none" {
            format!("bias = {bias}")
        } else if let Some(init) = init {
            format!("init_lora_weights = {init}")
        } else if let Some(pattern) = self.patterns().find(|pattern| !is_plain(pattern)) {
            format!("the pattern `{pattern}`, a regular expression,")
        } else if self.r == 0 || self.ranks().any(|rank| rank == 0) {
            "r = 0".to_string()
        } else {
            return Ok(());
        };
        Err(refused(path, format!("{what} is not built yet; plain LoRA is")).hint(INSTEAD))
    }

    fn patterns(&self) -> impl Iterator<Item = &str> {
        let ranks = self.rank_pattern.iter().flat_map(|p| p.0.iter().map(|(key, _)| key));
        let alphas = self.alpha_pattern.iter().flat_map(|p| p.0.iter().map(|(key, _)| key));
        ranks.chain(alphas).map(String::as_str)
    }

    fn ranks(&self) -> impl Iterator<Item = usize> {
        self.rank_pattern.iter().flat_map(|p| p.0.iter().map(|(_, rank)| *rank))
    }

    fn delta(
        &self,
        module: &str,
        a: &TensorRef,
        b: &TensorRef,
        path: &Path,
    ) -> Result<Delta, Error> {
        if let Value::Array(targets) = &self.target_modules
            && !targets.iter().filter_map(Value::as_str).any(|target| is_end(target, module))
        {
            let message = format!("`{module}` is not among the config's target_modules");
            return Err(refused(path, message).hint(AGAIN));
        }
        let rank = self.rank_pattern.as_ref().and_then(|p| p.of(module)).unwrap_or(self.r);
        let alpha = self.alpha_pattern.as_ref().and_then(|p| p.of(module));
        let alpha = alpha.unwrap_or(self.lora_alpha);
        let fits = a.shape.len() == 2
            && b.shape.len() == 2
            && a.shape[0] == rank
            && b.shape[1] == rank
            && !a.is_empty()
            && !b.is_empty();
        if !fits {
            let message = format!(
                "`{module}` has A {:?} and B {:?}, the config says r = {rank}",
                a.shape, b.shape
            );
            return Err(refused(path, message).hint(AGAIN));
        }
        Ok(Delta {
            a: finite(a, path)?,
            b: finite(b, path)?,
            rank,
            alpha,
            scale: alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 },
        })
    }
}

/// Whether a key says no more than if it were left out.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn finite(tensor: &TensorRef, path: &Path) -> Result<Vec<f32>, Error> {
    let values = tensor.to_f32()?;
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => {
            let (row, column) = (at / tensor.shape[1], at % tensor.shape[1]);
            let message = format!("`{}` is {} at [{row}, {column}]", tensor.name, values[at]);
            Err(refused(path, message).hint("training diverged: lower its learning rate"))
        }
        None => Ok(values),
    }
}

/// Patterns of modules' names → a value. In the order of the file: the first that fits is taken.
#[derive(Debug)]
struct Patterns<T>(Vec<(String, T)>);

impl<T: Copy> Patterns<T> {
    fn of(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(pattern, _)| fits(pattern, module)).map(|(_, value)| *value)
    }
}

/// Whether a pattern means what it says, but for its dots.
fn is_plain(pattern: &str) -> bool {
    let name = pattern.strip_prefix('^').unwrap_or(pattern);
    name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
}

/// As `re.match(rf"(.*\.)?({pattern})$", module)` for a plain pattern, in which a dot is any
/// character: `get_pattern_key` in peft/utils/other.py.
fn fits(pattern: &str, module: &str) -> bool {
    let (pattern, whole) = match pattern.strip_prefix('^') {
        Some(pattern) => (pattern, true),
        None => (pattern, false),
    };
    let Some(before) = module.len().checked_sub(pattern.len()) else { return false };
    let (before, end) = module.as_bytes().split_at(before);
    let same = pattern.bytes().zip(end).all(|(p, c)| p == b'.' || p == *c);
    same && (before.is_empty() || (!whole && before.ends_with(b".")))
}

/// Whether `target` is a module's name or ends it: PEFT's rule for a list of target modules.
fn is_end(target: &str, module: &str) -> bool {
    module.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("patterns of modules' names, each with a number")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut all = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    all.push(entry);
                }
                Ok(Patterns(all))
            }
        }

        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

/// A refusal that still wants its hint.
struct Refusal {
    path: PathBuf,
    message: String,
}

fn refused(path: &Path, message: impl Into<String>) -> Refusal {
    Refusal { path: path.into(), message: message.into() }
}

impl Refusal {
    fn hint(self, hint: &'static str) -> Error {
        Error::Adapter { path: self.path, message: self.message, hint }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Dtype, Spec, Writer};
    use serde_json::json;
    use step::Failure;

    /// A folder as PEFT wrote it.
    fn golden(architecture: &str, which: &str) -> PathBuf {
        let merge = Path::new(env!("CARGO_MANIFEST_DIR")).join("../merge/tests/golden");
        merge.join(architecture).join(which)
    }

    fn base(architecture: &str) -> Config {
        let train = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/src/worker/golden");
        Config::read(&train.join(architecture)).unwrap()
    }

    #[test]
    fn what_peft_saves_is_read() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3"] {
            let base = base(architecture);
            for which in ["first", "second"] {
                let adapter = Adapter::read(&golden(architecture, which)).unwrap();
                adapter.check(&base).unwrap();
                assert!(!adapter.untrained());
            }
            let adapter = Adapter::read(&golden(architecture, "first")).unwrap();
            assert_eq!(adapter.deltas.len(), base.num_layers * names::LINEARS.len());
        }
    }

    #[test]
    fn ranks_and_alphas_follow_the_first_pattern_that_fits() {
        let adapter = Adapter::read(&golden("llama", "second")).unwrap();
        for (layer, part, rank, alpha) in [
            (0, "self_attn.q_proj", 2, 5.0),
            (1, "self_attn.q_proj", 1, 5.0),
            (0, "self_attn.v_proj", 2, 3.5),
            (1, "self_attn.v_proj", 2, 7.0),
            (1, "mlp.down_proj", 4, 5.0),
        ] {
            let delta = &adapter.deltas[&names::layer(layer, part)];
            assert_eq!((delta.rank, delta.alpha), (rank, alpha), "{layer} {part}");
            assert_eq!(delta.scale, alpha / (rank as f64).sqrt());
        }
    }

    #[test]
    fn patterns_fit_as_in_peft() {
        let module = "model.layers.1.self_attn.q_proj";
        for (pattern, same) in [
            (module, true),
            ("q_proj", true),
            ("self_attn.q_proj", true),
            ("layers.1.self_attn", false),
            ("_proj", false),
            ("^q_proj", false),
            ("^model.layers.1.self_attn.q_proj", true),
            ("model.layers.2.self_attn.q_proj", false),
            ("self.attn.q_proj", true),
            ("one.model.layers.1.self_attn.q_proj", false),
        ] {
            assert_eq!(fits(pattern, module), same, "{pattern}");
        }
        assert!(is_plain("^model.layers.1.q_proj") && !is_plain("layers\\.[01].*"));
    }

    const PLAIN: &str = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q"]}"#;

    fn write(dir: &Path, config: &str, tensors: &[(&str, &[usize], f32)]) {
        std::fs::write(dir.join(CONFIG), config).unwrap();
        let specs = tensors.iter().map(|(name, shape, _)| Spec::new(*name, Dtype::F32, shape));
        let mut writer = Writer::create(&dir.join(WEIGHTS), specs.collect()).unwrap();
        for spec in writer.order() {
            let (_, _, last) = tensors.iter().find(|(name, _, _)| *name == spec.name).unwrap();
            let mut values = vec![0.5; spec.shape.iter().product()];
            *values.last_mut().unwrap() = *last;
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.write(&spec.name, &bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    const A: &str = "base_model.model.l.q.lora_A.weight";
    const B: &str = "base_model.model.l.q.lora_B.weight";

    #[test]
    fn what_is_no_plain_lora_is_refused_by_name() {
        let with = |key: &str, value: Value| {
            let mut config: Value = serde_json::from_str(PLAIN).unwrap();
            config[key] = value;
            config.to_string()
        };
        for (config, message) in [
            (with("peft_type", json!("LOHA")), "peft_type = LOHA is not built yet"),
            (with("use_dora", json!(true)), "use_dora is not built yet"),
            (with("modules_to_save", json!(["lm_head"])), "modules_to_save is not built yet"),
            (with("bias", json!("all")), "bias = all is not built yet"),
            (with("fan_in_fan_out", json!(true)), "fan_in_fan_out is not built yet"),
            (with("lora_bias", json!(true)), "lora_bias is not built yet"),
            (with("layer_replication", json!([[0, 1]])), "layer_replication is not built yet"),
            (with("init_lora_weights", json!("pissa")), "init_lora_weights = \"pissa\" is not"),
            (with("rank_pattern", json!({"q|k": 1})), "the pattern `q|k`, a regular expression,"),
            (with("alpha_pattern", json!({"q": "x"})), "does not parse"),
            (with("r", json!(0)), "r = 0 is not built yet"),
            (with("r", json!(3)), "the config says r = 3"),
            (with("rank_pattern", json!({"q": 3})), "the config says r = 3"),
            (
                with("target_modules", json!(["k"])),
                "`l.q` is not among the config's target_modules",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &config, &[(A, &[2, 4], 1.0), (B, &[3, 2], 1.0)]);
            let error = Adapter::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn targets_are_the_configs_own_list_or_full_names() {
        let chosen = PLAIN.replacen('{', "{\"layers_to_transform\":[0],", 1);
        for (config, targets) in [
            (PLAIN.replace("[\"q\"]", "[\"q\",\"k\",\"q\"]"), vec!["k", "q"]),
            (PLAIN.replace("[\"q\"]", "\".*q\""), vec!["l.q"]),
            (chosen, vec!["l.q"]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &config, &[(A, &[2, 4], 1.0), (B, &[3, 2], 0.5)]);
            assert_eq!(Adapter::read(dir.path()).unwrap().targets(), targets, "{config}");
        }
    }

    #[test]
    fn damaged_tensors_are_named() {
        type Tensors<'a> = &'a [(&'a str, &'a [usize], f32)];
        let extra = "base_model.model.l.q.lora_magnitude_vector";
        let cases: [(Tensors, &str); 7] = [
            (
                &[(A, &[2, 4], 1.0)],
                "`l.q` has no B: `base_model.model.l.q.lora_B.weight` is missing",
            ),
            (&[(B, &[3, 2], 1.0)], "`l.q` has no A"),
            (&[(A, &[2, 4], 1.0), (B, &[2, 3], 1.0)], "has A [2, 4] and B [2, 3]"),
            (&[(A, &[2, 4, 1], 1.0), (B, &[3, 2], 1.0)], "has A [2, 4, 1]"),
            (&[(A, &[2, 4], f32::NAN), (B, &[3, 2], 1.0)], "lora_A.weight` is NaN at [1, 3]"),
            (&[(A, &[2, 4], 1.0), (B, &[3, 2], f32::INFINITY)], "lora_B.weight` is inf at [2, 1]"),
            (
                &[(A, &[2, 4], 1.0), (B, &[3, 2], 1.0), (extra, &[3], 1.0)],
                "lora_magnitude_vector` is no part of a plain LoRA adapter",
            ),
        ];
        for (tensors, message) in cases {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), PLAIN, tensors);
            let error = Adapter::read(dir.path()).unwrap_err().called(dir.path(), "mine");
            assert!(error.message.contains(message), "{error}");
            assert!(error.message.starts_with("mine/adapter_model.safetensors: "), "{error}");
            assert!(error.hint.is_some());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let message = || Adapter::read(dir.path()).unwrap_err().to_string();
        assert!(message().contains("there is no adapter_config.json"));
        std::fs::write(dir.path().join(CONFIG), PLAIN).unwrap();
        assert!(message().contains("there is no adapter_model.safetensors"));
        std::fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
        assert!(message().contains("adapter_model.bin is a pickle"));
    }

    #[test]
    fn a_base_that_does_not_go_with_it_is_refused() {
        let adapter = Adapter::read(&golden("gemma3", "second")).unwrap();
        let (mut short, mut wide) = (base("gemma3"), base("gemma3"));
        short.num_layers = 1;
        wide.hidden_size = 32;
        for (base, message) in [
            (
                short,
                "the base has no `model.layers.1.mlp.down_proj.weight`, which the adapter changes",
            ),
            (wide, "is [32, 40] in the base, the adapter changes 24 × 40"),
        ] {
            let error = Failure::from(adapter.check(&base).unwrap_err());
            assert!(error.message.contains(message), "{error}");
            assert_eq!(error.hint.as_deref(), Some("was the adapter trained on this base?"));
        }
    }
}
