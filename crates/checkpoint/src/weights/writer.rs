//! Safetensors files that grow tensor by tensor, in constant memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use crate::Error;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Spec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Spec {
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// One file, or the shards of a model.
///
/// The order within a file is the format's own habit: larger types first, then by name. It depends
/// on the specs alone, so the bytes do too.
#[derive(Debug)]
pub struct Writer {
    /// Each with its tensors' places in `specs`.
    files: Vec<(PathBuf, Range<usize>)>,
    specs: Vec<Spec>,
    /// The file that is being written: files[open - 1].
    open: usize,
    file: BufWriter<File>,
    /// The tensor that is being written, and how many of its bytes are there.
    next: usize,
    part: usize,
}

impl Writer {
    /// Bytes of tensors in one file of a model, at most: a larger model is cut into shards.
    pub const SHARD: usize = 5_000_000_000;

    /// One file. `specs` may come in any order; write in that of [`Writer::order`].
    pub fn create(path: &Path, specs: Vec<Spec>) -> Result<Self, Error> {
        let files = vec![(path.to_path_buf(), 0..specs.len())];
        Self::of(files, specs)
    }

    /// `model.safetensors`, or shards of at most `shard` bytes and the index that names them. A
    /// tensor that is larger has a shard to itself.
    pub fn model(dir: &Path, specs: Vec<Spec>, shard: usize) -> Result<Self, Error> {
        let mut starts = vec![0];
        let mut bytes = 0;
        for (i, spec) in specs.iter().enumerate() {
            if bytes > 0 && bytes + spec.size() > shard {
                starts.push(i);
                bytes = 0;
            }
            bytes += spec.size();
        }
        if let [_] = starts[..] {
            return Self::create(&dir.join("model.safetensors"), specs);
        }
        let shards = starts.len();
        starts.push(specs.len());
        let name = |i: usize| format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        let mut map = Map::new();
        let mut files = Vec::new();
        for (i, ends) in starts.windows(2).enumerate() {
            let range = ends[0]..ends[1];
            for spec in &specs[range.clone()] {
                map.insert(spec.name.clone(), name(i).into());
            }
            files.push((dir.join(name(i)), range));
        }
        let parameters: usize = specs.iter().map(|s| s.shape.iter().product::<usize>()).sum();
        let size: usize = specs.iter().map(Spec::size).sum();
        let metadata = json!({"total_parameters": parameters, "total_size": size});
        let path = dir.join("model.safetensors.index.json");
        let index = format!("{:#}\n", json!({"metadata": metadata, "weight_map": map}));
        std::fs::write(&path, index).map_err(|e| Error::io(&path, e))?;
        Self::of(files, specs)
    }

    fn of(files: Vec<(PathBuf, Range<usize>)>, mut specs: Vec<Spec>) -> Result<Self, Error> {
        for (_, range) in &files {
            specs[range.clone()]
                .sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        }
        let (path, range) = &files[0];
        let file = begin(path, &specs[range.clone()])?;
        Ok(Self { files, specs, open: 1, file, next: 0, part: 0 })
    }

    /// The tensors in the order in which they are to be written.
    pub fn order(&self) -> Vec<Spec> {
        self.specs.clone()
    }

    /// Writes on: the next bytes of `name`, row-major, little-endian. Tensors come in the order of
    /// [`Writer::order`], each in as many pieces as it pleases.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<(), Error> {
        let path = &self.files[self.open - 1].0;
        let wrong = |message: String| Error::Header { path: path.clone(), message };
        let Some(spec) = self.specs.get(self.next) else {
            return Err(wrong(format!("`{name}` comes after the last tensor")));
        };
        let missing = spec.size() - self.part;
        if spec.name != name || data.len() > missing {
            return Err(wrong(format!(
                "expected {missing} bytes of `{}`, got {} of `{name}`",
                spec.name,
                data.len()
            )));
        }
        self.file.write_all(data).map_err(|e| Error::io(path, e))?;
        self.part += data.len();
        if self.part == spec.size() {
            (self.next, self.part) = (self.next + 1, 0);
            if let Some((path, range)) = self.files.get(self.open)
                && range.start == self.next
            {
                self.file.flush().map_err(|e| Error::io(&self.files[self.open - 1].0, e))?;
                self.file = begin(path, &self.specs[range.clone()])?;
                self.open += 1;
            }
        }
        Ok(())
    }

    /// Ends the file; an error if a tensor is missing.
    pub fn finish(mut self) -> Result<(), Error> {
        let path = self.files[self.open - 1].0.clone();
        if let Some(spec) = self.specs.get(self.next) {
            let message = format!("`{}` was not written whole", spec.name);
            return Err(Error::Header { path, message });
        }
        self.file.flush().map_err(|e| Error::io(&path, e))
    }
}

/// A file with its header.
fn begin(path: &Path, specs: &[Spec]) -> Result<BufWriter<File>, Error> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for spec in specs {
        let info = TensorInfo {
            dtype: spec.dtype,
            shape: spec.shape.clone(),
            data_offsets: (offset, offset + spec.size()),
        };
        offset += spec.size();
        let info = serde_json::to_value(info)
            .map_err(|e| Error::Header { path: path.into(), message: e.to_string() })?;
        header.insert(spec.name.clone(), info);
    }
    let mut text = step::canonical::to_vec(&Value::Object(header));
    // Data begins at a multiple of eight.
    text.resize(text.len().next_multiple_of(8), b' ');
    let file = File::create(path).map_err(|e| Error::io(path, e))?;
    // Whatever is larger goes by.
    let mut file = BufWriter::with_capacity(1 << 16, file);
    file.write_all(&(text.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(&text))
        .map_err(|e| Error::io(path, e))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Weights;

    #[test]
    fn tensors_come_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let writer = || Writer::create(&path, vec![Spec::new("a", Dtype::F32, &[1])]).unwrap();
        assert!(writer().write("a", &[0; 5]).is_err());
        assert!(writer().write("b", &[0; 4]).is_err());
        assert!(writer().finish().is_err());
        let mut partly = writer();
        partly.write("a", &[0; 3]).unwrap();
        assert!(partly.finish().is_err());
    }

    #[test]
    fn a_large_model_is_cut_into_shards() {
        let shapes = [("c", 3), ("a", 2), ("b", 2), ("large", 9), ("d", 4)];
        let specs = || shapes.map(|(name, n)| Spec::new(name, Dtype::F32, &[n])).to_vec();
        let filled = |shard: usize| {
            let dir = tempfile::tempdir().unwrap();
            let mut writer = Writer::model(dir.path(), specs(), shard).unwrap();
            for spec in writer.order() {
                let bytes: Vec<u8> = (0..spec.size() as u8).collect();
                let (first, rest) = bytes.split_at(3);
                writer.write(&spec.name, first).unwrap();
                writer.write(&spec.name, rest).unwrap();
            }
            writer.finish().unwrap();
            dir
        };
        for (shard, files) in [(80, 1), (79, 2), (20, 4), (1, 5)] {
            let dir = filled(shard);
            let names = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
            let names: Vec<String> = names.map(|n| n.into_string().unwrap()).collect();
            let shards = names.iter().filter(|n| n.ends_with(".safetensors")).count();
            assert_eq!(shards, files, "{names:?}");
            let weights = Weights::open(dir.path()).unwrap();
            for spec in specs() {
                let expected: Vec<u8> = (0..spec.size() as u8).collect();
                assert_eq!(weights.get(&spec.name).unwrap().data, expected);
            }
        }
        let index = std::fs::read(filled(20).path().join("model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"], json!({"total_parameters": 20, "total_size": 80}));
        assert_eq!(index["weight_map"]["a"], "model-00001-of-00004.safetensors");
        assert_eq!(index["weight_map"]["large"], "model-00003-of-00004.safetensors");
    }
}
