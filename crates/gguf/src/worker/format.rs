//! The GGUF container, version 3: keys, tensor infos, then the tensors, each at a multiple of 32.
//!
//! Knows nothing of what a key or a tensor means. Little-endian throughout.
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

pub const ALIGNMENT: usize = 32;

/// A key's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// How a tensor's values lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Type {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Type {
    const ALL: [Type; 10] = [
        Type::F32,
        Type::F16,
        Type::BF16,
        Type::Q8_0,
        Type::Q4_0,
        Type::Q5_0,
        Type::Q5_1,
        Type::Q4K,
        Type::Q5K,
        Type::Q6K,
    ];

    /// The type of a code, if it is one that is written.
    pub fn of(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    const fn code(self) -> u32 {
        match self {
            Type::F32 => 0,
            Type::F16 => 1,
            Type::Q4_0 => 2,
            Type::Q5_0 => 6,
            Type::Q5_1 => 7,
            Type::Q8_0 => 8,
            Type::Q4K => 12,
            Type::Q5K => 13,
            Type::Q6K => 14,
            Type::BF16 => 30,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Type::F32 => "F32",
            Type::F16 => "F16",
            Type::BF16 => "BF16",
            Type::Q8_0 => "Q8_0",
            Type::Q4_0 => "Q4_0",
            Type::Q5_0 => "Q5_0",
            Type::Q5_1 => "Q5_1",
            Type::Q4K => "Q4_K",
            Type::Q5K => "Q5_K",
            Type::Q6K => "Q6_K",
        }
    }

    /// How many values are packed together, and the bytes that they take.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Type::F32 => (1, 4),
            Type::F16 | Type::BF16 => (1, 2),
            Type::Q8_0 => (32, 34),
            Type::Q4_0 => (32, 18),
            Type::Q5_0 => (32, 22),
            Type::Q5_1 => (32, 24),
            Type::Q4K => (256, 144),
            Type::Q5K => (256, 176),
            Type::Q6K => (256, 210),
        }
    }

    /// Bytes of a row of `columns` values, which are whole blocks.
    pub const fn row_bytes(self, columns: usize) -> usize {
        let (values, bytes) = self.block();
        columns / values * bytes
    }
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    pub name: String,
    /// As Hugging Face has it, \[out, in\]; the file lists them the other way round.
    pub shape: Vec<usize>,
    pub kind: Type,
}

impl Info {
    /// Rows and columns; a vector is one row.
    pub fn rows(&self) -> (usize, usize) {
        let columns = self.shape.last().copied().unwrap_or(1);
        (self.shape.iter().rev().skip(1).product(), columns)
    }

    pub fn bytes(&self) -> usize {
        let (rows, columns) = self.rows();
        rows * self.kind.row_bytes(columns)
    }
}

/// A file that grows tensor by tensor.
pub struct Writer {
    file: BufWriter<File>,
    infos: Vec<Info>,
    next: usize,
    /// Bytes of the tensor `next` that are there.
    part: usize,
    /// Bytes in all.
    written: usize,
}

impl Writer {
    /// Writes the header; the tensors follow in the order of `infos`.
    pub fn create(path: &Path, keys: &[(String, Value)], infos: Vec<Info>) -> Result<Self> {
        let header = header(keys, &infos);
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        // Whatever is larger goes by.
        let mut file = BufWriter::with_capacity(1 << 16, file);
        file.write_all(&header).context("cannot write the header")?;
        Ok(Self { file, infos, next: 0, part: 0, written: header.len() })
    }

    /// Writes on: the next bytes of the next tensor, never beyond its end.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let info = self.infos.get(self.next).context("bytes after the last tensor")?;
        self.part += bytes.len();
        ensure!(self.part <= info.bytes(), "too many bytes for {}", info.name);
        self.file.write_all(bytes).with_context(|| format!("cannot write {}", info.name))?;
        self.written += bytes.len();
        if self.part == info.bytes() {
            (self.next, self.part) = (self.next + 1, 0);
            let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
            self.file.write_all(&[0; ALIGNMENT][..padding])?;
            self.written += padding;
        }
        Ok(())
    }

    /// Ends the file and tells its size.
    pub fn finish(mut self) -> Result<usize> {
        if let Some(info) = self.infos.get(self.next) {
            anyhow::bail!("{} was not written whole", info.name);
        }
        self.file.flush().context("cannot write the last bytes")?;
        Ok(self.written)
    }
}

/// Everything before the tensors.
fn header(keys: &[(String, Value)], infos: &[Info]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((infos.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        text(&mut out, key);
        put(&mut out, value);
    }
    let mut offset = 0;
    for info in infos {
        text(&mut out, &info.name);
        out.extend((info.shape.len() as u32).to_le_bytes());
        for dim in info.shape.iter().rev() {
            out.extend((*dim as u64).to_le_bytes());
        }
        out.extend(info.kind.code().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += info.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    const I32: u32 = 5;
    const F32: u32 = 6;
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;
    let mut array = |kind: u32, len: usize| {
        out.extend(ARRAY.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::U32(n) => {
            out.extend(4u32.to_le_bytes());
            out.extend(n.to_le_bytes());
        }
        Value::F32(x) => {
            out.extend(F32.to_le_bytes());
            out.extend(x.to_le_bytes());
        }
        Value::Bool(yes) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*yes));
        }
        Value::Text(one) => {
            out.extend(STRING.to_le_bytes());
            text(out, one);
        }
        Value::Texts(all) => {
            array(STRING, all.len());
            all.iter().for_each(|one| text(out, one));
        }
        Value::I32s(all) => {
            array(I32, all.len());
            out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
        }
        Value::F32s(all) => {
            array(F32, all.len());
            out.extend(all.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
}
