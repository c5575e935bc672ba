//! The tensors of a GGUF file, and ggml's blocks as numbers.
//!
//! Knows nothing of keys but how long they are, and `general.alignment`.
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; the blocks, and the order of their
//! operations: `dequantize_row_*` in ggml/src/ggml-quants.c.

use std::ops::Range;

use anyhow::{Context, bail, ensure};
use half::f16;

use super::{Number, Tensor, Values, bytes_of};

/// Types of a key's value.
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
/// ggml's own limit.
const MAX_DIMS: u32 = 4;

/// Values that share a scale, in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    Q4_0,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// How a type's values lie in the file.
enum Layout {
    Numbers(Number),
    Blocks(Block),
    Unknown,
}

pub fn read(bytes: &[u8]) -> anyhow::Result<Vec<Tensor<'_>>> {
    let mut cursor = Cursor { bytes, at: 0 };
    ensure!(cursor.take(4)? == b"GGUF", "it does not begin with `GGUF`");
    match cursor.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() == 3 => bail!("it is big-endian, which is not read"),
        version => bail!("it is of version {version}; 2 and 3 are read"),
    }
    let (tensors, keys) = (cursor.u64()?, cursor.u64()?);
    let mut alignment = 32;
    for i in 0..keys {
        let key = cursor.text().with_context(|| format!("key {i}"))?;
        let found = cursor.value().with_context(|| format!("key `{key}`"))?;
        if key == "general.alignment" {
            alignment = found.context("general.alignment is no u32")? as usize;
            ensure!(alignment.is_power_of_two(), "general.alignment is {alignment}");
        }
    }
    let mut infos = Vec::new();
    for i in 0..tensors {
        infos.push(Info::read(&mut cursor).with_context(|| format!("tensor {i}"))?);
    }
    // A file without tensors may end before what would be their place.
    let data = bytes.get(cursor.at.next_multiple_of(alignment)..).unwrap_or_default();
    let mut starts: Vec<usize> = infos.iter().map(|info| info.offset).collect();
    starts.sort_unstable();
    let tensors = infos.into_iter().map(|info| {
        let name = info.name.clone();
        info.tensor(data, alignment, &starts).with_context(|| format!("tensor `{name}`"))
    });
    tensors.collect()
}

/// What the header says of a tensor.
struct Info {
    name: String,
    /// Outermost dimension first; the file lists them the other way round.
    shape: Vec<usize>,
    code: u32,
    /// From where the data begins.
    offset: usize,
}

impl Info {
    fn read(cursor: &mut Cursor) -> anyhow::Result<Self> {
        let name = cursor.text()?;
        let dims = cursor.u32()?;
        ensure!(dims <= MAX_DIMS, "`{name}` has {dims} dimensions");
        let mut shape = (0..dims).map(|_| cursor.size()).collect::<anyhow::Result<Vec<_>>>()?;
        shape.reverse();
        Ok(Self { name, shape, code: cursor.u32()?, offset: cursor.size()? })
    }

    /// `starts`: where all tensors begin, in order.
    fn tensor<'a>(
        self,
        data: &'a [u8],
        alignment: usize,
        starts: &[usize],
    ) -> anyhow::Result<Tensor<'a>> {
        let Info { name, shape, code, offset } = self;
        ensure!(offset.is_multiple_of(alignment), "its offset {offset} is not aligned");
        let (kind, layout) = layout(code);
        let bytes = |len: usize| {
            let end = offset.checked_add(len);
            end.and_then(|end| data.get(offset..end)).with_context(|| {
                format!("{len} bytes from {offset} on, where there are {} in all", data.len())
            })
        };
        let values = match layout {
            Layout::Numbers(number) => {
                let bytes = bytes(bytes_of(&shape, number.size())?)?;
                Values::numbers(number, &shape, bytes.into())?
            }
            Layout::Blocks(block) => {
                let columns = shape.last().copied().unwrap_or(1);
                ensure!(
                    columns.is_multiple_of(block.values()),
                    "a row of {columns} values is not whole blocks of {kind}"
                );
                let blocks = bytes_of(&shape, 1)? / block.values();
                Values::Blocks(block, bytes(bytes_of(&[blocks], block.bytes())?)?)
            }
            Layout::Unknown => {
                let next = starts.get(starts.partition_point(|start| *start <= offset));
                let end = next.copied().unwrap_or(data.len());
                Values::Opaque(bytes(end.saturating_sub(offset))?.into())
            }
        };
        Ok(Tensor { name, shape, kind, values })
    }
}

/// The name of a type (`enum ggml_type`), and how its values lie.
fn layout(code: u32) -> (String, Layout) {
    use Layout::{Blocks, Numbers, Unknown};
    let (name, layout) = match code {
        0 => ("F32", Numbers(Number::F32)),
        1 => ("F16", Numbers(Number::F16)),
        24 => ("I8", Numbers(Number::I8)),
        25 => ("I16", Numbers(Number::I16)),
        26 => ("I32", Numbers(Number::I32)),
        27 => ("I64", Numbers(Number::I64)),
        28 => ("F64", Numbers(Number::F64)),
        30 => ("BF16", Numbers(Number::BF16)),
        2 => ("Q4_0", Blocks(Block::Q4_0)),
        6 => ("Q5_0", Blocks(Block::Q5_0)),
        7 => ("Q5_1", Blocks(Block::Q5_1)),
        8 => ("Q8_0", Blocks(Block::Q8_0)),
        12 => ("Q4_K", Blocks(Block::Q4K)),
        13 => ("Q5_K", Blocks(Block::Q5K)),
        14 => ("Q6_K", Blocks(Block::Q6K)),
        3 => ("Q4_1", Unknown),
        9 => ("Q8_1", Unknown),
        10 => ("Q2_K", Unknown),
        11 => ("Q3_K", Unknown),
        15 => ("Q8_K", Unknown),
        16 => ("IQ2_XXS", Unknown),
        17 => ("IQ2_XS", Unknown),
        18 => ("IQ3_XXS", Unknown),
        19 => ("IQ1_S", Unknown),
        20 => ("IQ4_NL", Unknown),
        21 => ("IQ3_S", Unknown),
        22 => ("IQ2_S", Unknown),
        23 => ("IQ4_XS", Unknown),
        29 => ("IQ1_M", Unknown),
        34 => ("TQ1_0", Unknown),
        35 => ("TQ2_0", Unknown),
        39 => ("MXFP4", Unknown),
        code => return (format!("type {code}"), Unknown),
    };
    (name.into(), layout)
}

impl Block {
    const fn values(self) -> usize {
        match self {
            Block::Q4_0 | Block::Q5_0 | Block::Q5_1 | Block::Q8_0 => 32,
            Block::Q4K | Block::Q5K | Block::Q6K => 256,
        }
    }

    const fn bytes(self) -> usize {
        match self {
            Block::Q4_0 => 18,
            Block::Q5_0 => 22,
            Block::Q5_1 => 24,
            Block::Q8_0 => 34,
            Block::Q4K => 144,
            Block::Q5K => 176,
            Block::Q6K => 210,
        }
    }

    pub fn decode(self, bytes: &[u8], range: Range<usize>, out: &mut Vec<f64>) {
        let blocks = range.start / self.values()..range.end / self.values();
        let bytes = &bytes[blocks.start * self.bytes()..blocks.end * self.bytes()];
        bytes.chunks_exact(self.bytes()).for_each(|block| self.decode_one(block, out));
    }

    fn decode_one(self, block: &[u8], out: &mut Vec<f64>) {
        let scale = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        // The lower halves of all bytes come before the upper ones.
        let nibble = |bytes: &[u8], i: usize| bytes[i % 16] >> (4 * (i / 16)) & 15;
        match self {
            Block::Q4_0 => {
                let (d, levels) = (scale(0), &block[2..]);
                let value = |i| (i32::from(nibble(levels, i)) - 8) as f32 * d;
                out.extend((0..32).map(|i| f64::from(value(i))));
            }
            Block::Q5_0 => {
                let (d, high, levels) = (scale(0), &block[2..6], &block[6..]);
                let level = |i| nibble(levels, i) | (high[i / 8] >> (i % 8) & 1) << 4;
                out.extend((0..32).map(|i| f64::from((i32::from(level(i)) - 16) as f32 * d)));
            }
            Block::Q5_1 => {
                let (d, least, high, levels) = (scale(0), scale(2), &block[4..8], &block[8..]);
                let level = |i| nibble(levels, i) | (high[i / 8] >> (i % 8) & 1) << 4;
                out.extend((0..32).map(|i| f64::from(f32::from(level(i)) * d + least)));
            }
            Block::Q8_0 => {
                let d = scale(0);
                out.extend(block[2..].iter().map(|level| f64::from(f32::from(*level as i8) * d)));
            }
            Block::Q4K => {
                let levels = &block[16..];
                k(block, |part, i| levels[part / 2 * 32 + i] >> (4 * (part % 2)) & 15, out);
            }
            Block::Q5K => {
                let (high, levels) = (&block[16..48], &block[48..]);
                let level = |part, i: usize| {
                    levels[part / 2 * 32 + i] >> (4 * (part % 2)) & 15 | (high[i] >> part & 1) << 4
                };
                k(block, level, out);
            }
            Block::Q6K => {
                let (low, high, scales, d) =
                    (&block[..128], &block[128..192], &block[192..208], scale(208));
                // Each half of 128 is four quarters, which share bytes.
                out.extend((0..256).map(|i| {
                    let (half, quarter, j) = (i / 128, i / 32 % 4, i % 32);
                    let low = low[half * 64 + quarter % 2 * 32 + j] >> (4 * (quarter / 2)) & 15;
                    let high = high[half * 32 + j] >> (2 * quarter) & 3;
                    let level = i32::from(low | high << 4) - 32;
                    f64::from(d * f32::from(scales[i / 16] as i8) * level as f32)
                }));
            }
        }
    }
}

/// Q4_K and Q5_K: eight parts of 32, each with a scale and a minimum in 6 bits
/// (`get_scale_min_k4`).
fn k(block: &[u8], level: impl Fn(usize, usize) -> u8, out: &mut Vec<f64>) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (d, least, packed) = (half(0), half(2), &block[4..16]);
    for part in 0..8 {
        let (scale, minimum) = match part {
            0..4 => (packed[part] & 63, packed[part + 4] & 63),
            _ => (
                packed[part + 4] & 15 | packed[part - 4] >> 6 << 4,
                packed[part + 4] >> 4 | packed[part] >> 6 << 4,
            ),
        };
        let (scale, minimum) = (d * f32::from(scale), least * f32::from(minimum));
        out.extend((0..32).map(|i| f64::from(scale * f32::from(level(part, i)) - minimum)));
    }
}

/// Bytes, and where we are in them.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> anyhow::Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..n).with_context(|| {
            format!("at byte {} it goes on for {n} bytes, but only {} follow", self.at, rest.len())
        })?;
        self.at += n;
        Ok(taken)
    }

    fn u32(&mut self) -> anyhow::Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into()?))
    }

    fn u64(&mut self) -> anyhow::Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into()?))
    }

    fn size(&mut self) -> anyhow::Result<usize> {
        Ok(usize::try_from(self.u64()?)?)
    }

    fn text(&mut self) -> anyhow::Result<String> {
        let len = self.size()?;
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    /// Goes past a key's value; gives it if it is a u32.
    fn value(&mut self) -> anyhow::Result<Option<u32>> {
        let kind = self.u32()?;
        match kind {
            U32 => return self.u32().map(Some),
            STRING => _ = self.text()?,
            ARRAY => {
                let (kind, len) = (self.u32()?, self.size()?);
                if kind == STRING {
                    for _ in 0..len {
                        self.text()?;
                    }
                } else {
                    self.take(bytes_of(&[len], width(kind)?)?)?;
                }
            }
            kind => _ = self.take(width(kind)?)?,
        }
        Ok(None)
    }
}

/// Bytes of a value. ggml has no arrays of arrays.
fn width(kind: u32) -> anyhow::Result<usize> {
    Ok(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => bail!("a value of unknown type {kind}"),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{decoded, hold_to_expected, survives_damage};
    use super::super::{Files, Format, read as open};
    use super::*;

    /// Written by the Python package `gguf`, beside what it makes of each type: golden/make.py.
    const GOLDEN: &[u8] = include_bytes!("golden/types.gguf");

    #[test]
    fn values_are_those_of_another_reader() {
        let tensors = read(GOLDEN).unwrap();
        assert_eq!(hold_to_expected(&tensors), 10);
        let kinds: Vec<&str> = tensors
            .iter()
            .filter(|t| !t.name.ends_with(".expected"))
            .map(|t| t.kind.as_str())
            .collect();
        let all = [
            "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q5_1", "IQ2_XS",
        ];
        assert_eq!(kinds, all);
        let opaque = tensors.iter().find(|t| t.kind == "IQ2_XS").unwrap();
        assert!(matches!(&opaque.values, Values::Opaque(bytes) if bytes.starts_with(b"\x07\x0a")));
    }

    /// `[2, 3]` in F32, behind a string, an array of strings and an alignment of 64.
    fn tiny() -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend([1u64, 3].map(u64::to_le_bytes).concat());
        out.extend([text("general.name"), STRING.to_le_bytes().into(), text("t")].concat());
        out.extend([text("words"), [ARRAY, STRING].map(u32::to_le_bytes).concat()].concat());
        out.extend([2u64.to_le_bytes().into(), text("one"), text("two")].concat());
        out.extend([text("general.alignment"), [U32, 64].map(u32::to_le_bytes).concat()].concat());
        out.extend([text("w"), 2u32.to_le_bytes().into()].concat());
        out.extend([3u64, 2].map(u64::to_le_bytes).concat());
        out.extend([0u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec()].concat());
        out.resize(out.len().next_multiple_of(64), 0);
        out.extend([1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].map(f32::to_le_bytes).concat());
        out
    }

    #[test]
    fn the_outermost_dimension_comes_first() {
        let bytes = tiny();
        let tensors = read(&bytes).unwrap();
        assert_eq!((tensors[0].name.as_str(), &tensors[0].shape[..]), ("w", &[2, 3][..]));
        assert_eq!(decoded(&tensors[0]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn damage_is_told() {
        survives_damage("tiny.gguf", Format::Gguf, &Files::from([("tiny.gguf", &tiny()[..])]));
        let mut cut = tiny();
        cut.truncate(cut.len() - 1);
        let error = open("a/tiny.gguf", Format::Gguf, &Files::from([("a/tiny.gguf", &cut[..])]));
        assert_eq!(
            error.unwrap_err().to_string(),
            "a/tiny.gguf cannot be read: tensor `w`: 24 bytes from 0 on, where there are 23 in all"
        );
        let mut other = tiny();
        other[4..8].copy_from_slice(&3u32.to_be_bytes());
        assert!(read(&other).unwrap_err().to_string().contains("big-endian"));
    }
}
