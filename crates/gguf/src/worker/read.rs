//! A finished file, read back: its tensors by the names that the checkpoint has for them.
//!
//! Knows nothing of keys but how long they are. Rows are read as they are asked for, so that no model
//! is in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use checkpoint::Error;
use reference::Source;

use crate::decode;
use crate::format::{ALIGNMENT, Info, Type};
use crate::tensors::{Rows, Tensor};

/// What a file says of its tensors, and where they are.
pub struct Written {
    file: File,
    path: PathBuf,
    /// By name in the file: what it is, and where in the file it begins.
    tensors: BTreeMap<String, (Info, u64)>,
}

impl Written {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let mut header = Header(BufReader::new(&file));
        ensure!(&header.array()? == b"GGUF" && header.u32()? == 3, "it is no GGUF of version 3");
        let (tensors, keys) = (header.u64()?, header.u64()?);
        for _ in 0..keys {
            header.text()?;
            let kind = header.u32()?;
            header.skip(kind)?;
        }
        let mut infos = Vec::new();
        for _ in 0..tensors {
            let name = header.text()?;
            let dims = header.u32()?;
            let shape: Result<Vec<u64>> = (0..dims).map(|_| header.u64()).collect();
            let shape = shape?.into_iter().rev().map(|dim| dim as usize).collect();
            let code = header.u32()?;
            let kind = Type::of(code).with_context(|| format!("{name} is of type {code}"))?;
            infos.push((Info { name, shape, kind }, header.u64()?));
        }
        let start = header.0.stream_position()?.next_multiple_of(ALIGNMENT as u64);
        let place =
            |(info, offset): (Info, u64)| (info.name.clone(), (info, start.saturating_add(offset)));
        let tensors = infos.into_iter().map(place).collect();
        Ok(Self { file, path: path.into(), tensors })
    }

    fn get(&self, name: &str) -> Result<&(Info, u64), Error> {
        let missing = || Error::MissingTensor { path: self.path.clone(), name: name.into() };
        self.tensors.get(name).ok_or_else(missing)
    }

    /// Rows of a tensor as they lie in the file; a vector is one.
    pub fn rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let (info, start) = self.get(name)?;
        let row = info.kind.row_bytes(info.rows().1);
        let mut bytes = vec![0; rows.len() * row];
        let at = start + (rows.start * row) as u64;
        self.file.read_exact_at(&mut bytes, at).map_err(|e| Error::io(&self.path, e))?;
        decode::rows(&bytes, info.kind, out);
        Ok(())
    }
}

/// A file by the checkpoint's names, its rows in the checkpoint's order.
pub struct AsCheckpoint<'a> {
    file: &'a Written,
    tensors: BTreeMap<&'a str, &'a Tensor>,
}

impl<'a> AsCheckpoint<'a> {
    pub fn new(file: &'a Written, tensors: &'a [Tensor]) -> Self {
        let tensors = tensors.iter().map(|tensor| (tensor.source.as_str(), tensor)).collect();
        Self { file, tensors }
    }
}

impl Source for AsCheckpoint<'_> {
    fn rows(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        let missing = || Error::MissingTensor { path: self.file.path.clone(), name: name.into() };
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let (info, _) = self.file.get(&tensor.info.name)?;
        let (_, columns) = info.rows();
        out.clear();
        out.resize(rows.len() * columns, 0.0);
        match tensor.rows {
            Rows::AsTheyAre => self.file.rows(&info.name, rows, out)?,
            // The rows of a vector are its values.
            _ if info.shape.len() == 1 => {
                let mut dealt = vec![0.0; columns];
                self.file.rows(&info.name, rows, &mut dealt)?;
                for (at, x) in dealt.into_iter().enumerate() {
                    out[tensor.rows.source(at)] = x;
                }
            }
            order => {
                for (row, out) in rows.zip(out.chunks_exact_mut(columns)) {
                    let row = order.place(row);
                    self.file.rows(&info.name, row..row + 1, out)?;
                }
            }
        }
        if tensor.plus != 0.0 {
            out.iter_mut().for_each(|x| *x -= tensor.plus);
        }
        Ok(())
    }
}

/// What stands before the tensors.
struct Header<R>(R);

impl<R: Read> Header<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String> {
        let mut text = Vec::new();
        let len = self.u64()?;
        self.0.by_ref().take(len).read_to_end(&mut text)?;
        ensure!(text.len() as u64 == len, "it ends within a text");
        Ok(String::from_utf8(text)?)
    }

    /// Goes past a value.
    fn skip(&mut self, kind: u32) -> Result<()> {
        match kind {
            0 | 1 | 7 => drop(self.array::<1>()?),
            2 | 3 => drop(self.array::<2>()?),
            4..=6 => drop(self.array::<4>()?),
            8 => drop(self.text()?),
            9 => {
                let (kind, len) = (self.u32()?, self.u64()?);
                ensure!(kind != 9, "it has an array of arrays");
                for _ in 0..len {
                    self.skip(kind)?;
                }
            }
            10..=12 => drop(self.array::<8>()?),
            other => bail!("it has a value of type {other}"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by the package `gguf`, with what it makes of each type: make.py beside it.
    #[test]
    fn values_are_those_of_another_reader() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut bytes =
            std::fs::read(path.join("../../xtask/src/tensors/golden/types.gguf")).unwrap();
        // A type that is not written here, which ends the file and is called an F32 of no values.
        let name = b"iq2_xs";
        let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len();
        assert_eq!(bytes[at..at + 4], 2u32.to_le_bytes());
        bytes[at + 20..at + 24].copy_from_slice(&0u32.to_le_bytes());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("types.gguf");
        std::fs::write(&path, bytes).unwrap();
        let file = Written::open(&path).unwrap();
        let values = |name: &str| {
            let (rows, columns) = file.tensors[name].0.rows();
            let mut out = vec![0.0; rows * columns];
            file.rows(name, 0..rows, &mut out).unwrap();
            out
        };
        let mut kinds = Vec::new();
        for (name, (info, _)) in &file.tensors {
            if file.tensors.contains_key(&format!("{name}.expected")) {
                assert_eq!(values(name), values(&format!("{name}.expected")), "{name}");
                kinds.push(info.kind);
            }
        }
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), 10, "{kinds:?}");
    }
}
