//! `diff`: two results side by side.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use anyhow::Context;
use engine::{Engine, TargetId};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use step::{ActionResult, Failure, Tree};

use super::show;
use crate::display::{self, Table};

pub fn run(engine: &Engine, a: &str, b: Option<&str>, json: bool) -> anyhow::Result<()> {
    let ((name_a, a), (name_b, b)) = match b {
        Some(b) => (find(engine, a)?, find(engine, b)?),
        None => before_and_now(engine, a)?,
    };
    let actions = engine.action(a.key).zip(engine.action(b.key));
    let causes =
        actions.map_or(Vec::new(), |(a, b)| engine::why::differences(engine.store(), &a, &b));
    let (tree_a, tree_b) = (engine.store().tree(a.output)?, engine.store().tree(b.output)?);
    let tensors = tensors(engine, &tree_a, &tree_b)?;
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
            "tensors": tensors.iter().map(|t| json!({
                "name": t.name, "max_abs": t.largest, "relative_norm": t.relative,
            })).collect::<Vec<_>>(),
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
    if !tensors.is_empty() {
        let mut table = Table::new(["tensor that differs", "max |b - a|", "|b - a| / |a|"]);
        for tensor in &tensors {
            let number = |x: Option<f64>| x.map_or("shapes differ".into(), |x| format!("{x:.3e}"));
            table.row([tensor.name.clone(), number(tensor.largest), number(tensor.relative)]);
        }
        println!("{table}");
    }
    Ok(())
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

/// A tensor that is not the same in both.
struct Changed {
    name: String,
    /// `None` where the shapes differ, or only one has it.
    largest: Option<f64>,
    relative: Option<f64>,
}

/// Compares the tensors of safetensors files that both results have under one name.
fn tensors(engine: &Engine, a: &Tree, b: &Tree) -> anyhow::Result<Vec<Changed>> {
    let mut changed = Vec::new();
    for (path, a, b) in files(a, b) {
        let (Some(a), Some(b)) = (a, b) else { continue };
        if !path.ends_with(".safetensors") || a.digest == b.digest {
            continue;
        }
        let map = |digest| map(&engine.store().blob_path(digest));
        let (bytes_a, bytes_b) = (map(a.digest)?, map(b.digest)?);
        let parse = |bytes| {
            SafeTensors::deserialize(bytes)
                .map_err(|e| Failure::input(format!("{path} is no safetensors file: {e}")))
        };
        let (of_a, of_b) = (parse(&bytes_a)?, parse(&bytes_b)?);
        let names: BTreeSet<String> =
            of_a.names().into_iter().chain(of_b.names()).map(String::from).collect();
        for name in names {
            let both = of_a.tensor(&name).ok().zip(of_b.tensor(&name).ok());
            let comparable = both.as_ref().filter(|(a, b)| a.shape() == b.shape());
            match comparable.map(|(a, b)| distance(a, b)) {
                Some(Some((largest, relative))) if largest > 0.0 => {
                    let (largest, relative) = (Some(largest), Some(relative));
                    changed.push(Changed { name, largest, relative });
                }
                Some(Some(_)) => {}
                _ => changed.push(Changed { name, largest: None, relative: None }),
            }
        }
    }
    Ok(changed)
}

fn map(path: &Path) -> anyhow::Result<memmap2::Mmap> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    // SAFETY: blobs are read-only and never change under their name.
    unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))
}

/// The largest difference of two elements, and the norm of all differences by that of `a`. `None`
/// for a kind of number that has neither.
fn distance(a: &TensorView, b: &TensorView) -> Option<(f64, f64)> {
    let (mut largest, mut squares, mut of_a) = (0.0_f64, 0.0, 0.0);
    for (x, y) in numbers(a)?.zip(numbers(b)?) {
        let difference = (y - x).abs();
        largest = largest.max(difference);
        squares += difference * difference;
        of_a += x * x;
    }
    Some((largest, (squares / of_a.max(f64::MIN_POSITIVE)).sqrt()))
}

fn numbers<'a>(tensor: &'a TensorView) -> Option<Box<dyn Iterator<Item = f64> + 'a>> {
    let data = tensor.data();
    Some(match tensor.dtype() {
        Dtype::F32 => Box::new(
            data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()),
        ),
        Dtype::BF16 => {
            Box::new(data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).into()))
        }
        Dtype::F16 => {
            Box::new(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).into()))
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_numbers() {
        let bytes = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
        };
        let (a, b) = (bytes(&[3.0, 4.0]), bytes(&[3.0, 2.0]));
        let view = |data| TensorView::new(Dtype::BF16, vec![2], data).unwrap();
        assert_eq!(distance(&view(&a), &view(&b)), Some((2.0, 0.4)));
        assert_eq!(distance(&view(&a), &view(&a)), Some((0.0, 0.0)));
    }
}
