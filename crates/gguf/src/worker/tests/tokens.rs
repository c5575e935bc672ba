//! Tokens of each kind of tokenizer: llama.cpp's of the exported file are those of tokenizers.

use checkpoint::chat::Tokenizer;
use llamacpp::Model;
use serde_json::{Value as Json, json};

use super::{config, exported, model};

/// `{BOS}`, `{END}` and `{USER}` stand for the special tokens of a tokenizer.
fn texts(special: [&str; 3]) -> Vec<String> {
    let texts: Vec<String> = serde_json::from_str(include_str!("../golden/texts.json")).unwrap();
    let [bos, end, user] = special;
    let put =
        |text: &String| text.replace("{BOS}", bos).replace("{END}", end).replace("{USER}", user);
    texts.iter().map(put).collect()
}

/// The texts of which llama.cpp makes other tokens.
fn differing(model_type: &str, tokenizer: &Json, special: [&str; 3]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    let of = |list: &Json, id: fn(&Json) -> &Json| -> Vec<u64> {
        list.as_array().into_iter().flatten().filter_map(|x| id(x).as_u64()).collect()
    };
    let mut ids = of(&tokenizer["added_tokens"], |added| &added["id"]);
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    ids.extend(vocab.values().filter_map(Json::as_u64));
    let mut config = config();
    config["vocab_size"] = json!(ids.iter().max().unwrap() + 1);
    config["num_hidden_layers"] = json!(1);
    config["model_type"] = json!(model_type);
    model(&folder, &config, |_, _| {});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let beside = json!({"bos_token": special[0], "eos_token": special[1]});
    std::fs::write(folder.join("tokenizer_config.json"), beside.to_string()).unwrap();
    let (path, _) = exported(dir.path(), "Q8_0", 2).unwrap();
    let model = Model::load(&path, 1).unwrap();
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let mut texts = texts(special);
    assert!(texts.len() > 200);
    texts.retain(|text| model.tokenize(text) != tokenizer.encode(text).unwrap());
    texts
}

fn added(vocab: &mut Json, text: &str, special: bool) -> Json {
    let next = vocab.as_object().unwrap().len();
    let id = vocab[text].as_u64().unwrap_or(next as u64);
    json!({"id": id, "content": text, "special": special, "lstrip": false, "rstrip": false,
        "normalized": false, "single_word": false})
}

/// The tokenizer.json around a trained model.
fn around(model: &str, special: &[&str], user: &[&str], normalizer: Json, pre: Json) -> Json {
    let mut model: Json = serde_json::from_str(model).unwrap();
    let mut tokens = Vec::new();
    for (text, special) in special.iter().map(|t| (t, true)).chain(user.iter().map(|t| (t, false)))
    {
        let token = added(&mut model["vocab"], text, special);
        model["vocab"][text] = token["id"].clone();
        tokens.push(token);
    }
    json!({"version": "1.0", "truncation": null, "padding": null, "post_processor": null,
        "decoder": null, "added_tokens": tokens, "normalizer": normalizer, "pre_tokenizer": pre,
        "model": model})
}

#[test]
fn bytes_are_merged_as_the_tokenizer_does() {
    let special = ["<|bos|>", "<|end|>", "<|user|>"];
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false, "trim_offsets": false}]})
    };
    let plain = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true, "trim_offsets": true});
    let smollm = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true}, plain]});
    use crate::tokenizer::rule::{LLAMA_3, QWEN_2, TEKKEN};
    for (name, pre, whole) in [
        ("gpt-2", plain.clone(), false),
        ("smollm", smollm, false),
        ("llama-bpe", split(LLAMA_3), true),
        ("qwen2", split(QWEN_2), false),
        ("tekken", split(TEKKEN), true),
    ] {
        let golden = include_str!("../golden/bytes.json");
        let mut tokenizer = around(golden, &special[..2], &special[2..], Json::Null, pre);
        tokenizer["model"]["ignore_merges"] = json!(whole);
        let apart = differing("llama", &tokenizer, special);
        // Those with combining marks, as the export notes.
        assert_eq!(apart.len(), if name == "tekken" { 9 } else { 0 }, "{name}: {apart:?}");
        assert!(apart.iter().all(|text| !text.is_ascii()), "{name}: {apart:?}");
    }
}

#[test]
fn pieces_are_merged_as_the_tokenizer_does() {
    let special = ["<s>", "</s>", "<|user|>"];
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prefix = json!({"type": "Prepend", "prepend": "▁"});
    let llama = json!({"type": "Sequence", "normalizers": [prefix, spaces]});
    let gemma = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
        "invert": false});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let lines: Vec<String> = (1..=12).map(|n| "\n".repeat(n)).chain(["▁▁▁▁".into()]).collect();
    let mut user: Vec<&str> = lines.iter().map(String::as_str).collect();
    user.push(special[2]);
    let own = &special[2..];
    for (name, normalizer, pre, user) in [
        ("llama", llama.clone(), Json::Null, own),
        ("gemma", spaces, gemma, &user),
        ("phi3", llama, Json::Null, &[special[2], "<|endoftext|>"]),
        ("always", Json::Null, metaspace("always"), own),
        ("first", Json::Null, metaspace("first"), own),
        ("never", Json::Null, metaspace("never"), own),
    ] {
        let golden = include_str!("../golden/pieces.json");
        let mut tokenizer = around(golden, &["<unk>", "<s>", "</s>"], user, normalizer, pre);
        let model_type = if name == "phi3" { name } else { "llama" };
        if name == "phi3" {
            for at in [2, 3] {
                tokenizer["added_tokens"][at]["rstrip"] = json!(true);
            }
        }
        let apart = differing(model_type, &tokenizer, special);
        // As the export notes: of two rules of Metaspace, llama.cpp has an approximation.
        let as_noted = |text: &String| match name {
            "always" => text.starts_with([' ', '▁']) || text.contains("> "),
            "first" => !text.starts_with("<s>"),
            _ => false,
        };
        assert!(apart.iter().all(as_noted), "{name}: {apart:?}");
    }
}
