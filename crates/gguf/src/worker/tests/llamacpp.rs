//! The exported file in llama.cpp itself: loaded, tokenised, templated, computed.
//!
//! What it computes is held against a forward pass that is written down here, in f64, from the
//! checkpoint and not from the file.

use std::path::Path;

use checkpoint::chat::{Message, Template, Tokenizer};
use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::Weights;
use llamacpp::{Attention, Error, Model};
use serde_json::json;

use super::{config, exported, model};
use crate::format::{Type, Value};
use crate::{decode, encode};

/// Row-major, \[rows\]\[columns\].
type Matrix = Vec<Vec<f64>>;

/// A Llama as its paper has it (RMS norms, rotated halves, grouped heads, SwiGLU), one position
/// after the other.
struct Plain {
    config: Config,
    weights: Weights,
    /// What matrices and their inputs are rounded to: llama.cpp multiplies in the weights' type.
    kind: Type,
}

impl Plain {
    fn matrix(&self, name: &str) -> Matrix {
        let tensor = self.weights.get(name).unwrap();
        let columns = *tensor.shape.last().unwrap();
        let values = tensor.to_f32().unwrap();
        let kind = if tensor.shape.len() == 1 { Type::F32 } else { self.kind };
        values.chunks(columns).map(|row| rounded(row, kind)).collect()
    }

    fn times(&self, w: &Matrix, x: &[f64]) -> Vec<f64> {
        let x: Vec<f32> = x.iter().map(|x| *x as f32).collect();
        let x = rounded(&x, self.kind);
        w.iter().map(|row| dot(row, &x)).collect()
    }

    /// \[tokens\]\[vocabulary\].
    fn logits(&self, tokens: &[u32]) -> Matrix {
        let Config { head_dim, num_heads, num_kv_heads, rope_theta, .. } = self.config;
        let embedding = self.matrix(names::EMBED);
        let mut stream: Matrix = tokens.iter().map(|id| embedding[*id as usize].clone()).collect();
        for layer in 0..self.config.num_layers {
            let part = |part: &str| self.matrix(&names::layer(layer, part));
            let [wq, wk, wv, wo, gate, up, down] = names::LINEARS.map(part);
            let norms = [part("input_layernorm"), part("post_attention_layernorm")];
            let inner: Matrix = stream.iter().map(|x| self.norm(x, &norms[0])).collect();
            let turned = |w: &Matrix| -> Matrix {
                let turn = |(at, x): (usize, &Vec<f64>)| {
                    let mut y = self.times(w, x);
                    y.chunks_mut(head_dim).for_each(|head| rotate(head, at, rope_theta));
                    y
                };
                inner.iter().enumerate().map(turn).collect()
            };
            let (q, k) = (turned(&wq), turned(&wk));
            let v: Matrix = inner.iter().map(|x| self.times(&wv, x)).collect();
            for at in 0..tokens.len() {
                let mut seen = Vec::new();
                for head in 0..num_heads {
                    let kv = head / (num_heads / num_kv_heads) * head_dim;
                    let own = &q[at][head * head_dim..][..head_dim];
                    let mut scores: Vec<f64> = (0..=at)
                        .map(|p| dot(own, &k[p][kv..][..head_dim]) / (head_dim as f64).sqrt())
                        .collect();
                    softmax(&mut scores);
                    seen.extend(
                        (0..head_dim).map(|d| {
                            scores.iter().zip(&v).map(|(s, v)| s * v[kv + d]).sum::<f64>()
                        }),
                    );
                }
                add(&mut stream[at], &self.times(&wo, &seen));
                let x = self.norm(&stream[at], &norms[1]);
                let gated: Vec<f64> = self
                    .times(&gate, &x)
                    .into_iter()
                    .zip(self.times(&up, &x))
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                add(&mut stream[at], &self.times(&down, &gated));
            }
        }
        let norm = self.matrix(names::NORM);
        stream.iter().map(|x| self.times(&embedding, &self.norm(x, &norm))).collect()
    }

    fn norm(&self, x: &[f64], weight: &Matrix) -> Vec<f64> {
        let mean = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
        let weight = weight.iter().flatten();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }
}

/// What is left of a row that was written as `kind`.
fn rounded(row: &[f32], kind: Type) -> Vec<f64> {
    let mut bytes = vec![0; kind.row_bytes(row.len())];
    encode::rows(row, kind, &mut bytes).unwrap();
    let mut back = vec![0.0; row.len()];
    decode::rows(&bytes, kind, &mut back);
    back.into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], what: &[f64]) {
    to.iter_mut().zip(what).for_each(|(a, b)| *a += b);
}

fn softmax(scores: &mut [f64]) {
    let sum: f64 = scores.iter().map(|s| s.exp()).sum();
    scores.iter_mut().for_each(|s| *s = s.exp() / sum);
}

fn rotate(head: &mut [f64], at: usize, theta: f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = at as f64 * theta.powf(-(i as f64) / half as f64);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * angle.cos() - b * angle.sin();
        head[i + half] = a * angle.sin() + b * angle.cos();
    }
}

fn plain(dir: &Path, kind: Type) -> Plain {
    let dir = dir.join("model");
    Plain { config: Config::read(&dir).unwrap(), weights: Weights::open(&dir).unwrap(), kind }
}

fn loaded(dir: &Path, quant: &str) -> Model {
    let (path, _) = exported(dir, quant, 2).unwrap();
    Model::load(&path, 2).unwrap()
}

fn farthest(logits: &[f32], expected: &[f64]) -> f64 {
    let pairs = logits.iter().zip(expected);
    pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

/// Computed in f32, a position is the plain pass's to six digits, unless somewhere before it an
/// activation lay on the edge between two values of the narrow type and fell the other way: from
/// there on the two passes differ by that type's step. Some positions never meet such an edge.
#[test]
fn it_computes_what_the_checkpoint_says() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let tokens: Vec<u32> = (0..40u32).map(|i| (i * i * 7 + 3) % 266).collect();
    // The last column: what llama.cpp's own f16 attention may add. Logits reach 3.4.
    for (quant, kind, exact, usual) in [
        ("F32", Type::F32, 1e-5, 2e-2),
        ("F16", Type::F16, 1e-2, 2e-2),
        ("BF16", Type::BF16, 5e-2, 1e-1),
        ("Q8_0", Type::Q8_0, 1e-1, 2e-1),
    ] {
        let expected = plain(dir.path(), kind).logits(&tokens);
        let (path, _) = exported(dir.path(), quant, 2).unwrap();
        for (attention, most) in [(Attention::Exact, exact), (Attention::Usual, usual)] {
            let mut model = Model::load_with(&path, 2, attention).unwrap();
            let logits = model.logits(&tokens).unwrap();
            assert_eq!((logits.len(), logits[0].len()), (40, 288));
            let mut distances: Vec<f64> =
                logits.iter().zip(&expected).map(|(a, b)| farthest(a, b)).collect();
            distances.sort_by(f64::total_cmp);
            assert!(distances[39] < most, "{quant} {attention:?}: {distances:?}");
            let untouched = attention == Attention::Usual || distances[4] < 1e-5;
            assert!(untouched, "{quant} {attention:?}: {distances:?}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_plain_pass() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let plain = plain(dir.path(), Type::F16);
    let prompt = [0, 80, 81, 82];
    let mut expected = prompt.to_vec();
    for _ in 0..12 {
        let last = plain.logits(&expected).pop().unwrap();
        let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
        expected.push(best as u32);
    }
    let mut model = loaded(dir.path(), "F16");
    let answer = model.generate(&prompt, 12, &[]).unwrap();
    assert_eq!(answer, expected[4..]);
    // Nothing of an answer stays behind, and an end is not part of it.
    assert_eq!(model.generate(&prompt, 12, &[]).unwrap(), answer);
    let end = answer[5];
    let first = answer.iter().position(|id| *id == end).unwrap();
    assert_eq!(model.generate(&prompt, 12, &[end]).unwrap(), answer[..first]);
    assert!(model.generate(&prompt, 0, &[]).unwrap().is_empty());
}

#[test]
fn likelihoods_are_those_of_the_logits() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config["max_position_embeddings"] = json!(1024);
    model(&dir.path().join("model"), &config, |_, _| {});
    let mut model = loaded(dir.path(), "F16");
    // More than is computed at a time.
    let tokens: Vec<u32> = (0..700u32).map(|i| (i * i * 7 + 3) % 266).collect();
    let marks: Vec<bool> = (0..700).map(|i| i % 3 == 0).collect();
    let nll = model.nll(&tokens, &marks).unwrap();
    let logits = model.logits(&tokens).unwrap();
    let mut expected = 0.0;
    for at in (3..700).step_by(3) {
        let mut row: Vec<f64> = logits[at - 1].iter().map(|x| f64::from(*x)).collect();
        softmax(&mut row);
        expected -= row[tokens[at] as usize].ln();
    }
    assert_eq!(nll.tokens, 233);
    assert!((nll.sum - expected).abs() < 1e-6 * expected, "{} {expected}", nll.sum);
    // One thread and two add up in the same order.
    let mut alone = Model::load(&dir.path().join("F16-2/out/model-F16.gguf"), 1).unwrap();
    assert_eq!(alone.nll(&tokens, &marks).unwrap(), nll);
    assert!(matches!(model.nll(&tokens, &marks[1..]), Err(Error::Marks { .. })));
    assert!(matches!(model.logits(&[288]), Err(Error::Token { id: 288, .. })));
    assert!(matches!(model.logits(&[]), Err(Error::Empty)));
    let long = vec![5; model.max_positions() + 1];
    assert!(matches!(model.logits(&long), Err(Error::TooLong { .. })));
    // An answer ends where the context does.
    let full = &long[..model.max_positions()];
    assert_eq!(model.generate(full, 5, &[]).unwrap().len(), 1);
}

#[test]
fn text_is_cut_as_the_tokenizer_cuts_it() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let folder = dir.path().join("model");
    let model = loaded(dir.path(), "F16");
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    for text in [
        "",
        "the hill in the   low window\n\n the\ttill ",
        " 1234 5.6 ²³ ½ ٣",
        "they'll don't 'THE it's",
        "naïve Überfluß 🦙🦙 日本語 \u{a0}\u{200d}",
        "<|im_start|>user\nhi <tool>the<|im_end|>\n<|im_end|> <pad>",
        "<|im_start |> <tool",
    ] {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(model.tokenize(text), ids, "{text:?}");
        for skip in [false, true] {
            assert_eq!(model.decode(&ids, skip), tokenizer.decode(&ids, skip).unwrap());
        }
    }
    assert_eq!(model.end_ids(), tokenizer.end_ids());
}

/// Llama 2's kind of tokenizer: pieces with `▁` for a space, bytes for what is in no piece.
fn pieces() -> serde_json::Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    let merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "▁"),
        ("i", "n"),
        ("l", "l"),
        ("▁▁", "▁▁"),
        ("h", "i"),
        ("hi", "ll"),
        ("▁", "hill"),
        ("▁", "in"),
        ("ü", "b"),
    ];
    tokens.extend(["▁", "t", "h", "e", "i", "n", "l", "ü", "b"].map(String::from));
    tokens.extend(merges.map(|(a, b)| format!("{a}{b}")));
    let vocab: serde_json::Map<String, _> =
        tokens.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": tokens[id], "special": true,
        "lstrip": false, "rstrip": false, "normalized": false, "single_word": false})
    };
    json!({"version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": merges.map(|(a, b)| format!("{a} {b}"))}})
}

#[test]
fn pieces_are_put_together_as_the_tokenizer_does() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    model(&folder, &config(), |_, _| {});
    std::fs::write(folder.join("tokenizer.json"), pieces().to_string()).unwrap();
    let beside = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
    std::fs::write(folder.join("tokenizer_config.json"), beside.to_string()).unwrap();
    std::fs::remove_file(folder.join("generation_config.json")).unwrap();
    let (path, _) = exported(dir.path(), "F16", 2).unwrap();
    let keys = super::File::read(&path).keys;
    assert_eq!(keys["tokenizer.ggml.add_bos_token"], Value::Bool(true));
    assert_eq!(keys["tokenizer.ggml.unknown_token_id"], Value::U32(0));
    let model = Model::load(&path, 2).unwrap();
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    for text in
        ["the hill in the hill", "  the    hillin\n the", "Über 🦙 hüb thehill", "<s>the hill</s>"]
    {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(model.tokenize(text), ids, "{text:?}");
    }
}

#[test]
fn chats_are_rendered_as_the_template_has_them() {
    let templates = [
        super::TEMPLATE.to_string(),
        super::TEMPLATE.to_string() + "\n",
        "{%- for m in messages -%}\n  {%- if m['role'] == 'user' %}{{ 'Q: ' + m.content | trim + '\\n' }}\
         {%- else %}{{ 'A: ' ~ m['content'] ~ eos_token }}{% endif -%}\n{% endfor %}\
         {%- if add_generation_prompt %}{{ 'A:' }}{% endif %}"
            .to_string(),
    ];
    for source in templates {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        model(&folder, &config(), |_, _| {});
        std::fs::write(folder.join("chat_template.jinja"), &source).unwrap();
        let model = loaded(dir.path(), "F16");
        let template = Template::from_dir(&folder).unwrap();
        for turns in [
            vec![("user", "hi")],
            vec![("user", " the \"hill\"\n"), ("assistant", "in <it>"), ("user", "ünd 🦙")],
        ] {
            let message = |(role, content): &(&str, &str)| Message {
                role: role.to_string(),
                content: content.to_string(),
            };
            let messages: Vec<Message> = turns.iter().map(message).collect();
            let expected = template.render(&messages, true).unwrap();
            assert_eq!(model.chat_prompt(&turns).unwrap(), expected, "{source}");
        }
    }
}

#[test]
fn a_broken_file_is_told_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let (path, _) = exported(dir.path(), "F16", 2).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = Model::load(&path, 1).unwrap_err().to_string();
    assert!(error.contains("model-F16.gguf: ") && error.contains("not within the file"), "{error}");
    let error = Model::load(&dir.path().join("nothing.gguf"), 1).unwrap_err().to_string();
    assert!(error.contains("nothing.gguf: No such file"), "{error}");
}
