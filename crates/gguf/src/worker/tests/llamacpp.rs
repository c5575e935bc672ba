//! The exported file in llama.cpp itself: loaded, tokenised, templated, computed.
//!
//! What it computes is held against a forward pass that is written down here, in f64, from the
//! checkpoint and not from the file.

use std::path::Path;

use checkpoint::chat::{Message, Template, Tokenizer};
use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::Weights;
use half::{bf16, f16};
use llamacpp::{Error, Model};
use serde_json::json;

use super::{config, exported, model};

/// Row-major, \[rows\]\[columns\].
type Matrix = Vec<Vec<f64>>;

/// A Llama as its paper has it (RMS norms, rotated halves, grouped heads, SwiGLU), one position
/// after the other.
struct Plain {
    config: Config,
    weights: Weights,
    round: fn(f32) -> f32,
}

impl Plain {
    fn matrix(&self, name: &str) -> Matrix {
        let tensor = self.weights.get(name).unwrap();
        let columns = *tensor.shape.last().unwrap();
        let values = tensor.to_f32().unwrap();
        let round = if tensor.shape.len() == 1 { |x| x } else { self.round };
        let row = |row: &[f32]| row.iter().map(|x| f64::from(round(*x))).collect();
        values.chunks(columns).map(row).collect()
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
                    let mut y = times(w, x);
                    y.chunks_mut(head_dim).for_each(|head| rotate(head, at, rope_theta));
                    y
                };
                inner.iter().enumerate().map(turn).collect()
            };
            let (q, k) = (turned(&wq), turned(&wk));
            let v: Matrix = inner.iter().map(|x| times(&wv, x)).collect();
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
                add(&mut stream[at], &times(&wo, &seen));
                let x = self.norm(&stream[at], &norms[1]);
                let gated: Vec<f64> = times(&gate, &x)
                    .into_iter()
                    .zip(times(&up, &x))
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                add(&mut stream[at], &times(&down, &gated));
            }
        }
        let norm = self.matrix(names::NORM);
        stream.iter().map(|x| times(&embedding, &self.norm(x, &norm))).collect()
    }

    fn norm(&self, x: &[f64], weight: &Matrix) -> Vec<f64> {
        let mean = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
        let weight = weight.iter().flatten();
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }
}

fn times(w: &Matrix, x: &[f64]) -> Vec<f64> {
    w.iter().map(|row| dot(row, x)).collect()
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

fn loaded(dir: &Path, quant: &str) -> Model {
    let (path, _) = exported(dir, quant, 2).unwrap();
    Model::load(&path, 2).unwrap()
}

fn farthest(logits: &[Vec<f32>], expected: &Matrix) -> f64 {
    let pairs = logits.iter().flatten().zip(expected.iter().flatten());
    pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

#[test]
fn it_computes_what_the_checkpoint_says() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let tokens: Vec<u32> = (0..40u32).map(|i| (i * i * 7 + 3) % 266).collect();
    // llama.cpp keeps the cache in f16 and rounds activations to the weights' type: the file's
    // own part in the distance is zero for F32, as the plain pass takes the rounded weights.
    let cases: [(&str, fn(f32) -> f32, f64); 4] = [
        ("F32", |x| x, 1.0),
        ("F16", |x| f16::from_f32(x).to_f32(), 1.0),
        ("BF16", |x| bf16::from_f32(x).to_f32(), 1.0),
        ("Q8_0", |x| x, 1.0),
    ];
    for (quant, round, most) in cases {
        let folder = dir.path().join("model");
        let plain = Plain {
            config: Config::read(&folder).unwrap(),
            weights: Weights::open(&folder).unwrap(),
            round,
        };
        let expected = plain.logits(&tokens);
        let logits = loaded(dir.path(), quant).logits(&tokens).unwrap();
        assert_eq!((logits.len(), logits[0].len()), (40, 288));
        let spread = expected.iter().flatten().fold(0.0, |a: f64, b| a.max(b.abs()));
        let distance = farthest(&logits, &expected);
        println!("{quant}: {distance:.1e} of {spread:.2}");
        assert!(distance < most, "{quant}: {distance} of {spread}");
    }
}

#[test]
fn greedy_tokens_are_those_of_the_plain_pass() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let folder = dir.path().join("model");
    let plain = Plain {
        config: Config::read(&folder).unwrap(),
        weights: Weights::open(&folder).unwrap(),
        round: |x| f16::from_f32(x).to_f32(),
    };
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
    println!("{error}");
    assert!(error.contains("model-F16.gguf: "), "{error}");
    let error = Model::load(&dir.path().join("nothing.gguf"), 1).unwrap_err().to_string();
    assert!(error.contains("nothing.gguf: No such file"), "{error}");
}
