//! `decode FIRST NEW ID,ID,… DIR…`: what each model folder computes of a row, a line of JSON each.
//!
//! The other side of tests/browser/graphs.mjs: ONNX Runtime on this CPU. `ORT_DYLIB_PATH` names its
//! library, or the folder that it lies in.

use std::path::Path;

use runtime::{Model, Options, Runtime};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [first, new, row, dirs @ ..] = args.as_slice() else {
        return Err("decode FIRST NEW ID,ID,… DIR…".into());
    };
    let row: Vec<u32> = row.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?;
    let library = std::env::var_os("ORT_DYLIB_PATH").ok_or("ORT_DYLIB_PATH is not set")?;
    Runtime::init(Path::new(&library))?;
    for dir in dirs {
        println!("{}", decode(Path::new(dir), first.parse()?, new.parse()?, &row)?);
    }
    Ok(())
}

/// `whole`: the logits after each token of the row, read at once. `steps`: those after the `first`
/// tokens and after each later one, read alone: the row's, then `new` of the greatest logits, `ids`.
fn decode(dir: &Path, first: usize, new: usize, row: &[u32]) -> Result<serde_json::Value> {
    let mut model = Model::open(dir, Options { threads: 1, scratch: dir })?;
    let mut ids = row.to_vec();
    let mut steps = Vec::new();
    for _ in 0..new {
        let alone = ids.len() - first;
        steps = model.logits_with_cache(&ids, alone + 1, alone)?;
        let last = &steps[alone * model.vocab_size()..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]));
        ids.push(best.ok_or("no logits")? as u32);
    }
    Ok(json!({ "whole": model.logits(row)?, "steps": steps, "ids": ids[row.len()..] }))
}
