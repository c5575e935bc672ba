//! tokenizer.json and what stands beside it, as GGUF keys.
//!
//! Knows nothing of tensors. llama.cpp splits text by a rule that is named, not written down: the
//! name is found by comparing rules, and a rule without a name is refused. A wrong name would load
//! and give other tokens.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;
use checkpoint::chat::Template;
use checkpoint::config::{Architecture, Config};
use serde::Deserialize;
use serde_json::Value as Json;
use step::Failure;

use crate::format::Value;

pub mod rule;

use rule::Rule;

/// llama.cpp's token types.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A tokenizer's keys.
pub struct Keys {
    pub keys: Vec<(String, Value)>,
    /// What llama.cpp will do otherwise than transformers.
    pub notes: Vec<String>,
    /// Whether the file has to be called Phi-3: by its name llama.cpp decides that special tokens
    /// take the spaces after them along. None where it may not be: there it looks for Phi's tokens.
    phi: Option<bool>,
}

impl Keys {
    /// `general.name` of a model called `name`.
    pub fn name(&self, name: &str) -> String {
        let lower = name.to_lowercase();
        let called = ["phi-3", "phi3"].iter().any(|phi| lower.contains(phi));
        match (self.phi, called) {
            (None, true) => "model".into(),
            (Some(true), false) => format!("Phi-3-{name}"),
            _ => name.into(),
        }
    }
}

/// The parts of tokenizer.json that decide which tokens come out.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    #[serde(default)]
    post_processor: Json,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: usize,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    vocab: Json,
    #[serde(default)]
    merges: Vec<Json>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    unk_token: Option<String>,
}

/// The keys of the tokenizer in the folder `dir`.
pub fn read(dir: &Path, config: &Config) -> Result<Keys> {
    let path = dir.join("tokenizer.json");
    let file: File = serde_json::from_value(json(&path)?)
        .map_err(|e| Failure::input(format!("{}: {e}", path.display())))?;
    let rule = rule::of(&file).map_err(|what| {
        Failure::input(format!("{}: llama.cpp has no name for {what}", path.display())).hint(
            "known are byte-level BPE split as by GPT-2, SmolLM, Llama 3, Qwen 2 or Mistral's Tekken, \
             and the SentencePiece BPE of Llama 2 and Gemma",
        )
    })?;
    let vocab = Vocab::new(&file, config, &path)?;
    // llama.cpp throws where a model that is called Phi-3 lacks one of these.
    let has_all = ["</s>", "<unk>", "<s>", "<|endoftext|>"].iter().all(|t| vocab.id(t).is_some());
    let phi = has_all.then(|| {
        config.architecture == Architecture::Phi3 && file.added_tokens.iter().any(|a| a.rstrip)
    });
    let mut notes = vocab.notes.clone();
    notes.extend(rule.differences(&file).map(str::to_string));
    for added in &file.added_tokens {
        if added.lstrip || added.single_word || (added.rstrip && phi != Some(true)) {
            notes.push(format!(
                "tokenizer.json: {:?} takes the spaces or words beside it into account; llama.cpp \
                 does not",
                added.content
            ));
        }
    }
    let beside = json_or_nothing(&dir.join("tokenizer_config.json"))?;
    let roles = Roles::find(dir, &beside, config, &vocab, &file.model, &mut notes)?;

    let mut keys = Vec::new();
    let mut put = |key: &str, value: Value| keys.push((format!("tokenizer.{key}"), value));
    let merges = merges(&file.model, &path)?;
    match &rule {
        Rule::Bytes(pre) => {
            put("ggml.model", Value::Text("gpt2".into()));
            put("ggml.pre", Value::Text((*pre).into()));
        }
        Rule::Pieces { .. } => {
            put("ggml.model", Value::Text("llama".into()));
            put("ggml.pre", Value::Text("default".into()));
        }
    }
    put("ggml.tokens", Value::Texts(vocab.texts.clone()));
    match &rule {
        Rule::Bytes(_) => {
            put("ggml.token_type", Value::I32s(vocab.types.clone()));
            let joined = merges.iter().map(|[a, b]| format!("{} {}", solid(a), solid(b)));
            put("ggml.merges", Value::Texts(joined.collect()));
        }
        Rule::Pieces { .. } => {
            put("ggml.scores", Value::F32s(scores(&vocab, &merges)));
            put("ggml.token_type", Value::I32s(vocab.piece_types(&file.model)));
        }
    }
    let ids = [
        ("bos", Some(roles.bos.unwrap_or(roles.eos))),
        ("eos", Some(roles.eos)),
        ("eot", roles.eot),
        ("eom", roles.eom),
        ("unknown", roles.unknown),
        ("padding", roles.pad),
    ];
    for (role, id) in ids {
        if let Some(id) = id {
            put(&format!("ggml.{role}_token_id"), Value::U32(id));
        }
    }
    let space_prefix = matches!(rule, Rule::Pieces { space_prefix: true });
    put("ggml.add_space_prefix", Value::Bool(space_prefix));
    put("ggml.add_bos_token", Value::Bool(adds(&beside, &file, "bos", roles.bos, &vocab)));
    put("ggml.add_eos_token", Value::Bool(adds(&beside, &file, "eos", Some(roles.eos), &vocab)));
    if let Some(template) = template(dir, &beside)? {
        put("chat_template", Value::Text(template));
    }
    Ok(Keys { keys, notes, phi })
}

/// Tokens by id.
struct Vocab {
    texts: Vec<String>,
    types: Vec<i32>,
    ids: HashMap<String, u32>,
    notes: Vec<String>,
}

impl Vocab {
    fn new(file: &File, config: &Config, path: &Path) -> Result<Self> {
        let wrong = |message: String| Failure::input(format!("{}: {message}", path.display()));
        let vocab = file.model.vocab.as_object().ok_or_else(|| wrong("no `vocab`".into()))?;
        let plain = vocab.iter().map(|(text, id)| {
            let id = id.as_u64().ok_or_else(|| wrong(format!("token {text:?} has no id")))?;
            Ok((id as usize, text, NORMAL))
        });
        let mut slots: BTreeMap<usize, (&str, i32)> = BTreeMap::new();
        for entry in plain {
            let (id, text, kind) = entry.map_err(|e: Failure| e)?;
            if let Some((other, _)) = slots.insert(id, (text, kind)) {
                return Err(wrong(format!("{other:?} and {text:?} both have the id {id}")).into());
            }
        }
        let mut notes = Vec::new();
        for added in &file.added_tokens {
            // Gemma 3's text models have no embedding for the images' token.
            if added.id >= config.vocab_size {
                let text = &added.content;
                notes.push(format!("tokenizer.json: {text:?} is left out: it has no embedding"));
                continue;
            }
            let kind = match added.special {
                true => CONTROL,
                // Gemma's runs of spaces: as pieces they are merged all the same, and llama.cpp
                // writes them as spaces.
                false if added.content.contains('▁') && vocab.contains_key(&added.content) => {
                    NORMAL
                }
                false => USER_DEFINED,
            };
            let before = slots.insert(added.id, (&added.content, kind));
            if let Some((other, _)) = before.filter(|(other, _)| *other != added.content) {
                let text = &added.content;
                let message = format!("{other:?} and {text:?} both have the id {}", added.id);
                return Err(wrong(message).into());
            }
        }
        if let Some((id, (text, _))) =
            slots.last_key_value().filter(|(id, _)| **id >= config.vocab_size)
        {
            return Err(wrong(format!(
                "token {text:?} has the id {id}, the model has embeddings for {} tokens",
                config.vocab_size
            ))
            .hint("was the tokenizer made for this model?")
            .into());
        }
        let mut all = Self { texts: Vec::new(), types: Vec::new(), ids: HashMap::new(), notes };
        for id in 0..config.vocab_size {
            let (text, kind) = match slots.get(&id) {
                Some((text, kind)) => (text.to_string(), *kind),
                None => (format!("[PAD{id}]"), UNUSED),
            };
            // llama.cpp stops with an assertion where two tokens are one text.
            if all.ids.insert(text.clone(), id as u32).is_some() {
                return Err(wrong(format!("two tokens are {text:?}")).into());
            }
            all.texts.push(text);
            all.types.push(kind);
        }
        Ok(all)
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// The types where tokens are pieces: `<0x0A>` is a byte, `<unk>` stands for what is unknown.
    fn piece_types(&self, model: &Model) -> Vec<i32> {
        let unknown = model.unk_token.as_deref();
        let types = self.texts.iter().zip(&self.types).map(|(text, kind)| {
            let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
            match hex {
                Some(hex) if hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok() => BYTE,
                _ if Some(text.as_str()) == unknown => UNKNOWN,
                _ => *kind,
            }
        });
        types.collect()
    }
}

/// The tokens with a part to play.
struct Roles {
    bos: Option<u32>,
    eos: u32,
    /// What ends a turn, where that is not `eos`.
    eot: Option<u32>,
    /// One more end, where there are three.
    eom: Option<u32>,
    pad: Option<u32>,
    unknown: Option<u32>,
}

impl Roles {
    fn find(
        dir: &Path,
        beside: &Json,
        config: &Config,
        vocab: &Vocab,
        model: &Model,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let named = |role: &str| {
            let token = &beside[role];
            vocab.id(token.as_str().or_else(|| token["content"].as_str())?)
        };
        let generation = json_or_nothing(&dir.join("generation_config.json"))?;
        let mut ends: Vec<u32> = named("eos_token").into_iter().collect();
        ends.extend(ids(&generation["eos_token_id"]));
        ends.extend(&config.eos_token_ids);
        let end_of_turn = Template::from_dir(dir).and_then(|template| template.end_of_turn()).ok();
        let turn = end_of_turn.as_deref().and_then(|text| vocab.id(text));
        match (&end_of_turn, turn) {
            (Some(text), None) if text.is_empty() => {
                notes.push("the chat template writes nothing after an answer".into());
            }
            (Some(text), None) => notes.push(format!(
                "the chat template ends a turn with {text:?}, which is no token: llama.cpp will \
                 not stop there"
            )),
            _ => {}
        }
        ends.extend(turn);
        ends.retain(|id| (*id as usize) < vocab.texts.len());
        let Some(&eos) = ends.first() else {
            // llama.cpp would take token 11 of a `gpt2` tokenizer for it, and stop at commas.
            return Err(Failure::input(format!(
                "{}: no file says which token ends a text",
                dir.display()
            ))
            .hint("set `eos_token` in tokenizer_config.json")
            .into());
        };
        let mut others: Vec<u32> = Vec::new();
        for id in turn.into_iter().chain(ends) {
            if id != eos && !others.contains(&id) {
                others.push(id);
            }
        }
        // The template's own end goes into `eot`, else whatever there is.
        for id in others.iter().skip(2) {
            let text = &vocab.texts[*id as usize];
            notes.push(format!("{text:?} ends a text as well; GGUF has no key left for it"));
        }
        Ok(Self {
            bos: named("bos_token").or(config.bos_token_id),
            eos,
            eot: others.first().copied(),
            eom: others.get(1).copied(),
            pad: named("pad_token").or(config.pad_token_id),
            unknown: named("unk_token")
                .or_else(|| model.unk_token.as_ref().and_then(|text| vocab.id(text))),
        })
    }
}

/// Whether encoding adds the token of `role`: tokenizer_config.json says it, else the
/// post-processor of tokenizer.json does it.
fn adds(beside: &Json, file: &File, role: &str, id: Option<u32>, vocab: &Vocab) -> bool {
    if let Some(said) = beside[format!("add_{role}_token")].as_bool() {
        return said;
    }
    let Some(text) = id.map(|id| &vocab.texts[id as usize]) else { return false };
    let mut processors = vec![&file.post_processor];
    processors.extend(file.post_processor["processors"].as_array().into_iter().flatten());
    processors.iter().any(|processor| {
        let single = processor["single"].as_array();
        let end = match role {
            "bos" => single.and_then(|s| s.first()),
            _ => single.and_then(|s| s.last()),
        };
        end.is_some_and(|end| end["SpecialToken"]["id"] == text.as_str())
    })
}

/// Merges as pairs: they are written `"a b"` or `["a", "b"]`.
fn merges(model: &Model, path: &Path) -> Result<Vec<[String; 2]>, Failure> {
    let pair = |merge: &Json| match merge {
        Json::String(text) => {
            let (a, b) = text.split_once(' ')?;
            Some([a.to_string(), b.to_string()])
        }
        Json::Array(two) => match two.as_slice() {
            [Json::String(a), Json::String(b)] => Some([a.clone(), b.clone()]),
            _ => None,
        },
        _ => None,
    };
    let of = |merge| {
        pair(merge).ok_or_else(|| {
            Failure::input(format!("{}: {merge} is no merge of two tokens", path.display()))
        })
    };
    model.merges.iter().map(of).collect()
}

/// A space inside a token would end it in a merge; llama.cpp reads this letter for it.
fn solid(part: &str) -> String {
    part.replace(' ', "Ġ")
}

/// The scores by which llama.cpp merges: what comes of an earlier merge counts more. It merges
/// whatever two pieces are a token, so what no merge makes comes last of all.
fn scores(vocab: &Vocab, merges: &[[String; 2]]) -> Vec<f32> {
    let never = -(merges.len() as f32) - 1.0;
    let mut scores = vec![never; vocab.texts.len()];
    let mut made = 0u32;
    for [a, b] in merges {
        if let Some(id) = vocab.id(&format!("{a}{b}"))
            && scores[id as usize] == never
        {
            made += 1;
            scores[id as usize] = -(made as f32);
        }
    }
    scores
}

/// The chat template's text.
fn template(dir: &Path, beside: &Json) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(text) => return Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(checkpoint::Error::io(&path, e)).map_err(|e| Failure::from(e).into()),
    }
    Ok(match &beside["chat_template"] {
        Json::String(text) => Some(text.clone()),
        Json::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default");
            default.and_then(|t| t["template"].as_str()).map(str::to_string)
        }
        _ => None,
    })
}

fn ids(value: &Json) -> Vec<u32> {
    let id = |v: &Json| u32::try_from(v.as_u64()?).ok();
    match value {
        Json::Array(all) => all.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

fn json(path: &PathBuf) -> Result<Json> {
    let bytes = std::fs::read(path).map_err(|e| Failure::from(checkpoint::Error::io(path, e)))?;
    Ok(serde_json::from_slice(&bytes)
        .map_err(|e| Failure::input(format!("{} does not parse: {e}", path.display())))?)
}

fn json_or_nothing(path: &PathBuf) -> Result<Json> {
    if path.exists() { json(path) } else { Ok(Json::Null) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merges_come_in_two_spellings() {
        let model = |merges: Json| -> Model {
            serde_json::from_value(json!({"vocab": {}, "merges": merges})).unwrap()
        };
        let read = |merges| super::merges(&model(merges), Path::new("tokenizer.json"));
        let expected = vec![["a".to_string(), "b".to_string()], ["ab".into(), "c".into()]];
        assert_eq!(read(json!(["a b", "ab c"])).unwrap(), expected);
        assert_eq!(read(json!([["a", "b"], ["ab", "c"]])).unwrap(), expected);
        for bad in [json!(["ab"]), json!([["a"]]), json!([1])] {
            assert!(read(bad).unwrap_err().message.starts_with("tokenizer.json: "));
        }
    }
}
