//! The initializers of an ONNX model's graph, with those in external data.
//!
//! Knows nothing of what the graph computes, but for two operators: the weights of `MatMulNBits` and
//! `GatherBlockQuantized` are compared as the numbers that they stand for, under the weight's name
//! and in the shape that `MatMul` or `Gather` would have; their scales and zero points are in that,
//! and not listed. Where a node is made in a way that is not known here, and for all other quantised
//! weights (`DequantizeLinear`), it is the stored integers that are compared.
//! Fields and types: onnx/onnx.proto of ONNX 1.17.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, ensure};
use half::{bf16, f16};

use super::protobuf::fields;
use super::{Files, Number, Tensor, Values, bytes_of};

pub fn read<'a>(bytes: &'a [u8], path: &str, files: &Files<'a>) -> anyhow::Result<Vec<Tensor<'a>>> {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let (mut tensors, mut nodes) = (Vec::new(), Vec::new());
    let mut graphs = 0;
    for field in fields(bytes) {
        let (7, graph) = field.context("no ONNX model")? else { continue };
        graphs += 1;
        for field in fields(graph.bytes()?) {
            match field.context("its graph")? {
                (1, node) => nodes.extend(Node::read(node.bytes()?).context("a node")?),
                (5, tensor) => {
                    let stored = Stored::read(tensor.bytes()?)
                        .with_context(|| format!("initializer {}", tensors.len()))?;
                    let name = stored.name.clone();
                    let tensor = stored.tensor(folder, files);
                    tensors.push(tensor.with_context(|| format!("initializer `{name}`"))?);
                }
                _ => {}
            }
        }
    }
    ensure!(graphs == 1, "it is no ONNX model: it has {graphs} graphs");
    unpack(&mut tensors, &nodes);
    Ok(tensors)
}

/// Puts what packed weights stand for in their place.
fn unpack(tensors: &mut Vec<Tensor>, nodes: &[Node]) {
    let places: HashMap<String, usize> =
        tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
    let mut used = BTreeSet::new();
    for node in nodes {
        let place = |input: usize| {
            let name = node.inputs.get(input).filter(|name| !name.is_empty())?;
            Some(places.get(name.as_str()).copied())
        };
        let Some(Some(data)) = place(node.op.data()) else { continue };
        let (Some(Some(scales)), zeros) = (place(2), place(3)) else { continue };
        // Zero points that the graph computes; rows in an order of their own.
        if zeros == Some(None) || (node.op == Op::MatMul && place(4).is_some()) {
            continue;
        }
        let zeros = zeros.flatten();
        let (weight, scales) = (&tensors[data], &tensors[scales]);
        let Some(packed) = Packed::new(node, weight, scales, zeros.map(|i| &tensors[i])) else {
            continue;
        };
        used.insert(scales.name.clone());
        used.extend(zeros.map(|i| tensors[i].name.clone()));
        let tensor = &mut tensors[data];
        tensor.shape = packed.shape();
        tensor.kind = format!("{} bits, blocks of {}", packed.bits, packed.block);
        tensor.values = Values::Packed(packed);
    }
    tensors.retain(|tensor| !used.contains(&tensor.name));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    MatMul,
    Gather,
}

impl Op {
    /// Which of the node's inputs the weight is.
    const fn data(self) -> usize {
        match self {
            Op::MatMul => 1,
            Op::Gather => 0,
        }
    }
}

/// A node with packed weights.
struct Node {
    op: Op,
    inputs: Vec<String>,
    attributes: HashMap<String, u64>,
}

impl Node {
    /// `None` for any other node.
    fn read(message: &[u8]) -> anyhow::Result<Option<Self>> {
        let (mut op, mut inputs, mut attributes) = (None, Vec::new(), HashMap::new());
        for field in fields(message) {
            match field? {
                (1, input) => inputs.push(input.text()?),
                (4, name) => {
                    op = match name.bytes()? {
                        b"MatMulNBits" => Some(Op::MatMul),
                        b"GatherBlockQuantized" => Some(Op::Gather),
                        _ => return Ok(None),
                    }
                }
                (5, attribute) => {
                    let (mut name, mut number) = (String::new(), 0);
                    for field in fields(attribute.bytes()?) {
                        match field? {
                            (1, value) => name = value.text()?,
                            (3, value) => number = value.number()?,
                            _ => {}
                        }
                    }
                    attributes.insert(name, number);
                }
                _ => {}
            }
        }
        Ok(op.map(|op| Node { op, inputs, attributes }))
    }

    fn attribute(&self, name: &str, default: usize) -> Option<usize> {
        self.attributes.get(name).map_or(Some(default), |n| usize::try_from(*n).ok())
    }
}

/// Weights \[N, K\] in levels of 2, 4 or 8 bits, low bits first; each block along K has a scale.
///
/// <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>
#[derive(Debug, PartialEq)]
pub struct Packed<'a> {
    /// The product's weight is \[K, N\].
    transposed: bool,
    n: usize,
    k: usize,
    bits: usize,
    block: usize,
    /// N rows.
    levels: Cow<'a, [u8]>,
    /// \[N, ceil(K / block)\].
    scales: Floats<'a>,
    zeros: Zeros<'a>,
}

#[derive(Debug, PartialEq)]
enum Zeros<'a> {
    /// 2^(bits − 1).
    Middle,
    /// Levels; each row begins with a byte of its own.
    Levels(Cow<'a, [u8]>),
    /// As many as there are scales.
    Floats(Floats<'a>),
}

impl<'a> Packed<'a> {
    /// `None` where sizes are not as the operators' description has them.
    fn new(
        node: &Node,
        weight: &Tensor<'a>,
        scales: &Tensor<'a>,
        zeros: Option<&Tensor<'a>>,
    ) -> Option<Self> {
        let bits = node.attribute("bits", 4).filter(|bits| matches!(bits, 2 | 4 | 8))?;
        let block = node.attribute("block_size", if node.op == Op::Gather { 128 } else { 0 });
        let block = block.filter(|block| *block >= 8 && block.is_power_of_two())?;
        let Values::Numbers(Number::U8, levels) = &weight.values else { return None };
        let (n, k) = match (node.op, &weight.shape[..]) {
            (Op::MatMul, _) => (node.attribute("N", 0)?, node.attribute("K", 0)?),
            (Op::Gather, [n, width]) => {
                let (gathers, quantised) =
                    (node.attribute("gather_axis", 0)?, node.attribute("quantize_axis", 1)?);
                (gathers == 0 && quantised == 1).then_some((*n, width.checked_mul(8 / bits)?))?
            }
            (Op::Gather, _) => return None,
        };
        let blocks = k.div_ceil(block);
        let width = match node.op {
            Op::MatMul => blocks.checked_mul(block)? / 8 * bits,
            Op::Gather => k / (8 / bits),
        };
        let scales = Floats::new(scales, n.checked_mul(blocks)?)?;
        let zeros = match zeros.map(|tensor| (tensor, &tensor.values)) {
            None => Zeros::Middle,
            Some((_, Values::Numbers(Number::U8, levels))) => {
                let row = blocks.checked_mul(bits)?.div_ceil(8);
                (levels.len() == n.checked_mul(row)?).then(|| Zeros::Levels(levels.clone()))?
            }
            Some((tensor, _)) => Zeros::Floats(Floats::new(tensor, n * blocks)?),
        };
        let fits = levels.len() == n.checked_mul(width)? && n.checked_mul(k).is_some();
        let transposed = node.op == Op::MatMul;
        let levels = levels.clone();
        fits.then_some(Self { transposed, n, k, bits, block, levels, scales, zeros })
    }

    fn shape(&self) -> Vec<usize> {
        if self.transposed { vec![self.k, self.n] } else { vec![self.n, self.k] }
    }

    /// The value at `i` of the shape: (level − zero) · scale, in f32.
    pub fn at(&self, i: usize) -> f64 {
        let (row, column) =
            if self.transposed { (i % self.n, i / self.n) } else { (i / self.k, i % self.k) };
        let blocks = self.k.div_ceil(self.block);
        let of_row = |levels: &[u8], i: usize| {
            let (bit, row) = (i * self.bits, &levels[levels.len() / self.n * row..]);
            row[bit / 8] >> (bit % 8) & (0xff >> (8 - self.bits))
        };
        let block = column / self.block;
        let zero = match &self.zeros {
            Zeros::Middle => f32::from(1u16 << (self.bits - 1)),
            Zeros::Levels(levels) => of_row(levels, block).into(),
            Zeros::Floats(floats) => floats.at(row * blocks + block),
        };
        let scale = self.scales.at(row * blocks + block);
        f64::from((f32::from(of_row(&self.levels, column)) - zero) * scale)
    }
}

#[derive(Debug, PartialEq)]
enum Floats<'a> {
    F32(Cow<'a, [u8]>),
    F16(Cow<'a, [u8]>),
    BF16(Cow<'a, [u8]>),
}

impl<'a> Floats<'a> {
    /// `None` if it is not `len` numbers of these types.
    fn new(tensor: &Tensor<'a>, len: usize) -> Option<Self> {
        let Values::Numbers(number, bytes) = &tensor.values else { return None };
        let (floats, bytes): (fn(_) -> _, _) = match number {
            Number::F32 => (Floats::F32, bytes.clone()),
            Number::F16 => (Floats::F16, bytes.clone()),
            Number::BF16 => (Floats::BF16, bytes.clone()),
            _ => return None,
        };
        (bytes.len() == len.checked_mul(number.size())?).then(|| floats(bytes))
    }

    fn at(&self, i: usize) -> f32 {
        match self {
            Floats::F32(bytes) => f32::from_le_bytes(bytes.as_chunks().0[i]),
            Floats::F16(bytes) => f16::from_le_bytes(bytes.as_chunks().0[i]).into(),
            Floats::BF16(bytes) => bf16::from_le_bytes(bytes.as_chunks().0[i]).into(),
        }
    }
}

/// A `TensorProto` as it lies in the file.
#[derive(Default)]
struct Stored<'a> {
    name: String,
    dims: Vec<u64>,
    data_type: u64,
    raw: Option<&'a [u8]>,
    /// `int32_data`, `int64_data`, `uint64_data`.
    integers: Vec<u64>,
    /// `float_data`, `double_data`, `string_data`.
    typed: Vec<u8>,
    is_external: bool,
    external: HashMap<String, String>,
}

impl<'a> Stored<'a> {
    fn read(message: &'a [u8]) -> anyhow::Result<Self> {
        let mut stored = Self::default();
        for field in fields(message) {
            match field? {
                (1, dims) => dims.numbers(&mut stored.dims)?,
                (2, data_type) => stored.data_type = data_type.number()?,
                (4 | 10, floats) => stored.typed.extend(floats.bytes()?),
                (5 | 7 | 11, integers) => integers.numbers(&mut stored.integers)?,
                (6, text) => {
                    let text = text.bytes()?;
                    stored.typed.extend((text.len() as u64).to_le_bytes());
                    stored.typed.extend(text);
                }
                (8, name) => stored.name = name.text()?,
                (9, raw) => stored.raw = Some(raw.bytes()?),
                (13, entry) => {
                    let (mut key, mut value) = (String::new(), String::new());
                    for field in fields(entry.bytes()?) {
                        match field? {
                            (1, text) => key = text.text()?,
                            (2, text) => value = text.text()?,
                            _ => {}
                        }
                    }
                    stored.external.insert(key, value);
                }
                (14, location) => stored.is_external = location.number()? == 1,
                _ => {}
            }
        }
        Ok(stored)
    }

    fn tensor(self, folder: &str, files: &Files<'a>) -> anyhow::Result<Tensor<'a>> {
        let shape = self.dims.iter().map(|dim| usize::try_from(*dim));
        let shape = shape.collect::<Result<Vec<_>, _>>().context("its shape")?;
        let (kind, number) = data_type(self.data_type);
        let bytes: Cow<'a, [u8]> = if self.is_external {
            self.outside(folder, files, number.map(|n| bytes_of(&shape, n.size())).transpose()?)?
        } else if let Some(raw) = self.raw {
            raw.into()
        } else if self.integers.is_empty() {
            self.typed.into()
        } else {
            let size = number.map_or(8, Number::size);
            self.integers.iter().flat_map(|n| n.to_le_bytes().into_iter().take(size)).collect()
        };
        let values = match number {
            Some(number) => Values::numbers(number, &shape, bytes)?,
            None => Values::Opaque(bytes),
        };
        Ok(Tensor { name: self.name, shape, kind, values })
    }

    /// Its bytes in a file of external data: `len` of them, if the entry does not say how many.
    fn outside(
        &self,
        folder: &str,
        files: &Files<'a>,
        len: Option<usize>,
    ) -> anyhow::Result<Cow<'a, [u8]>> {
        let location = self.external.get("location").context("its external data has no place")?;
        let location = location.strip_prefix("./").unwrap_or(location);
        let path = match folder {
            "" => location.to_string(),
            folder => format!("{folder}/{location}"),
        };
        let file = *files
            .get(path.as_str())
            .with_context(|| format!("its external data {path} is not in the artifact"))?;
        let number = |key: &str| {
            let value = self.external.get(key).map(|value| value.parse::<usize>());
            value.transpose().with_context(|| format!("its external data: `{key}` is no number"))
        };
        let from = number("offset")?.unwrap_or(0);
        let len = number("length")?.or(len).unwrap_or(file.len().saturating_sub(from));
        let bytes = from.checked_add(len).and_then(|end| file.get(from..end));
        let bytes = bytes.with_context(|| {
            format!("{len} bytes from {from} on in {path}, which has {} in all", file.len())
        })?;
        Ok(bytes.into())
    }
}

/// The name of a type (`TensorProto.DataType`), and its numbers.
fn data_type(code: u64) -> (String, Option<Number>) {
    let (name, number) = match code {
        1 => ("float", Number::F32),
        2 => ("uint8", Number::U8),
        3 => ("int8", Number::I8),
        4 => ("uint16", Number::U16),
        5 => ("int16", Number::I16),
        6 => ("int32", Number::I32),
        7 => ("int64", Number::I64),
        9 => ("bool", Number::U8),
        10 => ("float16", Number::F16),
        11 => ("double", Number::F64),
        12 => ("uint32", Number::U32),
        13 => ("uint64", Number::U64),
        16 => ("bfloat16", Number::BF16),
        8 => return ("string".into(), None),
        21 => return ("uint4".into(), None),
        22 => return ("int4".into(), None),
        code => return (format!("type {code}"), None),
    };
    (name.into(), Some(number))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{hold_to_expected, survives_damage};
    use super::super::{Difference, Format, compare, read as open};
    use super::*;

    /// Written by the Python package `onnx`; expected is what ONNX Runtime computes: golden/make.py.
    const GOLDEN: &[u8] = include_bytes!("golden/packed.onnx");
    const DATA: &[u8] = include_bytes!("golden/packed.onnx_data");

    fn files<'a>(model: &'a [u8], data: &'a [u8]) -> Files<'a> {
        Files::from([("onnx/packed.onnx", model), ("onnx/packed.onnx_data", data)])
    }

    #[test]
    fn values_are_those_of_another_reader() {
        let files = files(GOLDEN, DATA);
        let tensors = open("onnx/packed.onnx", Format::Onnx, &files).unwrap();
        assert_eq!(hold_to_expected(&tensors), 20);
        assert!(!tensors.iter().any(|t| t.name.contains(".scales") || t.name.contains(".zeros")));
        let kind = |name: &str| tensors.iter().find(|t| t.name == name).unwrap().kind.as_str();
        assert_eq!(
            [kind("four"), kind("embed8")],
            ["4 bits, blocks of 32", "8 bits, blocks of 16"]
        );
    }

    #[test]
    fn packed_weights_differ_by_what_they_stand_for() {
        let path = "onnx/packed.onnx";
        let at = GOLDEN.windows(12).rposition(|w| w == b"eight.scales").unwrap();
        // A byte of a scale: the raw data comes after the name.
        let mut other = GOLDEN.to_vec();
        other[at + 18] ^= 1;
        let (one, two) = (files(GOLDEN, DATA), files(&other, DATA));
        let (one, two) = (open(path, Format::Onnx, &one), open(path, Format::Onnx, &two));
        let changed = compare(&one.unwrap(), &two.unwrap());
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].name, "eight");
        assert!(matches!(changed[0].difference, Difference::Values(_)));
    }

    #[test]
    fn damage_is_told() {
        survives_damage("onnx/packed.onnx", Format::Onnx, &files(GOLDEN, DATA));
        let error = |data| open("onnx/packed.onnx", Format::Onnx, &files(GOLDEN, data));
        assert_eq!(
            error(&DATA[..7]).unwrap_err().to_string(),
            "onnx/packed.onnx cannot be read: initializer `four.expected`: \
             768 bytes from 6 on in onnx/packed.onnx_data, which has 7 in all"
        );
        let alone = Files::from([("packed.onnx", GOLDEN)]);
        assert_eq!(
            open("packed.onnx", Format::Onnx, &alone).unwrap_err().to_string(),
            "packed.onnx cannot be read: initializer `four.expected`: \
             its external data packed.onnx_data is not in the artifact"
        );
    }
}
