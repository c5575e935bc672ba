//! The worker from end to end: a small random model with its own tokenizer, exported and read back.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype, Spec, Weights, Writer};
use gguf::export::Quant;
use half::f16;
use serde_json::{Value as Json, json};
use step::worker::{Input, Job, Mode, Request};
use step::{Failure, Kind};

use crate::{export, format, parity, tensors};

#[cfg(feature = "llamacpp-test")]
mod architectures;
#[cfg(feature = "llamacpp-test")]
mod llamacpp;
#[cfg(feature = "llamacpp-test")]
mod tokens;

const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn config() -> Json {
    json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160,
        "vocab_size": 288, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 1, "pad_token_id": 2})
}

/// Numbers that look random and are the same each time.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// GPT-2's letters for bytes: those that print are themselves, the others follow from U+0100.
fn letters() -> Vec<char> {
    let prints = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100;
    let mut letter = |b: u8| {
        if prints(b) {
            return char::from(b);
        }
        others += 1;
        char::from_u32(others - 1).expect("letters")
    };
    (0..=255).map(&mut letter).collect()
}

fn tokenizer() -> Json {
    let special = ["<|im_start|>", "<|im_end|>", "<pad>"];
    let mut tokens: Vec<String> = special.map(String::from).to_vec();
    tokens.extend(letters().into_iter().map(String::from));
    let merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("l", "l"), ("o", "w")];
    tokens.extend(merges.map(|(a, b)| format!("{a}{b}")));
    tokens.push("<tool>".into());
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect();
    let added = |text: &str, special: bool| {
        let id = &vocab[text];
        json!({"id": id, "content": text, "special": special, "lstrip": false, "rstrip": false,
            "normalized": false, "single_word": false})
    };
    json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [added("<|im_start|>", true), added("<|im_end|>", true),
            added("<pad>", true), added("<tool>", false)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": merges.map(|(a, b)| [a, b])}})
}

/// A model folder; `weight` may change a tensor's values.
fn model(dir: &Path, config: &Json, weight: impl Fn(&str, &mut Vec<f32>)) {
    std::fs::create_dir_all(dir).unwrap();
    let put = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    put("config.json", config.to_string());
    put("generation_config.json", json!({"eos_token_id": [1, 0]}).to_string());
    put("tokenizer.json", tokenizer().to_string());
    put(
        "tokenizer_config.json",
        json!({"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}}).to_string(),
    );
    put("chat_template.jinja", TEMPLATE.into());
    let config = Config::read(dir).unwrap();
    let specs = names::expected(&config);
    let specs = specs.iter().map(|(name, shape)| Spec::new(name, Dtype::F32, shape)).collect();
    let mut writer = Writer::create(&dir.join("model.safetensors"), specs).unwrap();
    for (seed, spec) in writer.order().into_iter().enumerate() {
        let mut values = noise(spec.size() / 4, seed as u32 + 1);
        // Norms about 1, matrices of a size that keeps activations about 1.
        let scale = if spec.shape.len() == 1 { 0.2 } else { 0.4 };
        let shift = if spec.shape.len() == 1 { 1.0 } else { 0.0 };
        values.iter_mut().for_each(|x| *x = *x * scale + shift);
        weight(&spec.name, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// What a job says, for the tests to read.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Exports the model in `dir/model`: the file, and what was said.
fn exported(dir: &Path, quant: &str, threads: usize) -> Result<(PathBuf, String), Failure> {
    let out = dir.join(format!("{quant}-{threads}"));
    for sub in ["out", "report"] {
        std::fs::create_dir_all(out.join(sub)).unwrap();
    }
    let input =
        Input { label: "m".into(), kind: Kind::Model, path: dir.join("model"), origin: "m".into() };
    let request = Request {
        format: 1,
        step: "gguf/export".into(),
        mode: Mode::Build,
        params: json!({"quant": quant, "parity": true}),
        inputs: BTreeMap::from([("model".into(), vec![input])]),
        out: out.join("out"),
        report: out.join("report"),
        scratch: out.join("scratch"),
        tools: BTreeMap::new(),
        threads,
    };
    let lines = Lines::default();
    export::run(&Job::new(request, lines.clone())).map_err(|e| Failure::from_anyhow(&e))?;
    let said = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    Ok((out.join(format!("out/model-{quant}.gguf")), said))
}

/// A reader of its own, from the format's description.
struct File {
    bytes: Vec<u8>,
    at: usize,
    keys: BTreeMap<String, format::Value>,
    /// Name → dims as the file lists them, type, offset of the data in the file.
    tensors: BTreeMap<String, (Vec<u64>, u32, usize)>,
}

impl File {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let mut file = Self { bytes, at: 0, keys: BTreeMap::new(), tensors: BTreeMap::new() };
        assert_eq!((file.take(4), file.u32()), (b"GGUF".to_vec(), 3));
        let (tensors, keys) = (file.u64(), file.u64());
        for _ in 0..keys {
            let (key, kind) = (file.text(), file.u32());
            let value = match kind {
                9 => file.array(),
                other => file.value(other),
            };
            assert!(file.keys.insert(key, value).is_none());
        }
        let mut infos = Vec::new();
        for _ in 0..tensors {
            let name = file.text();
            let dims = (0..file.u32()).map(|_| file.u64()).collect();
            infos.push((name, dims, file.u32(), file.u64() as usize));
        }
        let start = file.at.next_multiple_of(32);
        for (name, dims, kind, offset) in infos {
            assert_eq!(offset % 32, 0);
            assert!(file.tensors.insert(name, (dims, kind, start + offset)).is_none());
        }
        assert_eq!(file.bytes.len() % 32, 0);
        file
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        self.at += n;
        self.bytes[self.at - n..self.at].to_vec()
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }
    fn text(&mut self) -> String {
        let n = self.u64() as usize;
        String::from_utf8(self.take(n)).unwrap()
    }
    fn value(&mut self, kind: u32) -> format::Value {
        match kind {
            4 => format::Value::U32(self.u32()),
            6 => format::Value::F32(f32::from_bits(self.u32())),
            7 => format::Value::Bool(self.take(1)[0] == 1),
            8 => format::Value::Text(self.text()),
            other => panic!("type {other}"),
        }
    }
    fn array(&mut self) -> format::Value {
        let (kind, n) = (self.u32(), self.u64());
        match kind {
            5 => format::Value::I32s((0..n).map(|_| self.u32() as i32).collect()),
            6 => format::Value::F32s((0..n).map(|_| f32::from_bits(self.u32())).collect()),
            8 => format::Value::Texts((0..n).map(|_| self.text()).collect()),
            other => panic!("array of {other}"),
        }
    }

    /// `len` bytes of a tensor from `from`.
    fn data(&self, name: &str, from: usize, len: usize) -> &[u8] {
        &self.bytes[self.tensors[name].2 + from..][..len]
    }
}

#[test]
fn what_is_written_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let (path, said) = exported(dir.path(), "F16", 2).unwrap();
    let file = File::read(&path);
    let u32 = format::Value::U32;
    let text = |t: &str| format::Value::Text(t.into());
    for (key, value) in [
        ("general.architecture", text("llama")),
        ("general.name", text("model")),
        ("general.file_type", u32(1)),
        ("general.size_label", text("105K")),
        ("llama.block_count", u32(2)),
        ("llama.attention.head_count_kv", u32(2)),
        ("llama.rope.dimension_count", u32(16)),
        ("llama.rope.freq_base", format::Value::F32(10000.0)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.bos_token_id", u32(1)),
        ("tokenizer.ggml.eos_token_id", u32(1)),
        ("tokenizer.ggml.eot_token_id", u32(0)),
        ("tokenizer.ggml.padding_token_id", u32(2)),
        ("tokenizer.ggml.add_bos_token", format::Value::Bool(false)),
        ("tokenizer.ggml.add_space_prefix", format::Value::Bool(false)),
        ("tokenizer.chat_template", text(TEMPLATE)),
    ] {
        assert_eq!(file.keys.get(key), Some(&value), "{key}");
    }
    let modelfile = std::fs::read_to_string(path.with_file_name("Modelfile")).unwrap();
    let begins = "FROM ./model-F16.gguf\nTEMPLATE \"\"\"{{ range .Messages }}{{ if eq .Role \"system\" \
        }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if eq";
    let ends = "{{ end }}{{ end }}<|im_start|>assistant\n\"\"\"\nPARAMETER stop \"<|im_end|>\"\n\
        PARAMETER stop \"<|im_start|>\"\nPARAMETER num_ctx 256\n";
    assert!(modelfile.starts_with(begins) && modelfile.ends_with(ends), "{modelfile}");
    let format::Value::Texts(tokens) = &file.keys["tokenizer.ggml.tokens"] else { panic!() };
    let format::Value::I32s(types) = &file.keys["tokenizer.ggml.token_type"] else { panic!() };
    assert_eq!((tokens.len(), types.len()), (288, 288));
    for (id, token, kind) in [
        (0, "<|im_start|>", 3),
        (35, "Ġ", 1),
        (261, "Ġthe", 1),
        (265, "<tool>", 4),
        (287, "[PAD287]", 5),
    ] {
        assert_eq!((tokens[id].as_str(), types[id]), (token, kind));
    }
    let format::Value::Texts(merges) = &file.keys["tokenizer.ggml.merges"] else { panic!() };
    assert_eq!(merges[..3], ["Ġ t", "h e", "Ġt he"]);

    assert!(!file.tensors.contains_key("output.weight"), "the head is tied");
    assert_eq!(file.tensors.len(), 2 + 2 * 9);
    assert_eq!(file.tensors["token_embd.weight"].0, [64, 288]);
    assert_eq!(file.tensors["blk.1.attn_k.weight"].0, [64, 32]);
    assert_eq!(file.tensors["blk.1.attn_norm.weight"].1, 0);
    let weights = Weights::open(&dir.path().join("model")).unwrap();
    let same = |name: &str, row: usize, source: &str, from: usize| {
        let values = weights.get(source).unwrap().to_f32().unwrap();
        let bytes: Vec<u8> = values[from * 64..][..64]
            .iter()
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect();
        assert_eq!(file.data(name, row * 128, 128), bytes, "{name}");
    };
    same("token_embd.weight", 200, "model.embed_tokens.weight", 200);
    same("blk.1.attn_v.weight", 17, "model.layers.1.self_attn.v_proj.weight", 17);
    // The second head's row 1 is what was half a head further down.
    same("blk.1.attn_k.weight", 17, "model.layers.1.self_attn.k_proj.weight", 24);
    assert!(said.contains("\"bits_per_weight\",\"value\":16.0"), "{said}");
}

#[test]
fn the_same_bytes_however_many_threads() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    for quant in ["F32", "BF16", "Q8_0", "Q4_K_M"] {
        let bytes =
            |threads| std::fs::read(exported(dir.path(), quant, threads).unwrap().0).unwrap();
        assert!(bytes(1) == bytes(3), "{quant}");
    }
}

/// The figure of a metric in what a job said.
fn metric(said: &str, name: &str) -> f64 {
    let lines = said.lines().map(|line| serde_json::from_str::<Json>(line).unwrap());
    let value = lines.filter(|line| line["name"] == name).find_map(|line| line["value"].as_f64());
    value.unwrap_or_else(|| panic!("no {name}: {said}"))
}

/// The trainer's golden models, with a tokenizer of three letters.
#[test]
fn what_is_read_back_computes_what_the_checkpoint_does() {
    for name in ["llama", "mistral", "qwen2", "qwen3", "phi3", "phi3-short", "gemma3"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/src/worker/golden");
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir_all(&model).unwrap();
        let weights = golden.join(name).join("model.safetensors");
        std::fs::copy(weights, model.join("model.safetensors")).unwrap();
        let text = std::fs::read_to_string(golden.join(name).join("config.json")).unwrap();
        let mut config: Json = serde_json::from_str(&text).unwrap();
        if name == "gemma3" {
            config["query_pre_attn_scalar"] = json!(16);
        }
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        let tokenizer = json!({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}});
        std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (quant, least, most) in [("F32", 0.0, 1e-12), ("F16", 0.0, 1e-4), ("Q8_0", 1e-9, 0.05)]
        {
            let (_, said) = exported(dir.path(), quant, 2).unwrap();
            let kl = metric(&said, "kl");
            assert!((least..=most).contains(&kl), "{name} {quant}: {kl}");
            assert!(metric(&said, "top1_agreement") >= 0.5, "{name} {quant}: {said}");
        }
    }
}

#[test]
fn a_file_that_computes_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model_dir = dir.path().join("model");
    model(&model_dir, &config(), |_, _| {});
    let (path, _) = exported(dir.path(), "F16", 2).unwrap();
    let (_, _, at) = File::read(&path).tensors["blk.0.attn_q.weight"];
    let config = Config::read(&model_dir).unwrap();
    let weights = Weights::open(&model_dir).unwrap();
    let tensors = tensors::plan(&config, Quant::F16);
    let check = || parity::check(&path, &model_dir, &config, &weights, &tensors, Quant::F16);
    check().unwrap();
    // Each row is where the next one belongs.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at..at + 64 * 64 * 2].rotate_right(64 * 2);
    std::fs::write(&path, &bytes).unwrap();
    let failure = Failure::from_anyhow(&check().unwrap_err());
    let message = "model-F16.gguf does not compute what the checkpoint does: KL = ";
    assert!(failure.message.starts_with(message), "{}", failure.message);
    assert!(failure.hint.unwrap().contains("parity = false"));
    std::fs::write(&path, &bytes[..at]).unwrap();
    assert!(check().is_err());
}

#[test]
fn rows_that_are_no_blocks_are_f16_and_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config["intermediate_size"] = json!(72);
    model(&dir.path().join("model"), &config, |_, _| {});
    let (path, said) = exported(dir.path(), "Q8_0", 2).unwrap();
    let file = File::read(&path);
    assert_eq!(file.tensors["blk.0.ffn_down.weight"].1, 1);
    assert_eq!(file.tensors["blk.0.ffn_up.weight"].1, 8);
    assert!(
        said.contains("2 of 20 tensors are F16: blk.0.ffn_down.weight has rows of 72 values"),
        "{said}"
    );
}

#[test]
fn a_mix_takes_the_nearest_type_for_short_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config["intermediate_size"] = json!(256);
    model(&dir.path().join("model"), &config, |_, _| {});
    let (path, said) = exported(dir.path(), "Q4_K_M", 2).unwrap();
    let file = File::read(&path);
    assert_eq!(file.keys["general.file_type"], format::Value::U32(15));
    for (name, kind) in [
        ("token_embd.weight", 8),
        ("blk.0.ffn_down.weight", 12),
        ("blk.1.ffn_down.weight", 14),
        ("blk.0.attn_v.weight", 6),
        ("blk.1.attn_v.weight", 8),
        ("blk.1.ffn_up.weight", 6),
    ] {
        assert_eq!(file.tensors[name].1, kind, "{name}");
    }
    for note in [
        "11 of 20 tensors are Q5_0: blk.0.attn_q.weight has rows of 64 values, and Q4_K packs them",
        "2 of 20 tensors are Q8_0: token_embd.weight has rows of 64 values, and Q6_K packs them by",
    ] {
        assert!(said.contains(note), "{said}");
    }
}

#[test]
fn an_untied_head_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config["tie_word_embeddings"] = json!(false);
    model(&dir.path().join("model"), &config, |_, _| {});
    let file = File::read(&exported(dir.path(), "BF16", 2).unwrap().0);
    assert_eq!(file.tensors["output.weight"].0, [64, 288]);
}

#[test]
fn broken_weights_are_named() {
    for (value, quant, message) in [
        (f32::NAN, "F32", "`model.layers.1.mlp.up_proj.weight` is NaN at [3, 5]"),
        (f32::INFINITY, "Q8_0", "`model.layers.1.mlp.up_proj.weight` is inf at [3, 5]"),
        (
            -7e4,
            "F16",
            "`model.layers.1.mlp.up_proj.weight` is -70000 at [3, 5]: F16 cannot hold it",
        ),
        (
            6e5,
            "Q4_0",
            "`model.layers.1.mlp.up_proj.weight` is 600000 at [3, 5]: Q4_0 cannot hold it",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        model(&dir.path().join("model"), &config(), |name, values| {
            if name == "model.layers.1.mlp.up_proj.weight" {
                values[3 * 64 + 5] = value;
            }
        });
        let failure = exported(dir.path(), quant, 2).unwrap_err();
        assert_eq!(failure.message, message);
        assert_eq!(failure.class, step::Class::Input);
    }
}

/// Gemma 3's tokenizer names the token of images, its text models have no embedding for it.
#[test]
fn an_added_token_without_an_embedding_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let mut tokenizer = tokenizer();
    let image = json!({"id": 288, "content": "<image>", "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(image);
    std::fs::write(dir.path().join("model/tokenizer.json"), tokenizer.to_string()).unwrap();
    let (path, said) = exported(dir.path(), "F16", 1).unwrap();
    assert!(said.contains("\\\"<image>\\\" is left out: it has no embedding"), "{said}");
    let keys = File::read(&path).keys;
    let format::Value::Texts(tokens) = &keys["tokenizer.ggml.tokens"] else { panic!() };
    assert_eq!(tokens.len(), 288);
}

#[test]
fn its_licence_and_base_are_told() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("model"), &config(), |_, _| {});
    let licence = json!({"of": "google/gemma-3-270m-it", "license": "gemma"});
    std::fs::write(dir.path().join("model").join(release::licence::FILE), licence.to_string())
        .unwrap();
    let (path, _) = exported(dir.path(), "F16", 1).unwrap();
    let keys = File::read(&path).keys;
    let general = |key: &str| keys[&format!("general.{key}")].clone();
    assert_eq!(general("license"), format::Value::Text("gemma".into()));
    assert_eq!(general("base_model.count"), format::Value::U32(1));
    assert_eq!(general("base_model.0.name"), format::Value::Text("gemma-3-270m-it".into()));
    assert_eq!(general("base_model.0.organization"), format::Value::Text("google".into()));
}

/// llama.cpp throws at a model that is called Phi-3 and has not Phi's tokens.
#[test]
fn only_a_phi_is_called_phi() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config["_name_or_path"] = json!("somebody/Phi-3-tiny");
    model(&dir.path().join("model"), &config, |_, _| {});
    exported(dir.path(), "F16", 1).unwrap();
    let keys = File::read(&dir.path().join("F16-1/out/Phi-3-tiny-F16.gguf")).keys;
    assert_eq!(keys["general.name"], format::Value::Text("model".into()));
}

#[test]
fn tokenizers_that_llama_cpp_would_read_otherwise_are_refused() {
    type Change = fn(&mut Json);
    let cases: [(Change, &str); 3] = [
        (
            |t| t["pre_tokenizer"] = json!({"type": "Whitespace"}),
            "tokenizer.json: llama.cpp has no name for the pre_tokenizer {\"type\":\"Whitespace\"}",
        ),
        (
            |t| t["model"]["vocab"]["zebra"] = json!(288),
            "tokenizer.json: token \"zebra\" has the id 288, the model has embeddings for 288 tokens",
        ),
        (|t| t["model"]["vocab"]["zebra"] = json!(7), "both have the id 7"),
    ];
    for (change, message) in cases {
        let dir = tempfile::tempdir().unwrap();
        model(&dir.path().join("model"), &config(), |_, _| {});
        let mut tokenizer = tokenizer();
        change(&mut tokenizer);
        std::fs::write(dir.path().join("model/tokenizer.json"), tokenizer.to_string()).unwrap();
        let failure = exported(dir.path(), "F16", 1).unwrap_err();
        assert!(failure.message.contains(message), "{}", failure.message);
    }
}
