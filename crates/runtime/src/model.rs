//! A model folder as a session that turns tokens into logits, with a key/value cache.
//!
//! Knows nothing of sampling. The graph is one that Transformers.js could run: `input_ids`,
//! `attention_mask`, `past_key_values.N.key|value` in, `logits` and `present.N.key|value` out;
//! `position_ids` and `num_logits_to_keep` where the graph asks for them.

use std::path::{Path, PathBuf};

use half::f16;
use ort::session::{Session, SessionInputValue};
use ort::value::{
    DynValue, PrimitiveTensorElementType, Shape, Tensor, TensorElementType, ValueType,
};

use crate::{Error, Runtime};

/// How a model is opened.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// How many threads one run of the graph may use. The results do not depend on it.
    pub threads: usize,
    /// Where the graph of a plain model folder is written. One folder a model.
    pub scratch: &'a Path,
}

/// A causal language model.
pub struct Model {
    path: PathBuf,
    session: Session,
    ports: Vec<Port>,
    caches: Vec<CachePort>,
    vocab: usize,
    positions: Option<usize>,
}

/// An input of the graph, in the graph's order.
#[derive(Debug, Clone, Copy)]
enum Port {
    InputIds,
    AttentionMask,
    PositionIds,
    NumLogitsToKeep,
    /// Index into `Model::caches`.
    Past(usize),
}

/// One key or value tensor of the cache: [batch, heads, positions, width].
#[derive(Debug)]
struct CachePort {
    past: String,
    present: String,
    /// Of f16, and not of f32.
    half: bool,
    heads: i64,
    width: i64,
}

/// What the model remembers of the tokens that it has read, for each row of a batch.
pub(crate) struct Cache {
    batch: usize,
    len: usize,
    values: Vec<DynValue>,
}

impl Cache {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Forgets all rows but those numbered in `rows`, which come to stand in that order.
    pub(crate) fn keep(&mut self, rows: &[usize]) -> Result<(), Error> {
        for value in &mut self.values {
            *value = select(value, rows).map_err(|e| Error::Cache(e.to_string()))?;
        }
        self.batch = rows.len();
        Ok(())
    }
}

/// The given rows of a tensor's first dimension.
fn select(value: &DynValue, rows: &[usize]) -> ort::Result<DynValue> {
    match value.dtype().tensor_type() {
        Some(TensorElementType::Float16) => select_of::<f16>(value, rows),
        _ => select_of::<f32>(value, rows),
    }
}

fn select_of<T>(value: &DynValue, rows: &[usize]) -> ort::Result<DynValue>
where
    T: PrimitiveTensorElementType + Copy + std::fmt::Debug + 'static,
{
    let (shape, data) = value.try_extract_tensor::<T>()?;
    let size = data.len() / shape[0] as usize;
    let kept = rows.iter().flat_map(|&r| &data[r * size..][..size]).copied().collect::<Vec<_>>();
    let shape = [rows.len() as i64, shape[1], shape[2], shape[3]];
    Ok(Tensor::from_array((shape, kept))?.into_dyn())
}

impl Model {
    /// Opens a folder with one `onnx/model*.onnx`, or a plain Hugging Face folder, whose graph is
    /// first written in fp32 to `options.scratch`.
    pub fn open(dir: &Path, options: Options<'_>) -> Result<Model, Error> {
        let runtime = Runtime::loaded()?;
        let path = match graph_in(dir)? {
            Some(path) => path,
            None if dir.join("config.json").is_file() => write_graph(dir, options.scratch)?,
            None => return Err(Error::NoModel(dir.into())),
        };
        let session = session(&runtime, &path, options.threads).map_err(|e| Error::Session {
            path: path.clone(),
            doing: "ONNX Runtime does not open it",
            message: e.to_string(),
        })?;
        let (ports, caches) = ports(&session, &path)?;
        let vocab = vocab(&session, &path)?;
        Ok(Model { positions: positions(dir)?, path, session, ports, caches, vocab })
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// How many tokens fit, prompt and answer together; `None` where config.json does not say.
    pub fn max_positions(&self) -> Option<usize> {
        self.positions
    }

    /// The logits after each token: [T, vocab].
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        self.logits_batch(&[ids])
    }

    /// The logits after each token of rows of one length: [B, T, vocab].
    pub fn logits_batch(&mut self, rows: &[&[u32]]) -> Result<Vec<f32>, Error> {
        let Some(first) = rows.first() else { return Ok(Vec::new()) };
        if let Some(other) = rows.iter().find(|r| r.len() != first.len()) {
            return Err(Error::Ragged(first.len(), other.len()));
        }
        let mut cache = self.cache(rows.len())?;
        self.forward(&rows.concat(), &mut cache, first.len())
    }

    /// The logits after the last `of` tokens, of which the last `alone` are read one by one on top of
    /// the cache, as an answer is: [of, vocab].
    pub fn logits_with_cache(
        &mut self,
        ids: &[u32],
        of: usize,
        alone: usize,
    ) -> Result<Vec<f32>, Error> {
        let (together, alone) = ids.split_at(ids.len().saturating_sub(alone).max(1).min(ids.len()));
        let mut cache = self.cache(1)?;
        let mut all = self.forward(together, &mut cache, of.min(together.len()))?;
        for id in alone {
            all.extend(self.forward(&[*id], &mut cache, 1)?);
        }
        Ok(all.split_off(all.len().saturating_sub(of * self.vocab)))
    }

    /// An empty cache.
    pub(crate) fn cache(&self, batch: usize) -> Result<Cache, Error> {
        let empty = |port: &CachePort| {
            let shape = [batch as i64, port.heads, 0, port.width];
            let allocator = self.session.allocator();
            match port.half {
                true => Tensor::<f16>::new(allocator, shape).map(|t| t.into_dyn()),
                false => Tensor::<f32>::new(allocator, shape).map(|t| t.into_dyn()),
            }
        };
        let values = self.caches.iter().map(empty).collect::<Result<_, _>>();
        Ok(Cache { batch, len: 0, values: values.map_err(|e| self.failed(&e))? })
    }

    /// Reads `ids` ([batch, T], row by row) on top of `cache`, and gives the logits after the last
    /// `keep` of each row: [batch, keep, vocab].
    pub(crate) fn forward(
        &mut self,
        ids: &[u32],
        cache: &mut Cache,
        keep: usize,
    ) -> Result<Vec<f32>, Error> {
        let (batch, past) = (cache.batch, cache.len);
        let new = ids.len() / batch;
        let total = past + new;
        if new == 0 {
            return Err(Error::EmptyPrompt);
        }
        if let Some(positions) = self.positions.filter(|&most| total > most) {
            return Err(Error::TooLong { path: self.path.clone(), tokens: total, positions });
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab) {
            let what = format!("has {} tokens, there is none of number {id}", self.vocab);
            return Err(Error::Graph { path: self.path.clone(), what });
        }

        let inputs = self.inputs(ids, cache, keep).map_err(|e| self.failed(&e))?;
        let failed = |path: &Path, e: &dyn std::fmt::Display| Error::Session {
            path: path.into(),
            doing: "ONNX Runtime failed",
            message: e.to_string(),
        };
        let mut outputs = self.session.run(inputs).map_err(|e| failed(&self.path, &e))?;
        for (value, port) in cache.values.iter_mut().zip(&self.caches) {
            *value = outputs
                .remove(&port.present)
                .ok_or_else(|| failed(&self.path, &format!("no output {}", port.present)))?;
        }
        cache.len = total;

        let (shape, logits) =
            outputs["logits"].try_extract_tensor::<f32>().map_err(|e| failed(&self.path, &e))?;
        // A graph without `num_logits_to_keep` gives them all: the last ones are taken here.
        let given = shape[1] as usize;
        let row = given * self.vocab;
        let last = |b: usize| &logits[b * row + (given - keep) * self.vocab..][..keep * self.vocab];
        Ok((0..batch).flat_map(last).copied().collect())
    }

    /// The graph's inputs, in its order. The cache is lent, not copied.
    fn inputs<'c>(
        &self,
        ids: &[u32],
        cache: &'c Cache,
        keep: usize,
    ) -> ort::Result<Vec<(String, SessionInputValue<'c>)>> {
        let (batch, past) = (cache.batch, cache.len);
        let new = ids.len() / batch;
        let tensor = |width: usize, data: Vec<i64>| Tensor::from_array(([batch, width], data));
        let mut inputs: Vec<(String, SessionInputValue<'c>)> = Vec::new();
        for port in &self.ports {
            inputs.push(match *port {
                Port::InputIds => {
                    let data = ids.iter().map(|&id| i64::from(id)).collect();
                    ("input_ids".into(), tensor(new, data)?.into())
                }
                Port::AttentionMask => {
                    let data = vec![1; batch * (past + new)];
                    ("attention_mask".into(), tensor(past + new, data)?.into())
                }
                Port::PositionIds => {
                    let row = past as i64..(past + new) as i64;
                    let data = (0..batch).flat_map(|_| row.clone()).collect();
                    ("position_ids".into(), tensor(new, data)?.into())
                }
                Port::NumLogitsToKeep => {
                    let scalar = Tensor::from_array((Shape::new([]), vec![keep as i64]))?;
                    ("num_logits_to_keep".into(), scalar.into())
                }
                Port::Past(index) => {
                    (self.caches[index].past.clone(), (&cache.values[index]).into())
                }
            });
        }
        Ok(inputs)
    }

    fn failed(&self, error: &ort::Error) -> Error {
        Error::Session {
            path: self.path.clone(),
            doing: "ONNX Runtime failed",
            message: error.to_string(),
        }
    }
}

/// The folder's graph; `None` where there is no `onnx` folder with one.
fn graph_in(dir: &Path) -> Result<Option<PathBuf>, Error> {
    let Ok(entries) = dir.join("onnx").read_dir() else { return Ok(None) };
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("model") && name.ends_with(".onnx"))
        .collect();
    names.sort();
    match names.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(dir.join("onnx").join(one))),
        _ => Err(Error::ManyGraphs { dir: dir.into(), names }),
    }
}

/// The length that config.json allows, of the text model where there are several.
fn positions(dir: &Path) -> Result<Option<usize>, Error> {
    let path = dir.join("config.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
    let config: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::File { path, message: format!("no valid JSON: {e}") })?;
    let positions = |config: &serde_json::Value| config.get("max_position_embeddings")?.as_u64();
    let found = positions(&config).or_else(|| positions(config.get("text_config")?));
    Ok(found.map(|n| n as usize))
}

fn session(runtime: &Runtime, path: &Path, threads: usize) -> ort::Result<Session> {
    Session::builder(&runtime.environment)?
        .with_intra_threads(threads.max(1))?
        .with_inter_threads(1)?
        // Waiting threads sleep: another process may want the core.
        .with_intra_op_spinning(false)?
        .with_deterministic_compute(true)?
        .commit_from_file(path)
}

/// Names the graph's inputs; refuses one that nobody here knows how to fill.
fn ports(session: &Session, path: &Path) -> Result<(Vec<Port>, Vec<CachePort>), Error> {
    let refuse = |what: String| Error::Graph { path: path.into(), what };
    let mut ports = Vec::new();
    let mut caches = Vec::new();
    for input in session.inputs() {
        ports.push(match input.name() {
            "input_ids" => Port::InputIds,
            "attention_mask" => Port::AttentionMask,
            "position_ids" => Port::PositionIds,
            "num_logits_to_keep" => Port::NumLogitsToKeep,
            name => {
                let Some(rest) = name.strip_prefix("past_key_values.") else {
                    return Err(refuse(format!("wants an input `{name}`, which no causal LM has")));
                };
                let (half, heads, width) = match input.dtype() {
                    ValueType::Tensor {
                        ty: ty @ (TensorElementType::Float32 | TensorElementType::Float16),
                        shape,
                        ..
                    } if shape.len() == 4 && shape[1] > 0 && shape[3] > 0 => {
                        (*ty == TensorElementType::Float16, shape[1], shape[3])
                    }
                    _ => {
                        let want =
                            "fp32 or fp16 [batch, heads, positions, width], heads and width given";
                        return Err(refuse(format!("has an input `{name}` that is not {want}")));
                    }
                };
                let (past, present) = (name.to_string(), format!("present.{rest}"));
                caches.push(CachePort { past, present, half, heads, width });
                Port::Past(caches.len() - 1)
            }
        });
    }
    let has = |name: &str| session.outputs().iter().any(|o| o.name() == name);
    match caches.iter().find(|c| !has(&c.present)) {
        Some(cache) => Err(refuse(format!("has no output `{}`", cache.present))),
        None => Ok((ports, caches)),
    }
}

/// The width of the logits.
fn vocab(session: &Session, path: &Path) -> Result<usize, Error> {
    let logits = session.outputs().iter().find(|o| o.name() == "logits");
    match logits.map(|o| o.dtype()) {
        Some(ValueType::Tensor { ty: TensorElementType::Float32, shape, .. })
            if shape.len() == 3 && shape[2] > 0 =>
        {
            Ok(shape[2] as usize)
        }
        _ => {
            let what = "has no output `logits` of fp32 [batch, positions, vocabulary]".into();
            Err(Error::Graph { path: path.into(), what })
        }
    }
}

/// The graph of a plain Hugging Face folder, in fp32.
fn write_graph(dir: &Path, scratch: &Path) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(scratch)
        .map_err(|e| Error::File { path: scratch.into(), message: e.to_string() })?;
    let config = checkpoint::config::Config::read_to_run(dir).map_err(graph::Error::from)?;
    let options = graph::Options {
        dtype: graph::Dtype::Fp32,
        quantisation: graph::Quantisation::default(),
        max_positions: config.max_positions,
        chunk: graph::CHUNK,
    };
    Ok(graph::write(dir, scratch, options, &mut |_, _| ())?.graph)
}

#[cfg(all(test, feature = "worker"))]
mod tests;
