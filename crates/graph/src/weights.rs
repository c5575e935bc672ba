//! A checkpoint's tensors as initializers, and the nodes that multiply with them.
//!
//! Knows nothing of where in the graph they stand. N rows of K values: a layer is x · Wᵀ.

use std::ops::Range;

use checkpoint::weights::{TensorRef, Weights, all_finite};
use half::f16;
use rayon::prelude::*;

use crate::builder::{Attr, Builder, Place};
use crate::proto::data_type::{FLOAT, FLOAT16, UINT8};
use crate::quantise::{Scheme, Schemes};
use crate::{Calibration, Dtype, Error, Options};

/// `MatMulNBits` computes in f32: the one level that gives the same tokens on every device.
const ACCURACY_LEVEL: i64 = 1;
/// Bytes that are made before they are written: few enough to be in the cache still.
const BATCH: usize = 1 << 20;
/// Rows that a thread quantises at a time.
const ROWS: usize = 16;
/// Columns that are transposed at a time: as many BF16 values as a cache line holds.
const COLUMNS: usize = 32;

/// Rows of tensors, one tensor below the other.
pub struct Matrix<'a> {
    parts: Vec<(TensorRef<'a>, Range<usize>)>,
    pub n: usize,
    pub k: usize,
}

impl<'a> Matrix<'a> {
    /// The given rows of each tensor; `None`: all.
    pub fn new(
        weights: &'a Weights,
        parts: &[(String, Option<Range<usize>>)],
    ) -> Result<Self, Error> {
        let mut matrix = Self { parts: Vec::new(), n: 0, k: 0 };
        for (name, rows) in parts {
            let tensor = weights.get(name)?;
            matrix.k = tensor.shape[1];
            let rows = rows.clone().unwrap_or(0..tensor.shape[0]);
            matrix.n += rows.len();
            matrix.parts.push((tensor, rows));
        }
        Ok(matrix)
    }

    /// What was read can be read again, but need not be in memory.
    fn let_go(&self, weights: &Weights) {
        self.parts.iter().for_each(|(tensor, _)| weights.let_go_of(tensor.data));
    }

    /// The first tensor's.
    fn name(&self) -> &str {
        self.parts.first().map_or("", |(tensor, _)| &tensor.name)
    }

    /// The values of a row from column `from` on.
    fn read(&self, row: usize, from: usize, out: &mut [f32]) -> Result<(), Error> {
        let mut row = row;
        for (tensor, rows) in &self.parts {
            if row < rows.len() {
                tensor.read_f32((rows.start + row) * self.k + from, out)?;
                return finite(out, &tensor.name);
            }
            row -= rows.len();
        }
        unreachable!("a row of the matrix");
    }
}

/// What the weights go through on their way into the graph.
pub struct Writer<'a> {
    pub b: Builder,
    weights: &'a Weights,
    dtype: Dtype,
    schemes: Schemes,
    calibration: Option<&'a Calibration>,
    /// Bytes of the embedding, of linear layers, of all else.
    pub sizes: [u64; 3],
}

/// What a part of the model counts as.
#[derive(Clone, Copy)]
pub enum Part {
    Embedding,
    Linear,
    Other,
}

/// The embedding's bytes, which a tied head multiplies with.
pub enum Embedding {
    /// [V, H].
    Float,
    /// As levels, under the name and in the shape that `MatMulNBits` wants.
    Quantised(Quantised, [usize; 2]),
}

/// Initializers of a quantised matrix.
pub struct Quantised {
    scheme: Scheme,
    levels: String,
    scales: String,
    zeros: String,
    place: Place,
}

impl<'a> Writer<'a> {
    pub fn new(
        b: Builder,
        weights: &'a Weights,
        width: usize,
        options: Options,
        calibration: Option<&'a Calibration>,
    ) -> Result<Self, Error> {
        let schemes = Schemes::new(width, options)?;
        Ok(Self { b, weights, dtype: options.dtype, schemes, calibration, sizes: [0; 3] })
    }

    /// The type that layers compute in.
    pub fn float(&self) -> i32 {
        if self.dtype.is_half() { FLOAT16 } else { FLOAT }
    }

    /// `x`, which layers compute with, in 32 bits: under this name, if it is not already.
    pub fn widened(&mut self, name: &str, x: &str) -> String {
        match self.dtype.is_half() {
            true => self.b.node("Cast", name, &[x], &[("to", Attr::Int(FLOAT.into()))]),
            false => x.into(),
        }
    }

    /// `x`, of 32 bits, in what layers compute in: under this name, if it is not already.
    pub fn narrowed(&mut self, name: &str, x: &str) -> String {
        match self.dtype.is_half() {
            true => self.b.node("Cast", name, &[x], &[("to", Attr::Int(FLOAT16.into()))]),
            false => x.into(),
        }
    }

    /// A vector of the checkpoint with `shift` added, in f32, under its own name.
    pub fn norm(&mut self, name: &str, shift: f32) -> Result<(), Error> {
        let mut values = self.weights.get(name)?.to_f32()?;
        finite(&values, name)?;
        if shift != 0.0 {
            values.iter_mut().for_each(|value| *value += shift);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.count(Part::Other, bytes.len());
        self.b.tensor(name, FLOAT, &[values.len()], &bytes).map(|_| ())
    }

    /// `values` in what layers compute in.
    pub fn floats(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Result<(), Error> {
        let mut bytes = vec![0; values.len() * self.float_size()];
        self.encode(values, &mut bytes, name)?;
        self.count(Part::Other, bytes.len());
        self.b.tensor(name, self.float(), dims, &bytes).map(|_| ())
    }

    /// x · Wᵀ + b.
    pub fn linear(
        &mut self,
        name: &str,
        x: &str,
        parts: &[(String, Option<Range<usize>>)],
        biases: &[String],
    ) -> Result<String, Error> {
        let matrix = Matrix::new(self.weights, parts)?;
        let product = if biases.is_empty() { name.to_string() } else { format!("{name}.product") };
        self.product(&product, x, &format!("{name}.weight"), &matrix, self.schemes.linear)?;
        if biases.is_empty() {
            return Ok(product);
        }
        let mut bias = Vec::new();
        for part in biases {
            let values = self.weights.get(part)?.to_f32()?;
            finite(&values, part)?;
            bias.extend(values);
        }
        let weight = format!("{name}.bias");
        self.floats(&weight, &[bias.len()], &bias)?;
        Ok(self.b.node("Add", name, &[&product, &weight], &[]))
    }

    /// x · Wᵀ, quantised where there is a scheme.
    fn product(
        &mut self,
        name: &str,
        x: &str,
        weight: &str,
        matrix: &Matrix,
        scheme: Option<Scheme>,
    ) -> Result<(), Error> {
        let (n, k) = (matrix.n, matrix.k);
        let Some(scheme) = scheme else {
            self.transposed(weight, matrix)?;
            self.b.node("MatMul", name, &[x, weight], &[]);
            return Ok(());
        };
        let dims = [n, scheme.blocks(k), scheme.width()];
        let prefix = weight.strip_suffix(".weight").unwrap_or(weight);
        let names = [format!("{prefix}.scales"), format!("{prefix}.zeros")];
        let q = self.quantised(weight, &dims, names, matrix, scheme, Part::Linear)?;
        self.matmul_n_bits(name, x, &q, [n, k]);
        Ok(())
    }

    /// Token ids → rows of the embedding, in what layers compute in: the node `name`.
    pub fn embedding(&mut self, name: &str, tensor: &str, tied: bool) -> Result<Embedding, Error> {
        let matrix = Matrix::new(self.weights, &[(tensor.to_string(), None)])?;
        let (v, h) = (matrix.n, matrix.k);
        let Some(scheme) = self.schemes.head else {
            self.rows("embed_tokens", &matrix)?;
            self.b.node("Gather", name, &["embed_tokens", "input_ids"], &[]);
            return Ok(Embedding::Float);
        };
        let names = ["embed_tokens_scales".to_string(), "embed_tokens_zeros".to_string()];
        let dims = [v, h * scheme.bits as usize / 8];
        let mut q =
            self.quantised("embed_tokens", &dims, names, &matrix, scheme, Part::Embedding)?;
        if tied {
            // One copy of the bytes, under the shape that each operator asks for.
            let dims = [v, scheme.blocks(h), scheme.width()];
            self.b.tensor_at("lm_head", UINT8, &dims, &q.place);
        }
        let mut inputs = vec!["embed_tokens", "input_ids", &q.scales];
        if !scheme.symmetric {
            inputs.push(&q.zeros);
        }
        self.b.contrib(
            "GatherBlockQuantized",
            name,
            &inputs,
            &[name],
            &[
                ("bits", Attr::Int(scheme.bits.into())),
                ("block_size", Attr::Int(scheme.block as i64)),
                ("gather_axis", Attr::Int(0)),
                ("quantize_axis", Attr::Int(1)),
            ],
        );
        q.levels = "lm_head".into();
        Ok(Embedding::Quantised(q, [v, h]))
    }

    /// x · Eᵀ with the embedding's own bytes.
    pub fn tied_head(&mut self, name: &str, x: &str, embedding: &Embedding) {
        match embedding {
            Embedding::Float => {
                // Folded once, when the session is made.
                let head = self.b.node("Transpose", "lm_head", &["embed_tokens"], &[]);
                self.b.node("MatMul", name, &[x, &head], &[]);
            }
            Embedding::Quantised(q, shape) => self.matmul_n_bits(name, x, q, *shape),
        }
    }

    /// x · Wᵀ with a head of its own.
    pub fn own_head(&mut self, name: &str, x: &str, tensor: &str) -> Result<(), Error> {
        let matrix = Matrix::new(self.weights, &[(tensor.to_string(), None)])?;
        self.product(name, x, "logits.weight", &matrix, self.schemes.head)
    }

    fn matmul_n_bits(&mut self, name: &str, x: &str, q: &Quantised, [n, k]: [usize; 2]) {
        let attrs = [
            ("K", Attr::Int(k as i64)),
            ("N", Attr::Int(n as i64)),
            ("bits", Attr::Int(q.scheme.bits.into())),
            ("block_size", Attr::Int(q.scheme.block as i64)),
            ("accuracy_level", Attr::Int(ACCURACY_LEVEL)),
        ];
        let mut inputs = vec![x, &q.levels, &q.scales];
        if !q.scheme.symmetric {
            inputs.push(&q.zeros);
        }
        self.b.contrib("MatMulNBits", name, &inputs, &[name], &attrs);
    }

    /// Levels, and below them scales and zero points.
    fn quantised(
        &mut self,
        name: &str,
        dims: &[usize],
        [scales_name, zeros_name]: [String; 2],
        matrix: &Matrix,
        scheme: Scheme,
        part: Part,
    ) -> Result<Quantised, Error> {
        let (n, k) = (matrix.n, matrix.k);
        let (blocks, zeros_width) = (scheme.blocks(k), scheme.zeros_width(k));
        let width = blocks * scheme.width();
        // Tensors one below the other are multiplied with the same.
        let seen = match self.calibration {
            Some(calibration) => calibration.of(matrix.name())?,
            None => None,
        };
        let place = self.b.begin(name, UINT8, dims, (n * width) as u64)?;
        let (mut scales, mut zeros) = (vec![0f32; n * blocks], vec![0u8; n * zeros_width]);
        let batch = (BATCH / width).clamp(1, n);
        // While a batch is quantised, the one before it is written.
        let (mut levels, mut ready) = (Vec::new(), Vec::new());
        let batches = scales.chunks_mut(batch * blocks).zip(zeros.chunks_mut(batch * zeros_width));
        for (i, (scales, zeros)) in batches.enumerate() {
            levels.resize(scales.len() / blocks * width, 0);
            let quantise = || {
                levels
                    .par_chunks_mut(ROWS * width)
                    .zip(scales.par_chunks_mut(ROWS * blocks))
                    .zip(zeros.par_chunks_mut(ROWS * zeros_width))
                    .enumerate()
                    .try_for_each_init(
                        || vec![0f32; ROWS * k],
                        |values, (at, ((levels, scales), zeros))| {
                            let values = &mut values[..scales.len() / blocks * k];
                            for (row, values) in values.chunks_exact_mut(k).enumerate() {
                                matrix.read(i * batch + at * ROWS + row, 0, values)?;
                            }
                            scheme.rows(seen.as_ref(), k, values, levels, scales, zeros);
                            Ok::<_, Error>(())
                        },
                    )
            };
            let (quantised, written) = rayon::join(quantise, || self.b.append(&ready));
            quantised.and(written)?;
            matrix.let_go(self.weights);
            std::mem::swap(&mut levels, &mut ready);
        }
        self.b.append(&ready)?;
        let mut bytes = vec![0; scales.len() * self.float_size()];
        self.encode(&scales, &mut bytes, matrix.name())?;
        self.b.tensor(&scales_name, self.float(), &[n, blocks], &bytes)?;
        self.count(part, n * width + bytes.len());
        if !scheme.symmetric {
            self.b.tensor(&zeros_name, UINT8, &[n, zeros_width], &zeros)?;
            self.count(part, zeros.len());
        }
        let levels = name.to_string();
        Ok(Quantised { scheme, levels, scales: scales_name, zeros: zeros_name, place })
    }

    /// \[N, K\] as it is.
    fn rows(&mut self, name: &str, matrix: &Matrix) -> Result<(), Error> {
        let (n, k, size) = (matrix.n, matrix.k, self.float_size());
        self.b.begin(name, self.float(), &[n, k], (n * k * size) as u64)?;
        let batch = (BATCH / (k * size)).clamp(1, n);
        let mut bytes = vec![0; batch * k * size];
        for from in (0..n).step_by(batch) {
            let bytes = &mut bytes[..batch.min(n - from) * k * size];
            bytes.par_chunks_mut(k * size).enumerate().try_for_each_init(
                || vec![0f32; k],
                |values, (row, bytes)| {
                    matrix.read(from + row, 0, values)?;
                    self.encode(values, bytes, matrix.name())
                },
            )?;
            self.b.append(bytes)?;
            matrix.let_go(self.weights);
        }
        self.count(Part::Embedding, n * k * size);
        Ok(())
    }

    /// \[N, K\] → \[K, N\].
    fn transposed(&mut self, name: &str, matrix: &Matrix) -> Result<(), Error> {
        let (n, k, size) = (matrix.n, matrix.k, self.float_size());
        self.b.begin(name, self.float(), &[k, n], (n * k * size) as u64)?;
        let batch = (BATCH / (n * size)).next_multiple_of(COLUMNS).min(k);
        let mut bytes = vec![0; batch * n * size];
        for from in (0..k).step_by(batch) {
            let bytes = &mut bytes[..batch.min(k - from) * n * size];
            let strips = bytes.par_chunks_mut(COLUMNS * n * size).enumerate();
            strips.try_for_each(|(strip, bytes)| {
                let columns = bytes.len() / (n * size);
                let (mut values, mut one) = ([0f32; COLUMNS], [0u8; COLUMNS * 4]);
                for row in 0..n {
                    let values = &mut values[..columns];
                    matrix.read(row, from + strip * COLUMNS, values)?;
                    self.encode(values, &mut one[..columns * size], matrix.name())?;
                    for (column, value) in one.chunks_exact(size).take(columns).enumerate() {
                        bytes[(column * n + row) * size..][..size].copy_from_slice(value);
                    }
                }
                Ok::<_, Error>(())
            })?;
            self.b.append(bytes)?;
        }
        matrix.let_go(self.weights);
        self.count(Part::Linear, n * k * size);
        Ok(())
    }

    const fn float_size(&self) -> usize {
        if self.dtype.is_half() { 2 } else { 4 }
    }

    /// Values in what layers compute in.
    fn encode(&self, values: &[f32], bytes: &mut [u8], name: &str) -> Result<(), Error> {
        if !self.dtype.is_half() {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
            return Ok(());
        }
        for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
            let rounded = f16::from_f32(*value);
            if rounded.is_infinite() {
                return Err(Error::TooLarge(name.into()));
            }
            *bytes = rounded.to_le_bytes();
        }
        Ok(())
    }

    fn count(&mut self, part: Part, bytes: usize) {
        self.sizes[part as usize] += bytes as u64;
    }
}

fn finite(values: &[f32], name: &str) -> Result<(), Error> {
    if all_finite(values) { Ok(()) } else { Err(Error::NotFinite(name.into())) }
}
