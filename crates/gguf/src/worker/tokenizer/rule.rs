//! How text is cut before it is merged, by llama.cpp's name for it.
//!
//! Names are found by comparing rules, as models have them written; a rule without a name is refused.

use serde_json::Value as Json;

use super::File;

/// Which of llama.cpp's tokenizers it is.
pub(super) enum Rule {
    /// `gpt2`: bytes as letters, split by the named rule.
    Bytes(&'static str),
    /// `llama`: SentencePiece's habits, with a space before the text or not.
    Pieces { space_prefix: bool },
}

impl Rule {
    /// Where llama.cpp's rule is not quite the tokenizer's.
    pub(super) fn differences(&self, file: &File) -> impl Iterator<Item = &'static str> {
        let scheme = file.pre_tokenizer["prepend_scheme"].as_str();
        [
            (
                file.normalizer["type"] == "NFC",
                "tokenizer.json composes letters and accents (NFC), llama.cpp takes them as they come: \
                 the same for text that is composed, as nearly all is",
            ),
            (
                matches!(self, Rule::Bytes("tekken")),
                "llama.cpp's tekken tells small letters from capitals in ASCII only, and cuts words at \
                 combining marks: there it may give other tokens than transformers",
            ),
            (
                scheme == Some("always"),
                "tokenizer.json puts a space before text that begins with none; llama.cpp puts one before \
                 any",
            ),
            (
                scheme == Some("first"),
                "tokenizer.json puts a space before a text, but not after special tokens; llama.cpp puts \
                 none: the same for chats, whose templates begin with a special token",
            ),
        ]
        .into_iter()
        .filter_map(|(so, note)| so.then_some(note))
    }
}

// Written in tokenizer.json as these models have it.
pub const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's name for how this tokenizer cuts text, or what it has no name for.
pub(super) fn of(file: &File) -> Result<Rule, String> {
    let model = &file.model;
    match model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(other) => return Err(format!("a model of type {other}")),
    }
    for (key, part) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if let Some(part) = part.as_ref().filter(|part| !part.is_empty()) {
            return Err(format!("a {key} of {part:?}"));
        }
    }
    if model.byte_fallback {
        return pieces(file);
    }
    let pre = split(&file.pre_tokenizer)
        .ok_or_else(|| format!("the pre_tokenizer {}", brief(&file.pre_tokenizer)))?;
    // llama.cpp takes whole tokens before merges in these rules, and in no other.
    if model.ignore_merges != matches!(pre, "llama-bpe" | "tekken") {
        return Err(format!("the split of {pre} with ignore_merges = {}", model.ignore_merges));
    }
    match file.normalizer["type"].as_str() {
        None => Ok(Rule::Bytes(pre)),
        // Qwen 2 comes with it, and llama.cpp's qwen2 leaves it out.
        Some("NFC") if pre == "qwen2" => Ok(Rule::Bytes(pre)),
        Some(_) => Err(format!("the normalizer {}", brief(&file.normalizer))),
    }
}

/// The name of a byte-level split.
fn split(pre_tokenizer: &Json) -> Option<&'static str> {
    let parts: Vec<&Json> = match pre_tokenizer["pretokenizers"].as_array() {
        Some(all) => all.iter().collect(),
        None => vec![pre_tokenizer],
    };
    let (bytes, before) = parts.split_last()?;
    let plain = bytes["type"] == "ByteLevel" && bytes["add_prefix_space"] != true;
    // Left out, it is true.
    let by_itself = bytes["use_regex"] != false;
    match before {
        _ if !plain => None,
        [] if by_itself => Some("gpt-2"),
        [digits] if by_itself && digits["type"] == "Digits" => {
            (digits["individual_digits"] == true).then_some("smollm")
        }
        [split] if !by_itself && split["type"] == "Split" => {
            let isolated = split["behavior"] == "Isolated" && split["invert"] != true;
            match split["pattern"]["Regex"].as_str()? {
                LLAMA_3 if isolated => Some("llama-bpe"),
                QWEN_2 if isolated => Some("qwen2"),
                TEKKEN if isolated => Some("tekken"),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Llama 2's and Gemma's way: spaces become `▁`, with or without one before the text, and nothing
/// is split.
fn pieces(file: &File) -> Result<Rule, String> {
    let refuse = |part: &str, value: &Json| Err(format!("the {part} {}", brief(value)));
    let normalizers: Vec<&Json> = match file.normalizer["normalizers"].as_array() {
        Some(all) => all.iter().collect(),
        None if file.normalizer.is_null() => Vec::new(),
        None => vec![&file.normalizer],
    };
    let is_space =
        |n: &Json| n["type"] == "Replace" && n["pattern"]["String"] == " " && n["content"] == "▁";
    let is_prefix = |n: &Json| n["type"] == "Prepend" && n["prepend"] == "▁";
    // Gemma splits at spaces, of which there are none left by then.
    let splits = |pre: &Json| {
        let at_spaces = pre["type"] == "Split" && pre["pattern"]["String"] == " ";
        !pre.is_null() && (!at_spaces || pre["invert"] == true)
    };
    let space_prefix = match (normalizers.as_slice(), &file.pre_tokenizer) {
        ([prefix, space], pre) if is_prefix(prefix) && is_space(space) && !splits(pre) => true,
        ([space], pre) if is_space(space) && !splits(pre) => false,
        ([], pre) if pre["type"] == "Metaspace" && pre["replacement"] == "▁" => {
            match pre["prepend_scheme"].as_str() {
                _ if pre["split"] != false => return refuse("pre_tokenizer", pre),
                Some("never" | "first") => false,
                Some("always") => true,
                _ => return refuse("pre_tokenizer", pre),
            }
        }
        (_, Json::Null) => return refuse("normalizer", &file.normalizer),
        _ => return refuse("pre_tokenizer", &file.pre_tokenizer),
    };
    Ok(Rule::Pieces { space_prefix })
}

/// A piece of JSON in an error message.
fn brief(value: &Json) -> String {
    let text = value.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn named(pre_tokenizer: Json, model: Json) -> Result<String, String> {
        let mut file = json!({"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE"}});
        for (key, value) in model.as_object().unwrap() {
            match key.as_str() {
                "normalizer" => file["normalizer"] = value.clone(),
                _ => file["model"][key] = value.clone(),
            }
        }
        match of(&serde_json::from_value(file).unwrap())? {
            Rule::Bytes(pre) => Ok(pre.into()),
            Rule::Pieces { space_prefix } => Ok(format!("pieces {space_prefix}")),
        }
    }

    #[test]
    fn splits_have_names() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let inner = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let digits = |one: bool| json!({"type": "Digits", "individual_digits": one});
        let by = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let sequence = |parts: &[Json]| json!({"type": "Sequence", "pretokenizers": parts});
        let whole = json!({"ignore_merges": true});
        let nothing = json!({});
        for (pre_tokenizer, model, expected) in [
            (bytes.clone(), &nothing, "gpt-2"),
            (sequence(std::slice::from_ref(&bytes)), &nothing, "gpt-2"),
            (sequence(&[digits(true), bytes.clone()]), &nothing, "smollm"),
            (sequence(&[by(LLAMA_3), inner.clone()]), &whole, "llama-bpe"),
            (
                sequence(&[by(QWEN_2), inner.clone()]),
                &json!({"normalizer": {"type": "NFC"}}),
                "qwen2",
            ),
            (sequence(&[by(TEKKEN), inner.clone()]), &whole, "tekken"),
        ] {
            assert_eq!(named(pre_tokenizer, model.clone()), Ok(expected.to_string()));
        }
        for (pre_tokenizer, model, message) in [
            (sequence(&[digits(false), bytes.clone()]), &nothing, "the pre_tokenizer {"),
            (sequence(&[by("a+"), inner]), &nothing, "the pre_tokenizer {"),
            (json!(null), &nothing, "the pre_tokenizer null"),
            (
                json!({"type": "ByteLevel", "add_prefix_space": true}),
                &nothing,
                "the pre_tokenizer {",
            ),
            (bytes.clone(), &whole, "the split of gpt-2 with ignore_merges = true"),
            (bytes.clone(), &json!({"normalizer": {"type": "NFKC"}}), "the normalizer {"),
            (bytes.clone(), &json!({"type": "Unigram"}), "a model of type Unigram"),
            (bytes, &json!({"end_of_word_suffix": "</w>"}), "a end_of_word_suffix of"),
        ] {
            let error = named(pre_tokenizer, model.clone()).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn pieces_are_llama_2s() {
        let prefix = json!({"type": "Prepend", "prepend": "▁"});
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let both = json!({"byte_fallback": true,
            "normalizer": {"type": "Sequence", "normalizers": [prefix, space]}});
        assert_eq!(named(json!(null), both).unwrap(), "pieces true");
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
        assert_eq!(
            named(metaspace.clone(), json!({"byte_fallback": true})).unwrap(),
            "pieces true"
        );
        for (key, value, expected) in [
            ("prepend_scheme", "first", Some("pieces false")),
            ("prepend_scheme", "never", Some("pieces false")),
            ("prepend_scheme", "last", None),
            ("split", "true", None),
        ] {
            let mut other = metaspace.clone();
            other[key] = json!(value);
            let named = named(other, json!({"byte_fallback": true})).ok();
            assert_eq!(named.as_deref(), expected);
        }
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let gemma = json!({"byte_fallback": true, "normalizer": space});
        let split = |by: &str| {
            json!({"type": "Split", "pattern": {"String": by}, "behavior": "MergedWithPrevious",
                "invert": false})
        };
        assert_eq!(named(split(" "), gemma.clone()).unwrap(), "pieces false");
        assert!(named(split("a"), gemma).is_err());
        assert!(named(json!(null), json!({"byte_fallback": true})).is_err());
    }
}
