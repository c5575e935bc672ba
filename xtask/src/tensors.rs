//! The tensors of a model file as numbers, and how far two of them lie apart.
//!
//! Knows nothing of the store, nor of how a difference is shown. Values are decoded a stretch at a
//! time: beside the mapped file, no tensor is in memory whole.

mod gguf;
mod onnx;
mod protobuf;
mod safetensors;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anyhow::{Context, ensure};
use half::{bf16, f16};
use step::Failure;

/// Bytes of an artifact's files, by path.
pub type Files<'a> = BTreeMap<&'a str, &'a [u8]>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Gguf,
    Onnx,
}

impl Format {
    pub const ALL: [Format; 3] = [Format::Safetensors, Format::Gguf, Format::Onnx];

    pub fn of(path: &str) -> Option<Self> {
        let (_, ending) = path.rsplit_once('.')?;
        Some(match ending {
            "safetensors" => Format::Safetensors,
            "gguf" => Format::Gguf,
            "onnx" => Format::Onnx,
            _ => return None,
        })
    }
}

#[derive(Debug)]
pub struct Tensor<'a> {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Its type, as the format has it: `BF16`, `Q8_0`, `float16`.
    pub kind: String,
    values: Values<'a>,
}

/// As many values as the shape has: whoever makes one has checked the bytes.
#[derive(Debug, PartialEq)]
enum Values<'a> {
    Numbers(Number, Cow<'a, [u8]>),
    /// ggml's blocks.
    Blocks(gguf::Block, &'a [u8]),
    /// Weights, scales and zero points of one of ONNX Runtime's operators.
    Packed(onnx::Packed<'a>),
    /// Of a type that is compared by its bytes.
    Opaque(Cow<'a, [u8]>),
}

/// A number in little-endian bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
}

/// A tensor that is not the same in both.
#[derive(Debug, PartialEq)]
pub struct Changed {
    pub name: String,
    /// Of both, if they are not one.
    pub kind: String,
    pub difference: Difference,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Difference {
    Values(Distance),
    /// The bytes of a type that nobody here decodes.
    Bytes,
    Shapes,
    OnlyInA,
    OnlyInB,
}

impl Difference {
    pub fn distance(self) -> Option<Distance> {
        match self {
            Difference::Values(distance) => Some(distance),
            _ => None,
        }
    }
}

/// How far b lies from a.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Distance {
    /// max |b − a|; infinite where one is a number and the other is not.
    pub largest: f64,
    /// Σ (b − a)².
    squares: f64,
    /// Σ a².
    of_a: f64,
}

impl Distance {
    /// |b − a| / |a|.
    pub fn relative(self) -> f64 {
        match self.largest.is_finite() {
            true => (self.squares / self.of_a.max(f64::MIN_POSITIVE)).sqrt(),
            false => f64::INFINITY,
        }
    }

    fn count(&mut self, a: f64, b: f64) {
        let difference = if a == b || (a.is_nan() && b.is_nan()) { 0.0 } else { (b - a).abs() };
        let difference = if difference.is_nan() { f64::INFINITY } else { difference };
        self.largest = self.largest.max(difference);
        self.squares += difference * difference;
        self.of_a += a * a;
    }
}

/// Of several tensors as if they were one.
impl std::iter::Sum for Distance {
    fn sum<I: Iterator<Item = Distance>>(all: I) -> Self {
        all.fold(Distance::default(), |a, b| Distance {
            largest: a.largest.max(b.largest),
            squares: a.squares + b.squares,
            of_a: a.of_a + b.of_a,
        })
    }
}

/// The tensors of the file `path`, in the order in which they lie there. Its bytes are in `files`,
/// and beside them those that an ONNX model may keep its tensors in.
pub fn read<'a>(path: &str, format: Format, files: &Files<'a>) -> anyhow::Result<Vec<Tensor<'a>>> {
    let bytes = files.get(path).copied().context("the file is missing");
    let tensors = bytes.and_then(|bytes| match format {
        Format::Safetensors => safetensors::read(bytes),
        Format::Gguf => gguf::read(bytes),
        Format::Onnx => onnx::read(bytes, path, files),
    });
    tensors.map_err(|error| {
        Failure::input(format!("{path} cannot be read: {error:#}"))
            .hint("`cargo xtask verify` tells whether it was damaged here or made so")
            .into()
    })
}

/// What differs, in the order of `a`; what only `b` has comes last.
pub fn compare(a: &[Tensor], b: &[Tensor]) -> Vec<Changed> {
    let by_name: BTreeMap<&str, &Tensor> = b.iter().map(|t| (t.name.as_str(), t)).collect();
    let names: BTreeSet<&str> = a.iter().map(|t| t.name.as_str()).collect();
    let in_a = a.iter().filter_map(|a| {
        let (kind, difference) = match by_name.get(a.name.as_str()) {
            None => (a.kind.clone(), Difference::OnlyInA),
            Some(b) if a.kind == b.kind => (a.kind.clone(), difference(a, b)?),
            Some(b) => (format!("{} → {}", a.kind, b.kind), difference(a, b)?),
        };
        Some(Changed { name: a.name.clone(), kind, difference })
    });
    let only_in_b = b.iter().filter(|b| !names.contains(b.name.as_str())).map(|b| Changed {
        name: b.name.clone(),
        kind: b.kind.clone(),
        difference: Difference::OnlyInB,
    });
    in_a.chain(only_in_b).collect()
}

fn difference(a: &Tensor, b: &Tensor) -> Option<Difference> {
    if a.shape != b.shape {
        return Some(Difference::Shapes);
    }
    if a.kind == b.kind && a.values == b.values {
        return None;
    }
    if let (Values::Opaque(_), _) | (_, Values::Opaque(_)) = (&a.values, &b.values) {
        return Some(Difference::Bytes);
    }
    /// Values at a time: whole blocks of any type.
    const STRETCH: usize = 1 << 14;
    let len = a.shape.iter().product();
    let (mut distance, mut of_a, mut of_b) = (Distance::default(), Vec::new(), Vec::new());
    for from in (0..len).step_by(STRETCH) {
        let range = from..len.min(from + STRETCH);
        of_a.clear();
        of_b.clear();
        a.values.decode(range.clone(), &mut of_a);
        b.values.decode(range, &mut of_b);
        of_a.iter().zip(&of_b).for_each(|(a, b)| distance.count(*a, *b));
    }
    (distance.largest > 0.0).then_some(Difference::Values(distance))
}

impl<'a> Values<'a> {
    /// Appends the values of `range`, whose ends are those of blocks.
    fn decode(&self, range: Range<usize>, out: &mut Vec<f64>) {
        match self {
            Values::Numbers(number, bytes) => number.decode(bytes, range, out),
            Values::Blocks(block, bytes) => block.decode(bytes, range, out),
            Values::Packed(packed) => out.extend(range.map(|i| packed.at(i))),
            Values::Opaque(_) => {}
        }
    }

    /// Numbers as they are, if they are as many as the shape says.
    fn numbers(number: Number, shape: &[usize], bytes: Cow<'a, [u8]>) -> anyhow::Result<Self> {
        let expected = bytes_of(shape, number.size())?;
        ensure!(
            bytes.len() == expected,
            "its shape {shape:?} takes {expected} bytes, but it has {}",
            bytes.len()
        );
        Ok(Values::Numbers(number, bytes))
    }
}

impl Number {
    const fn size(self) -> usize {
        match self {
            Number::F64 | Number::I64 | Number::U64 => 8,
            Number::F32 | Number::I32 | Number::U32 => 4,
            Number::F16 | Number::BF16 | Number::I16 | Number::U16 => 2,
            Number::I8 | Number::U8 => 1,
        }
    }

    fn decode(self, bytes: &[u8], range: Range<usize>, out: &mut Vec<f64>) {
        fn each<const N: usize>(bytes: &[u8], out: &mut Vec<f64>, f: impl Fn([u8; N]) -> f64) {
            out.extend(bytes.as_chunks().0.iter().map(|bytes| f(*bytes)));
        }
        let bytes = &bytes[range.start * self.size()..range.end * self.size()];
        match self {
            Number::F64 => each(bytes, out, f64::from_le_bytes),
            Number::F32 => each(bytes, out, |b| f32::from_le_bytes(b).into()),
            Number::F16 => each(bytes, out, |b| f16::from_le_bytes(b).into()),
            Number::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).into()),
            // Beyond 2⁵³ neighbours become one.
            Number::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f64),
            Number::U64 => each(bytes, out, |b| u64::from_le_bytes(b) as f64),
            Number::I32 => each(bytes, out, |b| i32::from_le_bytes(b).into()),
            Number::U32 => each(bytes, out, |b| u32::from_le_bytes(b).into()),
            Number::I16 => each(bytes, out, |b| i16::from_le_bytes(b).into()),
            Number::U16 => each(bytes, out, |b| u16::from_le_bytes(b).into()),
            Number::I8 => each(bytes, out, |b| i8::from_le_bytes(b).into()),
            Number::U8 => each(bytes, out, |b| u8::from_le_bytes(b).into()),
        }
    }
}

/// How many bytes a tensor takes, of `size` an element.
fn bytes_of(shape: &[usize], size: usize) -> anyhow::Result<usize> {
    let product = shape.iter().try_fold(size, |product, dim| product.checked_mul(*dim));
    product.with_context(|| format!("no file can hold its shape {shape:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All values of a tensor.
    pub(super) fn decoded(tensor: &Tensor) -> Vec<f64> {
        let mut out = Vec::new();
        tensor.values.decode(0..tensor.shape.iter().product(), &mut out);
        out
    }

    /// Holds each tensor of a golden file whose name ends in `.expected` to the one without.
    pub(super) fn hold_to_expected(tensors: &[Tensor]) -> usize {
        let find = |name: &str| tensors.iter().find(|t| t.name == name);
        let expected = tensors.iter().filter_map(|t| Some((t, t.name.strip_suffix(".expected")?)));
        let mut held = 0;
        for (expected, name) in expected {
            let tensor = find(name).unwrap_or_else(|| panic!("no {name}"));
            assert_eq!(tensor.shape, expected.shape, "{name}");
            assert_eq!(decoded(tensor), decoded(expected), "{name}");
            held += 1;
        }
        held
    }

    /// Reads what is left when the end is cut off, and what a changed byte makes of it: an error
    /// names the file, and nothing panics. What can be read is also compared.
    pub(super) fn survives_damage(path: &str, format: Format, files: &Files) {
        let whole = read(path, format, files).unwrap();
        let bytes = files[path];
        let check = |bytes: &[u8]| {
            let mut files = files.clone();
            files.insert(path, bytes);
            match read(path, format, &files) {
                Ok(tensors) => _ = compare(&whole, &tensors),
                Err(error) => assert!(error.to_string().starts_with(path), "{error:#}"),
            }
        };
        for end in 0..bytes.len() {
            check(&bytes[..end]);
        }
        for at in 0..bytes.len() {
            for value in [0xff, bytes[at] ^ 1] {
                let mut damaged = bytes.to_vec();
                damaged[at] = value;
                check(&damaged);
            }
        }
    }

    fn tensor<'a>(name: &str, shape: &[usize], kind: &str, values: Values<'a>) -> Tensor<'a> {
        Tensor { name: name.into(), shape: shape.into(), kind: kind.into(), values }
    }

    fn bf16s(name: &str, values: &[f32]) -> Tensor<'static> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        tensor(name, &[values.len()], "BF16", Values::Numbers(Number::BF16, bytes.into()))
    }

    fn f32s(name: &str, values: &[f32]) -> Tensor<'static> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensor(name, &[values.len()], "F32", Values::Numbers(Number::F32, bytes.into()))
    }

    fn opaque(byte: u8) -> Tensor<'static> {
        tensor("w", &[1], "IQ2_XS", Values::Opaque(vec![byte].into()))
    }

    fn apart(a: Tensor, b: Tensor) -> Option<(f64, f64)> {
        match difference(&a, &b) {
            Some(Difference::Values(distance)) => Some((distance.largest, distance.relative())),
            None => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn distances_are_those_of_the_numbers() {
        let (a, b) = ([3.0, 4.0], [3.0, 2.0]);
        assert_eq!(apart(bf16s("w", &a), bf16s("w", &b)), Some((2.0, 0.4)));
        assert_eq!(apart(bf16s("w", &a), f32s("w", &b)), Some((2.0, 0.4)));
        assert_eq!(apart(bf16s("w", &a), f32s("w", &a)), None);
        // More than is decoded at once.
        let mut long = vec![1.0; 40_000];
        let same = f32s("w", &long);
        long[39_999] = 2.0;
        assert_eq!(apart(same, f32s("w", &long)), Some((1.0, 0.005)));
    }

    #[test]
    fn what_is_no_number_is_not_passed_over() {
        let infinite = Some((f64::INFINITY, f64::INFINITY));
        assert_eq!(apart(f32s("w", &[1.0]), f32s("w", &[f32::NAN])), infinite);
        assert_eq!(apart(f32s("w", &[f32::INFINITY]), f32s("w", &[1.0])), infinite);
        assert_eq!(apart(bf16s("w", &[f32::NAN, 1.0]), f32s("w", &[f32::NAN, 1.0])), None);
        assert_eq!(apart(f32s("w", &[f32::INFINITY]), bf16s("w", &[f32::INFINITY])), None);
    }

    #[test]
    fn what_differs_is_listed_once() {
        let one =
            [f32s("same", &[1.0]), f32s("gone", &[1.0]), f32s("w", &[1.0]), f32s("v", &[2.0])];
        let two =
            [f32s("new", &[1.0]), f32s("w", &[1.0, 2.0]), bf16s("v", &[3.0]), f32s("same", &[1.0])];
        let changed = compare(&one, &two);
        let shown: Vec<(&str, &str)> =
            changed.iter().map(|c| (c.name.as_str(), c.kind.as_str())).collect();
        assert_eq!(shown, [("gone", "F32"), ("w", "F32"), ("v", "F32 → BF16"), ("new", "F32")]);
        assert_eq!(changed[0].difference, Difference::OnlyInA);
        assert_eq!(changed[1].difference, Difference::Shapes);
        assert!(matches!(changed[2].difference, Difference::Values(d) if d.relative() == 0.5));
        assert_eq!(changed[3].difference, Difference::OnlyInB);
    }

    #[test]
    fn bytes_are_compared_where_values_are_not_known() {
        assert_eq!(difference(&opaque(1), &opaque(1)), None);
        assert_eq!(difference(&opaque(1), &opaque(2)), Some(Difference::Bytes));
        assert_eq!(difference(&f32s("w", &[1.0]), &opaque(1)), Some(Difference::Bytes));
    }

    #[test]
    fn a_sum_is_that_of_one_long_tensor() {
        let of = |a: &[f32], b: &[f32]| match difference(&f32s("w", a), &f32s("w", b)) {
            Some(Difference::Values(distance)) => distance,
            other => panic!("{other:?}"),
        };
        let parts = [of(&[3.0], &[3.5]), of(&[4.0], &[2.0])];
        assert_eq!(parts.into_iter().sum::<Distance>(), of(&[3.0, 4.0], &[3.5, 2.0]));
    }

    #[test]
    fn a_shape_that_no_file_can_hold_is_an_error() {
        assert!(bytes_of(&[usize::MAX, 2], 1).is_err());
        assert!(bytes_of(&[1 << 62], 8).is_err());
        assert_eq!(bytes_of(&[], 4).unwrap(), 4);
        assert_eq!(bytes_of(&[0, 7], 4).unwrap(), 0);
    }
}
