//! The work of `site/chat`: lays out page, libraries and model as static files, in names that hold
//! their hashes, so that a browser's cache is never wrong.
//!
//! Runs no model and no JavaScript.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::Context;
use release::Manifest;
use serde_json::{Map, Value, json};
use site::chat::Chat;
use step::worker::{Input, Job};
use step::{BlobDigest, Entry, Failure, Tree, canonical};

use crate::{app, licences};

/// What of the libraries a page loads.
const VENDOR: &[&str] = &["js", "mjs", "wasm"];
const MAIN: &str = "transformers.min.js";
/// The ending of a graph's name → what Transformers.js calls it.
const DTYPES: &[(&str, &str)] = &[
    ("", "fp32"),
    ("_fp16", "fp16"),
    ("_int8", "int8"),
    ("_uint8", "uint8"),
    ("_quantized", "q8"),
    ("_q4", "q4"),
    ("_q4f16", "q4f16"),
    ("_bnb4", "bnb4"),
];
/// A file of weights is handed out in about so many parts.
const PARTS: u64 = 256;
const SMALLEST_PART: u64 = 64 << 10;

pub fn run(job: &Job) -> anyhow::Result<()> {
    let params: Chat = job.params()?;
    let tool = job.tool("transformers-js")?;
    let vendor = vendor(tool, job.out())?;
    let input = job.input("model")?;
    let model = model(input, job.out())?;
    let terms = licences::of_model(input, params.license.as_deref(), job.inputs("notices"))?;
    let reports = job.inputs("report").iter().map(report).collect::<anyhow::Result<Vec<_>>>()?;
    let site = json!({
        "format": 1,
        "title": params.title,
        "about": params.about,
        "placeholder": params.placeholder,
        "examples": params.examples,
        "answer": params.answer,
        "max_new_tokens": params.max_new_tokens,
        "model": model.json(&reports),
        "vendor": vendor,
        "reports": reports,
    });
    let made = BTreeMap::from([
        ("assets/site.json".to_string(), canonical::to_vec(&site)),
        ("assets/LICENSES.txt".to_string(), licences::text(tool, &terms)?.into_bytes()),
    ]);
    let app = job.input("app")?;
    for (path, bytes) in app::files(&app.path, &app.origin, made)? {
        write(&job.out().join(path), &bytes)?;
    }
    let lacks = terms.lacks();
    for lack in &lacks {
        job.note(format!("not to be published as it is: it lacks {lack}"));
    }
    Manifest::write(job.out(), terms.licence.into_iter().collect(), lacks)?;
    job.metric("model_bytes", model.files.size() as f64);
    Ok(())
}

/// Copies the libraries to `vendor/<hash>/`, as they came: they load each other by name.
fn vendor(tool: &Path, out: &Path) -> anyhow::Result<Value> {
    let files: Vec<String> = list(tool)?
        .into_iter()
        .filter(|path| path.rsplit_once('.').is_some_and(|(_, e)| VENDOR.contains(&e)))
        .collect();
    if !files.iter().any(|path| path == MAIN) {
        return Err(Failure::bug(format!("{} has no {MAIN}", tool.display())).into());
    }
    let files = digests(tool, &files)?;
    let path = format!("vendor/{}/", short(&files));
    copy(tool, &files, &out.join(&path))?;
    Ok(json!({"path": path, "files": rows(&files)}))
}

struct Model {
    /// What Transformers.js takes for the model's name.
    path: String,
    architecture: String,
    dtypes: Vec<&'static str>,
    files: Tree,
    /// Path in the model → what is handed out.
    parts: BTreeMap<String, Vec<Entry>>,
}

/// Copies the model to `models/`, under names that are the files' own digests, weights in parts: what
/// two models share is published once and fetched once. The page puts them together.
fn model(input: &Input, out: &Path) -> anyhow::Result<Model> {
    let origin = &input.origin;
    let files = list(&input.path)?;
    let dtypes: Vec<_> = DTYPES
        .iter()
        .filter(|(ending, _)| files.contains(&format!("onnx/model{ending}.onnx")))
        .map(|(_, dtype)| *dtype)
        .collect();
    if dtypes.is_empty() {
        return Err(Failure::input(format!("{origin} has no graph that Transformers.js knows"))
            .hint("it looks for onnx/model_q4.onnx and its like")
            .into());
    }
    let config = read(input, "config.json")?;
    let Some(architecture) = config["model_type"].as_str() else {
        return Err(Failure::input(format!("{origin}/config.json has no model_type")).into());
    };
    if !read(input, "tokenizer_config.json")?["chat_template"].is_string() {
        return Err(Failure::input(format!(
            "{origin}/tokenizer_config.json has no chat template: a page cannot ask its model"
        ))
        .hint("Transformers.js reads the template from that file only")
        .into());
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = architecture.chars().map(plain).collect();
    let mut entries = Vec::with_capacity(files.len());
    let mut parts = BTreeMap::new();
    for path in files.into_iter().filter(|path| path != release::licence::FILE) {
        let (entry, of) = divide(&input.path, path, out)?;
        parts.insert(entry.path.clone(), of);
        entries.push(entry);
    }
    let files = Tree::new(entries)?;
    let path = format!("{name}-{}", short(&files));
    Ok(Model { path, architecture: architecture.into(), dtypes, files, parts })
}

impl Model {
    /// The model's own name is not part of the step's key, so it is looked for in the reports: the
    /// ONNX model of that many bytes.
    fn json(&self, reports: &[Value]) -> Value {
        let label = reports.iter().filter_map(|r| r["models"].as_object()).flatten().find_map(
            |(label, model)| {
                let same =
                    model["kind"] == "onnx-model" && model["size_bytes"] == self.files.size();
                same.then(|| label.clone())
            },
        );
        json!({
            "label": label.unwrap_or_else(|| self.architecture.clone()),
            "path": self.path,
            "architecture": self.architecture,
            "dtypes": self.dtypes,
            "digest": self.files.digest(),
            "bytes": self.files.size(),
            "files": self.rows(),
        })
    }

    fn rows(&self) -> Vec<BTreeMap<&'static str, Value>> {
        let mut rows = rows(&self.files);
        for (row, parts) in rows.iter_mut().zip(self.parts.values()) {
            let part = |part: &Entry| json!({"path": part.path, "bytes": part.size});
            row.insert("parts", parts.iter().map(part).collect());
        }
        rows
    }
}

/// Copies a file to `models/<digest>.<ending>`: weights in parts of one size, which is the same in all
/// models of one shape. A tensor that another model has too is then in the same parts.
fn divide(dir: &Path, path: String, out: &Path) -> anyhow::Result<(Entry, Vec<Entry>)> {
    let from = dir.join(&path);
    let place = || format!("cannot read {}", from.display());
    let mut source = fs::File::open(&from).with_context(place)?;
    let size = source.metadata().with_context(place)?.len();
    let name = path.rsplit('/').next().unwrap_or_default();
    let ending = name.rsplit_once('.').map_or(String::new(), |(_, ending)| format!(".{ending}"));
    let step = match ending.starts_with(".onnx_data") {
        true => (size / PARTS).next_power_of_two().max(SMALLEST_PART),
        false => size,
    };
    let mut whole = blake3::Hasher::new();
    let mut parts = Vec::new();
    let mut left = size;
    while left > 0 || parts.is_empty() {
        let mut bytes = vec![0; usize::try_from(step.min(left))?];
        source.read_exact(&mut bytes).with_context(place)?;
        whole.update(&bytes);
        let digest = BlobDigest::of(&bytes);
        let part = format!("models/{}{ending}", &digest.to_string()[..32]);
        write(&out.join(&part), &bytes)?;
        left -= bytes.len() as u64;
        parts.push(Entry { path: part, digest, size: bytes.len() as u64 });
    }
    let digest = BlobDigest::from_bytes(*whole.finalize().as_bytes());
    Ok((Entry { path, digest, size }, parts))
}

/// The figures of an `eval.json`, without its examples.
fn report(input: &Input) -> anyhow::Result<Value> {
    let all = read(input, "eval.json")?;
    if !all["models"].is_object() {
        return Err(Failure::input(format!("{}/eval.json tells of no models", input.origin))
            .hint("`report` takes the results of `eval/exact-match` or `eval/perplexity`")
            .into());
    }
    let mut kept = Map::from_iter([("label".to_string(), json!(input.label))]);
    for key in ["step", "split", "rows", "reference", "figures", "order", "models"] {
        if let Some(value) = all.get(key) {
            kept.insert(key.into(), value.clone());
        }
    }
    Ok(Value::Object(kept))
}

fn read(input: &Input, name: &str) -> anyhow::Result<Value> {
    let shown = format!("{}/{name}", input.origin);
    let bytes = fs::read(input.path.join(name)).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Failure::input(format!("{shown} is not there")),
        _ => Failure::environment(format!("cannot read {shown}: {e}")),
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Failure::input(format!("{shown} is not JSON: {e}")).into())
}

/// The files below `dir`, sorted, `/` between folders.
pub fn list(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let path = dir.join(&folder);
        let entries = fs::read_dir(&path).with_context(|| format!("{}", path.display()))?;
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                let path = entry.path();
                return Err(Failure::input(format!("{} is not UTF-8", path.display())).into());
            };
            // Follows links: the engine lays inputs out with them where it can.
            let is_dir = fs::metadata(entry.path())?.is_dir();
            let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            if is_dir { folders.push(name) } else { files.push(name) }
        }
    }
    files.sort();
    Ok(files)
}

fn digests(dir: &Path, files: &[String]) -> anyhow::Result<Tree> {
    let mut entries = Vec::with_capacity(files.len());
    for path in files {
        let from = dir.join(path);
        let mut hasher = blake3::Hasher::new();
        let size = fs::File::open(&from)
            .and_then(|mut file| std::io::copy(&mut file, &mut hasher))
            .with_context(|| format!("cannot read {}", from.display()))?;
        let digest = BlobDigest::from_bytes(*hasher.finalize().as_bytes());
        entries.push(Entry { path: path.clone(), digest, size });
    }
    Ok(Tree::new(entries)?)
}

fn short(tree: &Tree) -> String {
    tree.digest().to_string()[..16].to_string()
}

fn rows(tree: &Tree) -> Vec<BTreeMap<&'static str, Value>> {
    let row = |e: &Entry| {
        BTreeMap::from([
            ("path", json!(e.path)),
            ("bytes", json!(e.size)),
            ("blake3", json!(e.digest)),
        ])
    };
    tree.entries().iter().map(row).collect()
}

fn copy(from: &Path, files: &Tree, to: &Path) -> anyhow::Result<()> {
    for Entry { path, .. } in files.entries() {
        let (from, to) = (from.join(path), to.join(path));
        fs::create_dir_all(to.parent().expect("a file below `to`"))?;
        // By content only: an input's mode is read-only, and not ours to hand on.
        let mut source =
            fs::File::open(&from).with_context(|| format!("cannot read {}", from.display()))?;
        let mut target =
            fs::File::create(&to).with_context(|| format!("cannot write {}", to.display()))?;
        std::io::copy(&mut source, &mut target).with_context(|| format!("{}", to.display()))?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let place = || format!("cannot write {}", path.display());
    fs::create_dir_all(path.parent().expect("a file below `out`")).with_context(place)?;
    fs::File::create(path).and_then(|mut f| f.write_all(bytes)).with_context(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use step::Kind;
    use step::worker::{Mode, Request};

    const EVAL: &str = r#"{"format":1,"step":"eval/exact-match","split":"test","rows":500,
        "order":["base","onnx-int4"],"figures":["exact_match"],"models":{
        "base":{"kind":"model","size_bytes":9,"exact_match":0.01},
        "onnx-int4":{"kind":"onnx-model","size_bytes":SIZE,"exact_match":0.93}},
        "examples":[{"prompt":"a","expected":"b","answers":{}}]}"#;

    const MODEL: [(&str, &str); 4] = [
        ("config.json", r#"{"model_type":"gemma3_text"}"#),
        ("tokenizer_config.json", r#"{"chat_template":"{{ messages }}"}"#),
        ("onnx/model_q4.onnx", "graph"),
        ("onnx/model_q4.onnx_data", "weights"),
    ];

    fn put(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            write(&root.join(path), text.as_bytes()).unwrap();
        }
    }

    /// A page, a model and libraries, all of them tiny.
    fn inputs(root: &Path) {
        put(&root.join("model"), &MODEL);
        let size: usize = MODEL.iter().map(|(_, text)| text.len()).sum();
        put(root, &[("report/eval.json", &EVAL.replace("SIZE", &size.to_string()))]);
        put(
            root,
            &[
                ("app/index.html", r#"<script type="module" src="./assets/main.js"></script>"#),
                ("app/isolate.js", "// worker"),
                ("app/assets/main.js", "new URL('./site.json', import.meta.url)"),
                ("app/package.json", "{}"),
                ("tool/transformers.min.js", "export {}"),
                ("tool/ort-wasm-simd-threaded.wasm", "wasm"),
                ("tool/licenses/transformers.txt", "Apache License"),
                ("tool/licenses/onnxruntime-web.json", r#"{"version":"1.31.0","license":"MIT"}"#),
            ],
        );
    }

    fn run_in(root: &Path, out: &str, reports: bool) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
        let input = |name: &str, kind| {
            let origin = format!("recipes/{name}");
            Input { label: name.into(), kind, path: root.join(name), origin }
        };
        let mut all = BTreeMap::from([
            ("app".to_string(), vec![input("app", Kind::Files)]),
            ("model".to_string(), vec![input("model", Kind::OnnxModel)]),
        ]);
        if reports {
            all.insert("report".into(), vec![input("report", Kind::Metrics)]);
        }
        if root.join("notices").exists() {
            all.insert("notices".into(), vec![input("notices", Kind::Files)]);
        }
        let out = root.join(out);
        fs::create_dir_all(&out).unwrap();
        let request = Request {
            format: 1,
            step: "site/chat".into(),
            mode: Mode::Build,
            params: json!({"title": "Crontab", "answer": "crontab", "examples": ["at noon"]}),
            inputs: all,
            out: out.clone(),
            report: root.join("r"),
            scratch: root.join("s"),
            tools: BTreeMap::from([("transformers-js".into(), root.join("tool"))]),
            threads: 1,
        };
        run(&Job::new(request, std::io::sink())).map_err(|e| Failure::from_anyhow(&e))?;
        let read = |path: String| (path.clone(), fs::read(out.join(path)).unwrap());
        Ok(list(&out).unwrap().into_iter().map(read).collect())
    }

    #[test]
    fn the_site_is_laid_out_by_hash() {
        let dir = tempfile::tempdir().unwrap();
        inputs(dir.path());
        let site = run_in(dir.path(), "out", true).unwrap();
        let json = site_json(&site);
        let model = json["model"]["path"].as_str().unwrap();
        let vendor = json["vendor"]["path"].as_str().unwrap();
        assert!(model.starts_with("gemma3-text-") && model.len() == 12 + 16, "{model}");
        let main = hashed_main(&site);
        let named = |start: &str| {
            let path = site.keys().find(|path| path.starts_with(start));
            path.unwrap_or_else(|| panic!("{start} is not there")).clone()
        };
        let release = Manifest::parse(&site[&named("releases/")]).unwrap();
        let mut expected: Vec<String> =
            ["_headers", "hosts/Caddyfile", "hosts/nginx.conf", "index.html", "isolate.js"]
                .map(String::from)
                .to_vec();
        expected.push("vercel.json".into());
        expected.push(release::manifest::path_of(&release.release));
        for file in ["LICENSES.", "main.", "site."] {
            expected.push(named(&format!("assets/{file}")));
        }
        for (path, text) in MODEL {
            let ending = path.rsplit_once('.').unwrap().1;
            let digest = BlobDigest::of(text.as_bytes()).to_string();
            expected.push(format!("models/{}.{ending}", &digest[..32]));
        }
        for file in ["ort-wasm-simd-threaded.wasm", "transformers.min.js"] {
            expected.push(format!("{vendor}{file}"));
        }
        expected.sort();
        assert_eq!(site.keys().cloned().collect::<Vec<_>>(), expected);
        assert_eq!(release.files.len(), expected.len() - 5, "all but what is for hosts");
        assert_eq!(json["model"]["label"], "onnx-int4");
        assert_eq!(json["model"]["dtypes"], json!(["q4"]));
        assert_eq!(json["reports"][0]["models"]["base"]["exact_match"], 0.01);
        assert_eq!(json["reports"][0].get("examples"), None);
        let index = String::from_utf8(site["index.html"].clone()).unwrap();
        assert!(index.contains(&format!("./assets/{main}")), "{index}");
    }

    fn site_json(site: &BTreeMap<String, Vec<u8>>) -> Value {
        let path = site.keys().find(|path| path.starts_with("assets/site.")).unwrap();
        serde_json::from_slice(&site[path]).unwrap()
    }

    fn hashed_main(site: &BTreeMap<String, Vec<u8>>) -> String {
        let path = site.keys().find(|p| p.starts_with("assets/main.")).unwrap();
        path.strip_prefix("assets/").unwrap().to_string()
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        inputs(dir.path());
        let first = run_in(dir.path(), "one", true).unwrap();
        assert_eq!(first, run_in(dir.path(), "two", true).unwrap());
        put(dir.path(), &[("model/onnx/model_q4.onnx_data", "WEIGHTS")]);
        let moved = run_in(dir.path(), "three", true).unwrap();
        let models = |site: &BTreeMap<String, Vec<u8>>| {
            site.keys().filter(|p| p.starts_with("models/")).cloned().collect::<Vec<_>>()
        };
        assert_ne!(models(&first), models(&moved));
    }

    #[test]
    fn weights_come_in_parts_that_two_models_share() {
        let dir = tempfile::tempdir().unwrap();
        inputs(dir.path());
        let data = dir.path().join("model/onnx/model_q4.onnx_data");
        let mut weights: Vec<u8> = (0..200_000u32).map(|i| (i / 7) as u8).collect();
        let mut parts = Vec::new();
        for out in ["one", "two"] {
            fs::write(&data, &weights).unwrap();
            let site = run_in(dir.path(), out, false).unwrap();
            let files = site_json(&site)["model"]["files"].as_array().unwrap().clone();
            let file = files.iter().find(|f| f["path"] == "onnx/model_q4.onnx_data").unwrap();
            let names = file["parts"].as_array().unwrap().iter();
            let names: Vec<_> = names.map(|p| p["path"].as_str().unwrap().to_string()).collect();
            let whole: Vec<u8> = names.iter().flat_map(|name| site[name].clone()).collect();
            assert_eq!(whole, weights);
            parts.push(names);
            weights[70_000] ^= 1;
        }
        assert_eq!(parts[0].len(), 4);
        let same: Vec<bool> = (0..4).map(|i| parts[0][i] == parts[1][i]).collect();
        assert_eq!(same, [true, false, true, true]);
    }

    #[test]
    fn licences_go_along_and_what_they_lack_is_told() {
        let gemma = r#"{"of":"google/gemma-3-270m-it","license":"gemma"}"#;
        let notice = "Gemma is provided under and subject to the Gemma Terms of Use found at x";
        for (files, lacks) in [
            (&[][..], 1),
            (&[("model/LICENSE.json", gemma)], 2),
            (&[("model/LICENSE.json", gemma), ("model/LICENSE", "THE TERMS")], 1),
            (
                &[
                    ("model/LICENSE.json", gemma),
                    ("model/LICENSE", "THE TERMS"),
                    ("notices/NOTICE", notice),
                ],
                0,
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            inputs(dir.path());
            put(dir.path(), files);
            let site = run_in(dir.path(), "out", true).unwrap();
            let manifest = site.keys().find(|path| path.starts_with("releases/")).unwrap();
            let manifest = Manifest::parse(&site[manifest]).unwrap();
            assert_eq!(manifest.lacks.len(), lacks, "{files:?}");
            let text = site.keys().find(|path| path.starts_with("assets/LICENSES.")).unwrap();
            let text = String::from_utf8(site[text].clone()).unwrap();
            for (path, terms) in files.iter().filter(|(path, _)| !path.ends_with(".json")) {
                assert!(text.contains(terms), "{path} is not in LICENSES.txt");
            }
            assert_eq!(text.contains("google/gemma-3-270m-it"), !files.is_empty());
        }
    }

    #[test]
    fn a_report_is_not_needed() {
        let dir = tempfile::tempdir().unwrap();
        inputs(dir.path());
        let site = run_in(dir.path(), "out", false).unwrap();
        let json = site_json(&site);
        assert_eq!(json["reports"], json!([]));
        assert_eq!(json["model"]["label"], "gemma3_text");
    }

    #[test]
    fn a_broken_input_is_named() {
        for (path, text, message) in [
            ("app/index.html", None, "recipes/app has no index.html"),
            ("model/config.json", None, "recipes/model/config.json is not there"),
            (
                "model/onnx/model_q4.onnx",
                None,
                "recipes/model has no graph that Transformers.js knows",
            ),
            (
                "model/tokenizer_config.json",
                Some("{}"),
                "recipes/model/tokenizer_config.json has no chat template: a page cannot ask its model",
            ),
            ("report/eval.json", Some("{}"), "recipes/report/eval.json tells of no models"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            inputs(dir.path());
            match text {
                Some(text) => fs::write(dir.path().join(path), text).unwrap(),
                None => fs::remove_file(dir.path().join(path)).unwrap(),
            }
            let failure = run_in(dir.path(), "out", true).unwrap_err();
            assert_eq!((failure.class, failure.message.as_str()), (step::Class::Input, message));
        }
        let dir = tempfile::tempdir().unwrap();
        inputs(dir.path());
        fs::remove_file(dir.path().join("app/index.html")).unwrap();
        let hint = run_in(dir.path(), "out", true).unwrap_err().hint;
        assert_eq!(
            hint.as_deref(),
            Some("`app` names the folder of a page, for example `../site`")
        );
    }
}
