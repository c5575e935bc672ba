//! tokenizer.json and what stands beside it, as GGUF keys.
//!
//! Knows nothing of tensors. llama.cpp splits text by a rule that is named, not written down: the
//! name is found by comparing rules, and a rule without a name is refused. A wrong name would load
//! and give other tokens.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use anyhow::Result;
use checkpoint::chat::Template;
use checkpoint::config::{Architecture, Config};
use checkpoint::tokens;
use foldhash::{HashMap, HashMapExt};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
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
    vocab: tokens::Vocab,
    #[serde(default)]
    merges: Merges,
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

/// Pairs of tokens that become one, the earlier the sooner. A large tokenizer has half a million, so
/// they share one piece of memory. They are written `"a b"` or `["a", "b"]`.
#[derive(Default)]
struct Merges {
    text: String,
    /// Where in `text` the first of a pair ends, and where the second.
    ends: Vec<[usize; 2]>,
}

/// One of them.
#[derive(Debug, PartialEq)]
struct Merge<'a> {
    made: &'a str,
    /// Where in `made` the second begins.
    second: usize,
}

impl Merges {
    fn push(&mut self, first: &str, second: &str) {
        self.text += first;
        let middle = self.text.len();
        self.text += second;
        self.ends.push([middle, self.text.len()]);
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn iter(&self) -> impl Iterator<Item = Merge<'_>> {
        self.ends.iter().scan(0, |from, [middle, end]| {
            let from = std::mem::replace(from, *end);
            Some(Merge { made: &self.text[from..*end], second: middle - from })
        })
    }
}

impl Merge<'_> {
    /// As a GGUF key has it. A space inside a token would end it; llama.cpp reads this letter for it.
    fn text(&self) -> String {
        let solid = |part: &str| part.replace(' ', "Ġ");
        let (first, second) = self.made.split_at(self.second);
        format!("{} {}", solid(first), solid(second))
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Merges;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("merges")
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Merges, S::Error> {
                let mut merges = Merges::default();
                while let Some(Pair(first, second)) = seq.next_element()? {
                    merges.push(&first, &second);
                }
                Ok(merges)
            }
        }
        deserializer.deserialize_seq(All)
    }
}

/// A merge as it is written. Parts that stand alone are not copied, unless something is escaped.
struct Pair<'a>(Cow<'a, str>, Cow<'a, str>);

impl<'de> Deserialize<'de> for Pair<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Part<'a>(#[serde(borrow)] Cow<'a, str>);
        struct Two;
        impl<'de> Visitor<'de> for Two {
            type Value = Pair<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge of two tokens")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Pair<'de>, E> {
                let (first, second) = text
                    .split_once(' ')
                    .ok_or_else(|| E::custom(format!("{text:?} is no merge of two tokens")))?;
                Ok(Pair(first.to_string().into(), second.to_string().into()))
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Pair<'de>, S::Error> {
                let mut part = |at: usize| match seq.next_element()? {
                    Some(Part(text)) => Ok(text),
                    None => Err(S::Error::invalid_length(at, &Two)),
                };
                Ok(Pair(part(0)?, part(1)?))
            }
        }
        deserializer.deserialize_any(Two)
    }
}

/// The keys of the tokenizer in the folder `dir`.
pub fn read(dir: &Path, config: &Config) -> Result<Keys> {
    let path = dir.join("tokenizer.json");
    let bytes = bytes(&path)?;
    let file: File = serde_json::from_slice(&bytes)
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
    put("ggml.tokens", Value::Texts(vocab.texts.iter().map(|text| text.to_string()).collect()));
    match &rule {
        Rule::Bytes(_) => {
            put("ggml.token_type", Value::I32s(vocab.types.clone()));
            let merges = file.model.merges.iter().map(|merge| merge.text());
            put("ggml.merges", Value::Texts(merges.collect()));
        }
        Rule::Pieces { .. } => {
            put("ggml.scores", Value::F32s(scores(&vocab, &file.model.merges)));
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
struct Vocab<'a> {
    texts: Vec<Cow<'a, str>>,
    types: Vec<i32>,
    ids: HashMap<Cow<'a, str>, u32>,
    notes: Vec<String>,
}

impl<'a> Vocab<'a> {
    fn new(file: &'a File, config: &Config, path: &Path) -> Result<Self> {
        let wrong = |message: String| Failure::input(format!("{}: {message}", path.display()));
        let both =
            |a: &str, b: &str, id: usize| wrong(format!("{a:?} and {b:?} both have the id {id}"));
        if file.model.vocab.0.is_empty() {
            return Err(wrong("no `vocab`".into()).into());
        }
        // By id: the text and the type.
        let mut slots: Vec<Option<(&str, i32)>> = vec![None; config.vocab_size];
        let mut beyond = None;
        for (text, id) in &file.model.vocab.0 {
            let id = *id as usize;
            match slots.get_mut(id) {
                Some(slot) => {
                    if let Some((other, _)) = slot.replace((text, NORMAL)) {
                        return Err(both(other, text, id).into());
                    }
                }
                None => beyond = beyond.max(Some((id, text))),
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
                false if added.content.contains('▁') && slots[added.id].is_some() => NORMAL,
                false => USER_DEFINED,
            };
            let before = slots[added.id].replace((&added.content, kind));
            if let Some((other, _)) = before.filter(|(other, _)| *other != added.content) {
                return Err(both(other, &added.content, added.id).into());
            }
        }
        if let Some((id, text)) = beyond {
            return Err(wrong(format!(
                "token {text:?} has the id {id}, the model has embeddings for {} tokens",
                config.vocab_size
            ))
            .hint("was the tokenizer made for this model?")
            .into());
        }
        let mut ids = HashMap::with_capacity(slots.len());
        let (mut texts, mut types) = (Vec::new(), Vec::new());
        for (id, slot) in slots.into_iter().enumerate() {
            let (text, kind) = match slot {
                Some((text, kind)) => (Cow::Borrowed(text), kind),
                None => (Cow::Owned(format!("[PAD{id}]")), UNUSED),
            };
            // llama.cpp stops with an assertion where two tokens are one text.
            if ids.insert(text.clone(), id as u32).is_some() {
                return Err(wrong(format!("two tokens are {text:?}")).into());
            }
            texts.push(text);
            types.push(kind);
        }
        Ok(Self { texts, types, ids, notes })
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
                _ if Some(text.as_ref()) == unknown => UNKNOWN,
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
        end.is_some_and(|end| end["SpecialToken"]["id"] == text.as_ref())
    })
}

/// The scores by which llama.cpp merges: what comes of an earlier merge counts more. It merges
/// whatever two pieces are a token, so what no merge makes comes last of all.
fn scores(vocab: &Vocab, merges: &Merges) -> Vec<f32> {
    let never = -(merges.len() as f32) - 1.0;
    let mut scores = vec![never; vocab.texts.len()];
    let mut made = 0u32;
    for merge in merges.iter() {
        if let Some(id) = vocab.id(merge.made)
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

fn bytes(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|e| checkpoint::Error::io(path, e).into())
}

fn json(path: &Path) -> Result<Json> {
    Ok(serde_json::from_slice(&bytes(path)?)
        .map_err(|e| Failure::input(format!("{} does not parse: {e}", path.display())))?)
}

fn json_or_nothing(path: &Path) -> Result<Json> {
    if path.exists() { json(path) } else { Ok(Json::Null) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merges_come_in_two_spellings() {
        let read = |merges: Json| {
            let text = json!({"merges": merges}).to_string();
            serde_json::from_str::<Model>(&text).map(|model| model.merges)
        };
        for written in [json!(["a b", "ab c\n"]), json!([["a", "b"], ["ab", "c\n"]])] {
            let merges = read(written).unwrap();
            let all: Vec<Merge> = merges.iter().collect();
            assert_eq!(merges.len(), 2);
            assert_eq!(all, [Merge { made: "ab", second: 1 }, Merge { made: "abc\n", second: 2 }]);
        }
        for bad in [json!(["ab"]), json!([["a"]]), json!([["a", "b", "c"]]), json!([1])] {
            assert!(read(bad).is_err());
        }
        assert_eq!(Merge { made: "a b c", second: 3 }.text(), "aĠb Ġc");
    }
}
