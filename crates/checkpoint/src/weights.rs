//! Tensors of a model folder: read through mmap, written in one stream.
//!
//! Knows nothing of what a tensor means. Nothing is copied until somebody asks for f32.

mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::Metadata;
use serde_json::Value;

pub use safetensors::Dtype;
pub use writer::{Spec, Writer};

use crate::config::Config;
use crate::{Error, names};

/// The tensors of a folder, one file or many.
#[derive(Debug)]
pub struct Weights {
    files: Vec<Mapped>,
    /// Name → index of its file.
    index: BTreeMap<String, usize>,
    dir: PathBuf,
}

/// A file whose header was checked: every tensor lies inside it.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    map: Mmap,
    /// Where the data begins.
    start: usize,
    metadata: Metadata,
}

/// A tensor where it lies in the file.
#[derive(Debug, Clone)]
pub struct TensorRef<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub data: &'a [u8],
    /// Of a matrix in 8 bits, whose type is I8: a bfloat16 a row.
    scales: Option<&'a [u8]>,
    path: &'a Path,
}

// What compressed-tensors calls the parts of a matrix in 8 bits, after the matrix's own name: its
// values, four to a word; a scale a row; its shape.
pub const PACKED: &str = "_packed";
pub const SCALE: &str = "_scale";
pub const SHAPE: &str = "_shape";

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, or
    /// `adapter_model.safetensors`.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let index = dir.join("model.safetensors.index.json");
        let mut paths = Vec::new();
        if index.is_file() {
            let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
            let value: Value = serde_json::from_str(&text)
                .map_err(|e| Error::Parse { path: index.clone(), message: e.to_string() })?;
            let map = value.get("weight_map").and_then(Value::as_object);
            let map = map.ok_or(Error::MissingKey { path: index.clone(), key: "weight_map" })?;
            let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                if name.contains(['/', '\\']) {
                    let message = format!("the shard `{name}` is not in the folder");
                    return Err(Error::Config { path: index, message });
                }
                paths.push(dir.join(name));
            }
        } else {
            let model = dir.join("model.safetensors");
            let adapter = dir.join("adapter_model.safetensors");
            paths.push(if adapter.is_file() && !model.is_file() { adapter } else { model });
        }
        let files: Vec<Mapped> = paths.iter().map(|p| Mapped::open(p)).collect::<Result<_, _>>()?;
        let mut by_name = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for name in file.metadata.tensors().keys() {
                if by_name.insert(name.clone(), at).is_some() {
                    let message = format!("tensor `{name}` stands in two shards");
                    return Err(Error::Header { path: file.path.clone(), message });
                }
            }
        }
        Ok(Self { files, index: by_name, dir: dir.to_path_buf() })
    }

    /// Opens one file, whatever its name.
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let file = Mapped::open(path)?;
        let index = file.metadata.tensors().keys().map(|name| (name.clone(), 0)).collect();
        Ok(Self { files: vec![file], index, dir: path.to_path_buf() })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// A tensor by its name; of a matrix in 8 bits, by that of the whole matrix.
    pub fn get(&self, name: &str) -> Result<TensorRef<'_>, Error> {
        if let Some((packed, scales)) = self.packed(name)? {
            return Ok(TensorRef { name: name.into(), scales: Some(scales), ..packed });
        }
        let missing = || Error::MissingTensor { path: self.dir.clone(), name: name.into() };
        let file = &self.files[*self.index.get(name).ok_or_else(missing)?];
        let info = file.metadata.info(name).ok_or_else(missing)?;
        let (from, to) = info.data_offsets;
        Ok(TensorRef {
            name: name.into(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            data: &file.map[file.start + from..file.start + to],
            scales: None,
            path: &file.path,
        })
    }

    /// A matrix in 8 bits and its scales, if it is one.
    fn packed(&self, name: &str) -> Result<Option<(TensorRef<'_>, &[u8])>, Error> {
        if self.contains(name) || !self.contains(&format!("{name}{PACKED}")) {
            return Ok(None);
        }
        let [packed, scales, shape] =
            [PACKED, SCALE, SHAPE].map(|part| self.get(&format!("{name}{part}")));
        let (packed, scales, shape) = (packed?, scales?, shape?);
        let sizes: Vec<usize> =
            shape.data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as usize).collect();
        let kinds = [packed.dtype, scales.dtype, shape.dtype];
        match (sizes.as_slice(), packed.shape.as_slice()) {
            (&[rows, columns], &[there, words])
                if kinds == [Dtype::I32, Dtype::BF16, Dtype::I64]
                    && scales.len() == rows
                    && (there, words) == (rows, columns.div_ceil(4)) =>
            {
                let whole = TensorRef { dtype: Dtype::I8, shape: sizes, ..packed };
                Ok(Some((whole, scales.data)))
            }
            _ => Err(Error::Header {
                path: packed.path.into(),
                message: format!("`{name}` in 8 bits and its scales do not go together"),
            }),
        }
    }

    /// Lets the system have back the pages of a tensor that was read: with all tensors copied one by
    /// one, a model would else be in memory twice. It can still be read again.
    pub fn let_go(&self, name: &str) {
        if let Ok(tensor) = self.get(name) {
            self.let_go_of(tensor.data);
        }
    }

    /// The same for a part of a tensor's data.
    pub fn let_go_of(&self, data: &[u8]) {
        #[cfg(unix)]
        for file in &self.files {
            let from = (data.as_ptr() as usize).wrapping_sub(file.map.as_ptr() as usize);
            if from < file.map.len() && data.len() <= file.map.len() - from {
                // SAFETY: the pages are a file's and are never written: what is dropped is read
                // again.
                let _ = unsafe {
                    let advice = memmap2::UncheckedAdvice::DontNeed;
                    file.map.unchecked_advise_range(advice, from, data.len())
                };
            }
        }
    }

    /// Rows of the tensor `name` as f32 in `out`; what was read is let go. A vector is one row.
    pub fn rows(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        /// The system brings in neighbours of a page that is read, as far as the multiples of this.
        const AROUND: usize = 64 << 10;
        let tensor = self.get(name)?;
        let columns = tensor.shape.last().copied().unwrap_or(1);
        out.resize(rows.len() * columns, 0.0);
        tensor.read_f32(rows.start * columns, out)?;
        let [from, to] =
            [rows.start, rows.end].map(|row| row * columns * tensor.dtype.bitsize() / 8);
        self.let_go_of(&tensor.data[from.saturating_sub(AROUND)..to]);
        Ok(())
    }

    /// Holds names, shapes and types to what `config` asks for.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        let expected: BTreeMap<_, _> = names::expected(config).into_iter().collect();
        for (name, shape) in &expected {
            let tensor = self.get(name)?;
            if tensor.shape != *shape {
                return Err(Error::Shape {
                    path: tensor.path.into(),
                    name: name.clone(),
                    found: tensor.shape,
                    expected: shape.clone(),
                });
            }
            tensor.numbers()?;
        }
        for name in self.names() {
            // Some files carry rotary tables or a copy of a tied head: both follow from the rest.
            let derived = name.ends_with("rotary_emb.inv_freq") || name == names::LM_HEAD;
            let whole = [PACKED, SCALE, SHAPE].iter().find_map(|part| name.strip_suffix(part));
            let part = whole.is_some_and(|name| config.int8 && expected.contains_key(name));
            if !expected.contains_key(name) && !derived && !part {
                return Err(Error::UnknownTensor { path: self.dir.clone(), name: name.into() });
            }
        }
        Ok(())
    }
}

impl Mapped {
    fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: nobody writes to a model while we read it: files of the store are read-only, and
        // a user's own are hashed before and after the step.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let header = |message: String| Error::Header { path: path.into(), message };
        let (size, metadata) =
            safetensors::SafeTensors::read_metadata(&map).map_err(|e| header(e.to_string()))?;
        let start = size + 8;
        if start + metadata.data_len() != map.len() {
            return Err(header(format!(
                "its header tells of {} bytes, the file has {}",
                start + metadata.data_len(),
                map.len()
            )));
        }
        Ok(Self { path: path.into(), map, start, metadata })
    }
}

impl TensorRef<'_> {
    /// The values as f32, exactly.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let mut values = vec![0.0; self.len()];
        self.read_f32(0, &mut values)?;
        Ok(values)
    }

    /// The values from the one at `from` on, as f32, until `out` is full.
    ///
    /// # Panics
    /// If the tensor ends before.
    pub fn read_f32(&self, from: usize, out: &mut [f32]) -> Result<(), Error> {
        self.numbers()?;
        if let Some(scales) = self.scales {
            self.read_int8(scales, from, out);
            return Ok(());
        }
        let size = self.dtype.bitsize() / 8;
        decode(&self.data[from * size..][..out.len() * size], self.dtype, out);
        Ok(())
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// (level − 128) · scale, in bfloat16 as compressed-tensors has it.
    fn read_int8(&self, scales: &[u8], from: usize, out: &mut [f32]) {
        let columns = self.shape[1];
        let width = columns.next_multiple_of(4);
        let scales = scales.as_chunks::<2>().0;
        for (at, value) in (from..).zip(out) {
            let (row, column) = (at / columns, at % columns);
            let level = f32::from(self.data[row * width + column]) - 128.0;
            *value = bf16::from_f32(level * bf16::from_le_bytes(scales[row]).to_f32()).to_f32();
        }
    }

    fn numbers(&self) -> Result<(), Error> {
        match self.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(()),
            Dtype::I8 if self.scales.is_some() => Ok(()),
            other => Err(Error::Dtype {
                path: self.path.into(),
                name: self.name.clone(),
                dtype: format!("{other:?}"),
            }),
        }
    }
}

/// The values of `bytes`, exactly: F32, and F16 and BF16, which fit in it.
#[inline(always)]
pub fn decode(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        // Its upper half.
        Dtype::BF16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        _ => {
            for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

/// Without a branch in the loop, so that it is done many at a time.
#[inline(always)]
pub fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    values.iter().fold(true, |finite, x| finite & (x.to_bits() & EXPONENT != EXPONENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path) -> PathBuf {
        let path = dir.join("model.safetensors");
        let specs = vec![Spec::new("b", Dtype::BF16, &[2]), Spec::new("a", Dtype::F32, &[1, 2])];
        let mut writer = Writer::create(&path, specs).unwrap();
        for spec in writer.order() {
            let one: Vec<u8> = match spec.dtype {
                Dtype::F32 => [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect(),
                _ => [0.5f32, 3.0].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            };
            writer.write(&spec.name, &one).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path());
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(weights.get("a").unwrap().to_f32().unwrap(), [1.5, -2.0]);
        assert_eq!(weights.get("b").unwrap().to_f32().unwrap(), [0.5, 3.0]);
        // The library's own reader agrees.
        let bytes = std::fs::read(path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a").unwrap().shape(), [1, 2]);
    }

    #[test]
    fn matrices_in_eight_bits_are_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let write = |columns: i64| {
            let specs = vec![
                Spec::new("w_packed", Dtype::I32, &[2, 2]),
                Spec::new("w_scale", Dtype::BF16, &[2, 1]),
                Spec::new("w_shape", Dtype::I64, &[2]),
            ];
            let mut writer = Writer::create(&path, specs).unwrap();
            let shape = [2, columns].map(i64::to_le_bytes).concat();
            let levels = [0, 127, 128, 129, 255, 0, 0, 0, 130, 128, 126, 1, 1, 0, 0, 0];
            let scales = [1.0, 0.5].map(|x| bf16::from_f32(x).to_le_bytes()).concat();
            for (name, bytes) in
                [("w_shape", &shape[..]), ("w_packed", &levels), ("w_scale", &scales)]
            {
                writer.write(name, bytes).unwrap();
            }
            writer.finish().unwrap();
            Weights::open(dir.path()).unwrap()
        };
        let weights = write(5);
        let w = weights.get("w").unwrap();
        assert_eq!((w.dtype, &w.shape[..]), (Dtype::I8, &[2, 5][..]));
        let expected = [-128.0, -1.0, 0.0, 1.0, 127.0, 1.0, 0.0, -1.0, -63.5, -63.5];
        assert_eq!(w.to_f32().unwrap(), expected);
        let mut some = [0.0; 3];
        w.read_f32(4, &mut some).unwrap();
        assert_eq!(some, expected[4..7]);
        let error = write(4).get("w").unwrap_err().to_string();
        assert!(error.contains("`w` in 8 bits and its scales do not go together"), "{error}");
    }

    #[test]
    fn hostile_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path());
        let good = std::fs::read(&path).unwrap();
        let header = |text: &str| {
            let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text.as_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("empty", Vec::new()),
            ("truncated", good[..good.len() - 1].to_vec()),
            ("longer than its header says", [good.clone(), vec![0]].concat()),
            ("a header beyond the file", u64::MAX.to_le_bytes().to_vec()),
            ("no JSON", header("{not json")),
            (
                "overlapping",
                header(
                    r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                ),
            ),
            (
                "size against shape",
                header(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#),
            ),
        ];
        for (what, bytes) in cases {
            std::fs::write(&path, bytes).unwrap();
            let error = Weights::open(dir.path()).expect_err(what).to_string();
            assert!(error.contains("model.safetensors"), "{what}: {error}");
        }
    }

    /// Each end cut off, each byte changed, and pieces dealt anew by chance: an error that names the
    /// file, or numbers; nothing panics.
    #[test]
    fn damage_is_an_error_or_other_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path());
        let good = std::fs::read(&path).unwrap();
        let check = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            match Weights::open(dir.path()) {
                Err(error) => assert!(error.to_string().contains("model.safetensors"), "{error}"),
                Ok(weights) => {
                    for name in weights.names() {
                        let tensor = weights.get(name).unwrap();
                        if let Ok(values) = tensor.to_f32() {
                            assert_eq!(values.len(), tensor.len());
                        }
                    }
                }
            }
        };
        for at in 0..good.len() {
            check(&good[..at]);
            for value in [0xff, good[at] ^ 1] {
                let mut damaged = good.clone();
                damaged[at] = value;
                check(&damaged);
            }
        }
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut below = |n: usize| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % n as u64) as usize
        };
        for _ in 0..2000 {
            let mut damaged = good.clone();
            for _ in 0..1 + below(3) {
                let (from, to) = (below(good.len()), below(good.len()));
                let piece = good[from.min(to)..from.max(to)].to_vec();
                let at = below(damaged.len() + 1);
                damaged.splice(at..at.max(below(damaged.len() + 1)), piece);
            }
            check(&damaged);
        }
    }

    #[test]
    fn a_missing_shard_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map":{"a":"model-00001-of-00001.safetensors"}}"#;
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let error = Weights::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("model-00001-of-00001.safetensors"), "{error}");
    }
}
