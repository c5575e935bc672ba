//! `diff`: two results side by side.
//!
//! Knows nothing of how a model file is read: `tensors` does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use anyhow::Context;
use engine::{Engine, TargetId};
use memmap2::Mmap;
use serde_json::json;
use step::{ActionResult, Entry, Failure, Tree};

use super::show;
use crate::display::{self, Table};
use crate::tensors::{self, Changed, Difference, Distance, Files, Format};

pub fn run(engine: &Engine, a: &str, b: Option<&str>, json: bool) -> anyhow::Result<()> {
    let ((name_a, a), (name_b, b)) = match b {
        Some(b) => (find(engine, a)?, find(engine, b)?),
        None => before_and_now(engine, a)?,
    };
    let actions = engine.action(a.key).zip(engine.action(b.key));
    let causes =
        actions.map_or(Vec::new(), |(a, b)| engine::why::differences(engine.store(), &a, &b));
    let (tree_a, tree_b) = (engine.store().tree(a.output)?, engine.store().tree(b.output)?);
    let compared = models(&tree_a, &tree_b)
        .into_iter()
        .map(|models| compare(engine, models, [&name_a, &name_b]))
        .collect::<anyhow::Result<Vec<_>>>()?;
    if json {
        let figures: BTreeMap<_, _> =
            metrics(&a, &b).into_iter().map(|(name, a, b)| (name, json!([a, b]))).collect();
        let files: BTreeMap<_, _> = files(&tree_a, &tree_b)
            .into_iter()
            .map(|(path, a, b)| (path, json!([a.map(|e| e.digest), b.map(|e| e.digest)])))
            .collect();
        let line = json!({
            "a": {"name": name_a, "key": a.key}, "b": {"name": name_b, "key": b.key},
            "differences": causes, "metrics": figures, "files": files,
            "tensors": compared.iter().flat_map(|pair| &pair.changed).map(|tensor| {
                let distance = tensor.difference.distance();
                json!({
                    "name": tensor.name, "max_abs": distance.map(|d| d.largest),
                    "relative_norm": distance.map(Distance::relative),
                })
            }).collect::<Vec<_>>(),
        });
        println!("{line}");
        return Ok(());
    }

    println!("a  {name_a}  {}\nb  {name_b}  {}\n", a.key.short(), b.key.short());
    causes.iter().for_each(|cause| println!("{cause}"));
    let mut table = Table::new(["figure", "a", "b", "b - a"]);
    for (name, a, b) in metrics(&a, &b) {
        let change = a.zip(b).map_or(String::new(), |(a, b)| format!("{:+.4}", b - a));
        let show = |value: Option<f64>| value.map_or(String::new(), display::figure);
        table.row([name, show(a), show(b), change]);
    }
    println!("\n{table}");
    let mut table = Table::new(["file", "a", "b", ""]);
    for (path, a, b) in files(&tree_a, &tree_b) {
        let size = |e: Option<&step::Entry>| e.map_or(String::new(), |e| display::bytes(e.size));
        let same = a.zip(b).is_some_and(|(a, b)| a.digest == b.digest);
        table.row([path, size(a), size(b), if same { "same".into() } else { "differs".into() }]);
    }
    println!("{table}");
    compared.iter().filter(|pair| !pair.changed.is_empty()).for_each(print);
    Ok(())
}

fn print(pair: &Compared) {
    let Compared { a, b, changed, of } = pair;
    let files = if a == b { a.clone() } else { format!("{a} → {b}") };
    println!("{files}: {} of {of} tensors differ", changed.len());
    let mut table = Table::new(["tensor", "type", "max |b - a|", "|b - a| / |a|"]);
    let mut row = |name: &str, kind: &str, difference: Difference| {
        let word = match difference {
            Difference::Values(d) => {
                let [largest, relative] = [d.largest, d.relative()].map(|x| format!("{x:.3e}"));
                return table.row([name.into(), kind.into(), largest, relative]);
            }
            Difference::Bytes => "bytes differ",
            Difference::Shapes => "shapes differ",
            Difference::OnlyInA => "only in a",
            Difference::OnlyInB => "only in b",
        };
        table.row([name.into(), kind.into(), word.into(), String::new()]);
    };
    changed.iter().for_each(|t| row(&t.name, &t.kind, t.difference));
    let all: Vec<Distance> = changed.iter().filter_map(|t| t.difference.distance()).collect();
    if all.len() > 1 {
        row(&format!("these {}", all.len()), "", Difference::Values(all.into_iter().sum()));
    }
    println!("{table}");
}

/// A name for people and the result: of a target, or of an action by the start of its key.
fn find(engine: &Engine, word: &str) -> anyhow::Result<(String, ActionResult)> {
    let hex = word.len() >= 6 && word.chars().all(|c| c.is_ascii_hexdigit());
    if hex {
        let results = engine.store().actions().all()?;
        let mut found = results.into_iter().filter(|r| r.key.to_string().starts_with(word));
        return match (found.next(), found.next()) {
            (Some(one), None) => Ok((one.step.clone(), one)),
            (Some(_), Some(_)) => Err(Failure::input(format!("several actions begin with {word}"))
                .hint("type more of its key")
                .into()),
            _ => Err(Failure::input(format!("no result of an action {word}…")).into()),
        };
    }
    let id = one_target(engine, word)?;
    let result = show::built(engine, &id)?;
    Ok((id.to_string(), result))
}

fn before_and_now(
    engine: &Engine,
    word: &str,
) -> anyhow::Result<((String, ActionResult), (String, ActionResult))> {
    let (name, now) = find(engine, word)?;
    let id = one_target(engine, word)?;
    let before = engine.history(&id).into_iter().rev().find(|old| old.key != now.key);
    let before = before.ok_or_else(|| {
        Failure::input(format!("{name} has stood for one result only"))
            .hint("name two targets, or the key of another result")
    })?;
    Ok(((format!("{name}, before"), before), (name, now)))
}

fn one_target(engine: &Engine, word: &str) -> anyhow::Result<TargetId> {
    let mut ids = engine.resolver().expand(&[word.to_string()])?;
    match ids.len() {
        1 => Ok(ids.remove(0)),
        n => Err(Failure::input(format!("`{word}` is {n} targets")).hint("name one").into()),
    }
}

fn metrics(a: &ActionResult, b: &ActionResult) -> Vec<(String, Option<f64>, Option<f64>)> {
    let names: BTreeSet<&String> = a.metrics.keys().chain(b.metrics.keys()).collect();
    let of = |r: &ActionResult, name: &str| r.metrics.get(name).copied();
    names.into_iter().map(|name| (name.clone(), of(a, name), of(b, name))).collect()
}

type Pair<'a> = (String, Option<&'a step::Entry>, Option<&'a step::Entry>);

fn files<'a>(a: &'a Tree, b: &'a Tree) -> Vec<Pair<'a>> {
    let find = |tree: &'a Tree, path: &str| tree.entries().iter().find(|e| e.path == path);
    let paths: BTreeSet<&String> = a.entries().iter().chain(b.entries()).map(|e| &e.path).collect();
    paths.into_iter().map(|path| (path.clone(), find(a, path), find(b, path))).collect()
}

/// The tensors of two model files, side by side.
struct Compared {
    a: String,
    b: String,
    changed: Vec<Changed>,
    /// How many names there are in either.
    of: usize,
}

/// Model files that both results have under one path; and where one of a format is left over in
/// each, these two: `model-F16.gguf` and `model-Q8_0.gguf`.
fn models<'a>(a: &'a Tree, b: &'a Tree) -> Vec<[Model<'a>; 2]> {
    let all = files(a, b);
    let mut pairs = Vec::new();
    for format in Format::ALL {
        let of_format = all.iter().filter(|(path, ..)| Format::of(path) == Some(format));
        let (mut left_a, mut left_b) = (Vec::new(), Vec::new());
        for pair in of_format {
            match *pair {
                (_, Some(of_a), Some(of_b)) => {
                    pairs.push([Model::new(format, of_a, a), Model::new(format, of_b, b)]);
                }
                (_, of_a, of_b) => {
                    left_a.extend(of_a);
                    left_b.extend(of_b);
                }
            }
        }
        if let ([of_a], [of_b]) = (&left_a[..], &left_b[..]) {
            pairs.push([Model::new(format, of_a, a), Model::new(format, of_b, b)]);
        }
    }
    pairs.retain(|[a, b]| a.files != b.files);
    pairs
}

/// A model file, and the files that its tensors may lie in.
struct Model<'a> {
    path: &'a str,
    format: Format,
    files: Vec<&'a Entry>,
}

impl<'a> Model<'a> {
    /// External data of ONNX lies in the model's folder or below it.
    fn new(format: Format, file: &'a Entry, tree: &'a Tree) -> Self {
        let path = file.path.as_str();
        let folder = &path[..path.rfind('/').map_or(0, |slash| slash + 1)];
        let files = match format {
            Format::Safetensors | Format::Gguf => vec![file],
            Format::Onnx => tree.entries().iter().filter(|e| e.path.starts_with(folder)).collect(),
        };
        Self { path, format, files }
    }

    fn map(&self, engine: &Engine) -> anyhow::Result<Vec<Mmap>> {
        self.files.iter().map(|file| map(&engine.store().blob_path(file.digest))).collect()
    }

    fn bytes<'m>(&'m self, maps: &'m [Mmap]) -> Files<'m> {
        self.files.iter().zip(maps).map(|(file, map)| (file.path.as_str(), &map[..])).collect()
    }
}

fn compare(engine: &Engine, [a, b]: [Model; 2], names: [&str; 2]) -> anyhow::Result<Compared> {
    let (maps_a, maps_b) = (a.map(engine)?, b.map(engine)?);
    let of_a = tensors::read(a.path, a.format, &a.bytes(&maps_a)).context(names[0].to_string())?;
    let of_b = tensors::read(b.path, b.format, &b.bytes(&maps_b)).context(names[1].to_string())?;
    let all: BTreeSet<&str> = of_a.iter().chain(&of_b).map(|t| t.name.as_str()).collect();
    Ok(Compared {
        a: a.path.into(),
        b: b.path.into(),
        changed: tensors::compare(&of_a, &of_b),
        of: all.len(),
    })
}

fn map(path: &Path) -> anyhow::Result<Mmap> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    // SAFETY: blobs are read-only and never change under their name.
    unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Tree {
        let entry = |(path, text): &(&str, &str)| Entry {
            path: path.to_string(),
            digest: step::BlobDigest::of(text.as_bytes()),
            size: text.len() as u64,
        };
        Tree::new(files.iter().map(entry).collect()).unwrap()
    }

    fn paired(a: &[(&str, &str)], b: &[(&str, &str)]) -> Vec<[String; 2]> {
        let (a, b) = (tree(a), tree(b));
        models(&a, &b).iter().map(|pair| pair.each_ref().map(|m| m.path.to_string())).collect()
    }

    #[test]
    fn files_are_compared_two_and_two() {
        let one = paired(
            &[("a.safetensors", "1"), ("b.safetensors", "1"), ("config.json", "1")],
            &[("a.safetensors", "1"), ("b.safetensors", "2"), ("config.json", "2")],
        );
        assert_eq!(one, [["b.safetensors", "b.safetensors"]]);
        let renamed = paired(&[("m-F16.gguf", "1")], &[("m-Q8_0.gguf", "2")]);
        assert_eq!(renamed, [["m-F16.gguf", "m-Q8_0.gguf"]]);
        // Which of the two it would be is not known.
        assert!(paired(&[("a.gguf", "1")], &[("b.gguf", "2"), ("c.gguf", "3")]).is_empty());
    }

    #[test]
    fn an_onnx_model_is_compared_where_its_data_differs() {
        let model = |data| [("onnx/m.onnx", "1"), ("onnx/m.onnx_data", data), ("readme", data)];
        assert_eq!(paired(&model("1"), &model("2")), [["onnx/m.onnx", "onnx/m.onnx"]]);
        assert!(paired(&model("1"), &model("1")).is_empty());
    }
}
