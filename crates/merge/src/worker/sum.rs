//! W + Σ factor·B·A for rows of a weight, in f32, rounded once.
//!
//! Products are summed over the rank in order with fused multiply-add, as PEFT's are; each element is
//! computed by one thread, so the bytes do not depend on how many there are. Knows nothing of files.

use checkpoint::adapter::Delta;
use checkpoint::weights::{Dtype, all_finite, decode};
use half::f16;

/// Rows whose product is made together, and columns: what a processor has registers for.
const TILE: [usize; 2] = [4, 32];

/// What one adapter adds to a weight: `factor · B · A`.
pub struct Change<'a> {
    pub delta: &'a Delta,
    pub factor: f32,
}

/// Sums over a row's elements, in f64: w², Δ² and (W′ − W − Δ)², what rounding took of the change.
pub type Squares = [f64; 3];

/// A value that cannot be merged, and where in its row it stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wrong {
    pub row: usize,
    pub column: usize,
    pub value: f32,
}

/// Some rows of a weight as they are stored.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub bytes: &'a [u8],
    pub dtype: Dtype,
    pub columns: usize,
    /// The weight's row that comes first.
    pub first: usize,
}

impl Rows<'_> {
    /// How many they are.
    fn values(&self) -> usize {
        self.bytes.len() * 8 / self.dtype.bitsize()
    }

    /// Fails where a value is no number, or infinite.
    pub fn check(self) -> Result<Merged, Wrong> {
        // A type's exponent, all ones: neither has another.
        fn finite<const N: usize>(bytes: &[u8], ones: impl Fn([u8; N]) -> bool) -> bool {
            bytes.as_chunks().0.iter().fold(true, |finite, bytes| finite & !ones(*bytes))
        }
        let finite = match self.dtype {
            Dtype::BF16 => finite(self.bytes, |b| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
            Dtype::F16 => finite(self.bytes, |b| u16::from_le_bytes(b) & 0x7C00 == 0x7C00),
            _ => finite(self.bytes, |b| u32::from_le_bytes(b) & 0x7F80_0000 == 0x7F80_0000),
        };
        match finite {
            true => Ok(Merged::default()),
            false => {
                let mut out = vec![0; self.bytes.len()];
                Buffers::default().convert(self, Stored::Float(self.dtype), &mut out)
            }
        }
    }
}

/// What merged rows are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    Float(Dtype),
    /// 8 bits a value and a scale in bfloat16 a row.
    Int8,
}

impl Stored {
    pub fn row_bytes(self, columns: usize) -> usize {
        match self {
            Stored::Float(dtype) => columns * dtype.bitsize() / 8,
            Stored::Int8 => columns.next_multiple_of(4),
        }
    }
}

/// What rows came to, beside their bytes.
#[derive(Default)]
pub struct Merged {
    /// Of each row, where something was added to it.
    pub squares: Vec<Squares>,
    /// Of each row in 8 bits: bfloat16.
    pub scales: Vec<u16>,
}

/// What rows are computed in, kept from block to block.
#[derive(Default)]
pub struct Buffers {
    weight: Vec<f32>,
    change: Vec<f32>,
    sum: Vec<f32>,
    /// The change of one adapter of several; then what comes back of the merged rows.
    other: Vec<f32>,
    tile: Vec<f32>,
}

impl Buffers {
    /// The rows as `stored` in `out`.
    pub fn convert(&mut self, rows: Rows, stored: Stored, out: &mut [u8]) -> Result<Merged, Wrong> {
        self.sum.resize(rows.values(), 0.0);
        decode(rows.bytes, rows.dtype, &mut self.sum);
        Ok(Merged { squares: Vec::new(), scales: self.round(rows, stored, out)? })
    }

    /// The rows with what `changes` add to them as `stored` in `out`.
    pub fn merge(
        &mut self,
        rows: Rows,
        changes: &[Change],
        stored: Stored,
        out: &mut [u8],
    ) -> Result<Merged, Wrong> {
        #[cfg(target_arch = "x86_64")]
        {
            if std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw")
            {
                // SAFETY: the features were just found.
                return unsafe { self.merge_avx512(rows, changes, stored, out) };
            }
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                // SAFETY: both features were just found.
                return unsafe { self.merge_avx2(rows, changes, stored, out) };
            }
        }
        self.merge_any(rows, changes, stored, out)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
    fn merge_avx512(
        &mut self,
        rows: Rows,
        changes: &[Change],
        stored: Stored,
        out: &mut [u8],
    ) -> Result<Merged, Wrong> {
        self.merge_any(rows, changes, stored, out)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn merge_avx2(
        &mut self,
        rows: Rows,
        changes: &[Change],
        stored: Stored,
        out: &mut [u8],
    ) -> Result<Merged, Wrong> {
        self.merge_any(rows, changes, stored, out)
    }

    /// The same operations in the same order on every machine: Rust never fuses or reorders them.
    #[inline(always)]
    fn merge_any(
        &mut self,
        rows: Rows,
        changes: &[Change],
        stored: Stored,
        out: &mut [u8],
    ) -> Result<Merged, Wrong> {
        self.weight.resize(rows.values(), 0.0);
        decode(rows.bytes, rows.dtype, &mut self.weight);
        let Self { weight, change, sum, other, tile } = &mut *self;
        for (i, one) in changes.iter().enumerate() {
            let into = if i == 0 { &mut *change } else { &mut *other };
            into.resize(weight.len(), 0.0);
            product(one, rows.first, rows.columns, tile, into);
            if i > 0 {
                change.iter_mut().zip(&*other).for_each(|(sum, x)| *sum += x);
            }
        }
        sum.clear();
        sum.extend(weight.iter().zip(&*change).map(|(w, d)| w + d));
        let scales = self.round(rows, stored, out)?;
        let mut squares_of = Vec::with_capacity(self.weight.len() / rows.columns);
        for from in (0..self.weight.len()).step_by(rows.columns) {
            let row = from..from + rows.columns;
            let [weight, change, rounded] =
                [&self.weight, &self.change, &self.other].map(|values| &values[row.clone()]);
            squares_of.push(squares(weight, change, rounded));
        }
        Ok(Merged { squares: squares_of, scales })
    }

    /// What was summed, as `stored` in `out`; what comes back of it in `other`. The scales of rows.
    #[inline(always)]
    fn round(&mut self, rows: Rows, stored: Stored, out: &mut [u8]) -> Result<Vec<u16>, Wrong> {
        let mut scales = Vec::new();
        self.other.resize(self.sum.len(), 0.0);
        match stored {
            Stored::Float(dtype) => {
                encode(&self.sum, dtype, out);
                decode(out, dtype, &mut self.other);
            }
            Stored::Int8 => {
                let sums = self.sum.chunks_exact(rows.columns);
                let back = self.other.chunks_exact_mut(rows.columns);
                let out = out.chunks_exact_mut(stored.row_bytes(rows.columns));
                for ((sums, back), out) in sums.zip(back).zip(out) {
                    scales.push(int8(sums, out, back));
                }
            }
        }
        if all_finite(&self.other) {
            return Ok(scales);
        }
        let at = self.other.iter().position(|x| !x.is_finite()).expect("one is not finite");
        let at = match self.sum.iter().position(|x| !x.is_finite()) {
            Some(broken) => broken,
            None => at,
        };
        let (row, column) = (rows.first + at / rows.columns, at % rows.columns);
        Err(Wrong { row, column, value: self.sum[at] })
    }
}

/// A row in 8 bits, symmetric about 128, as compressed-tensors packs them: four to a word, low byte
/// first. The scale, a bfloat16, maps the value of largest magnitude to 127.5.
#[inline(always)]
fn int8(values: &[f32], out: &mut [u8], back: &mut [f32]) -> u16 {
    let largest = values.iter().fold(0.0f32, |most, x| if x.abs() > most { x.abs() } else { most });
    let scale = match bf16(largest / 127.5) {
        // Of a row of zeros; any other would do.
        0 => 0x3C00,
        scale => scale,
    };
    let step = f32::from_bits(u32::from(scale) << 16);
    let (out, padding) = out.split_at_mut(values.len());
    padding.fill(0);
    for ((x, out), back) in values.iter().zip(out).zip(back) {
        let level = (x / step).round_ties_even().clamp(-128.0, 127.0);
        *out = (level + 128.0) as u8;
        // As its reader has it: the product is a bfloat16 too.
        *back = f32::from_bits(u32::from(bf16(level * step)) << 16);
    }
    scale
}

/// Eight sums side by side, then one: in an order that no number of threads changes. Each of the
/// three by itself, since all in one loop are not computed in eight lanes.
#[inline(always)]
fn squares(weight: &[f32], change: &[f32], merged: &[f32]) -> Squares {
    let (w, w_rest) = lanes(weight);
    let (d, d_rest) = lanes(change);
    let (r, r_rest) = lanes(merged);
    let mut sums = [[0.0f64; 8]; 3];
    let [of_w, of_d, lost] = &mut sums;
    for w in w {
        add_square(of_w, w);
    }
    add_square(of_w, &w_rest);
    for d in d {
        add_square(of_d, d);
    }
    add_square(of_d, &d_rest);
    for ((w, d), r) in w.iter().zip(d).zip(r) {
        add_lost(lost, w, d, r);
    }
    add_lost(lost, &w_rest, &d_rest, &r_rest);
    sums.map(|lanes| lanes.iter().sum())
}

/// A row by eights, and what is left over, with zeros.
#[inline(always)]
fn lanes(row: &[f32]) -> (&[[f32; 8]], [f32; 8]) {
    let (whole, rest) = row.as_chunks::<8>();
    let mut padded = [0.0; 8];
    padded[..rest.len()].copy_from_slice(rest);
    (whole, padded)
}

#[inline(always)]
fn add_square(sums: &mut [f64; 8], x: &[f32; 8]) {
    for i in 0..8 {
        let x = f64::from(x[i]);
        sums[i] += x * x;
    }
}

#[inline(always)]
fn add_lost(sums: &mut [f64; 8], w: &[f32; 8], d: &[f32; 8], r: &[f32; 8]) {
    for i in 0..8 {
        let lost = f64::from(r[i]) - f64::from(w[i]) - f64::from(d[i]);
        sums[i] += lost * lost;
    }
}

/// `out[o, j] = factor · Σ_k b[first + o, k] · a[k, j]`, k in order, fused.
#[inline(always)]
fn product(change: &Change, first: usize, columns: usize, tile: &mut Vec<f32>, out: &mut [f32]) {
    let Delta { a, b, rank, .. } = change.delta;
    let b = &b[first * rank..][..out.len() / columns * rank];
    for from in (0..columns).step_by(TILE[1]) {
        let width = TILE[1].min(columns - from);
        // The columns at hand, one below the other: beyond the last they are zero.
        tile.clear();
        tile.resize(rank * TILE[1], 0.0);
        for (tile, a) in tile.chunks_exact_mut(TILE[1]).zip(a.chunks_exact(columns)) {
            tile[..width].copy_from_slice(&a[from..from + width]);
        }
        for (b, out) in b.chunks(TILE[0] * rank).zip(out.chunks_mut(TILE[0] * columns)) {
            let mut sums = [[0.0; TILE[1]]; TILE[0]];
            tile_product(b, tile, *rank, &mut sums);
            for (sums, out) in sums.iter().zip(out.chunks_exact_mut(columns)) {
                for (sum, out) in sums.iter().zip(&mut out[from..from + width]) {
                    *out = sum * change.factor;
                }
            }
        }
    }
}

/// Up to four rows of B times a tile of A. `mul_add` rounds once on every machine, with an instruction
/// for it or without.
#[inline(always)]
fn tile_product(b: &[f32], a: &[f32], rank: usize, sums: &mut [[f32; TILE[1]]; TILE[0]]) {
    let a = a.as_chunks::<{ TILE[1] }>().0;
    if b.len() < TILE[0] * rank {
        for (b, sums) in b.chunks_exact(rank).zip(sums) {
            for (b, a) in b.iter().zip(a) {
                for (sum, a) in sums.iter_mut().zip(a) {
                    *sum = b.mul_add(*a, *sum);
                }
            }
        }
        return;
    }
    // By name, so that the sums stay in registers.
    let [mut s0, mut s1, mut s2, mut s3] = *sums;
    let (low, high) = b.split_at(2 * rank);
    let ((b0, b1), (b2, b3)) = (low.split_at(rank), high.split_at(rank));
    for ((a, (b0, b1)), (b2, b3)) in a.iter().zip(b0.iter().zip(b1)).zip(b2.iter().zip(b3)) {
        for i in 0..TILE[1] {
            s0[i] = b0.mul_add(a[i], s0[i]);
            s1[i] = b1.mul_add(a[i], s1[i]);
            s2[i] = b2.mul_add(a[i], s2[i]);
            s3[i] = b3.mul_add(a[i], s3[i]);
        }
    }
    *sums = [s0, s1, s2, s3];
}

/// Rounds to nearest, ties to even.
#[inline(always)]
pub fn encode(values: &[f32], dtype: Dtype, out: &mut [u8]) {
    match dtype {
        Dtype::BF16 => {
            for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = bf16(*x).to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = f16::from_f32(*x).to_le_bytes();
            }
        }
        _ => {
            for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = x.to_le_bytes();
            }
        }
    }
}

/// The upper half of the bits, rounded; without a branch, so that many are made at a time. A NaN may
/// come out as another.
#[inline(always)]
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let odd = bits >> 16 & 1;
    let rounded = bits.wrapping_add(0x7FFF + odd) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_that_of_the_library() {
        for bits in (0..u32::MAX).step_by(65_521 / 7) {
            let x = f32::from_bits(bits);
            assert_eq!(bf16(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
        }
    }

    /// Widths and heights that leave a rest in every direction, against the plain sum.
    #[test]
    fn products_are_summed_in_order() {
        for (rows, rank, columns) in [(1, 1, 1), (4, 3, 32), (7, 5, 33), (9, 16, 100)] {
            let values = |n: usize, seed: usize| -> Vec<f32> {
                (0..n).map(|i| ((i * 7 + seed) as f32 * 0.37).sin()).collect()
            };
            let delta = Delta {
                a: values(rank * columns, 1),
                b: values(rows * rank, 2),
                rank,
                alpha: 1.0,
                scale: 1.0,
            };
            let change = Change { delta: &delta, factor: 0.7 };
            let skipped = rows / 3;
            let mut out = vec![9.0; (rows - skipped) * columns];
            product(&change, skipped, columns, &mut Vec::new(), &mut out);
            for (at, found) in out.iter().enumerate() {
                let (o, j) = (skipped + at / columns, at % columns);
                let sum = (0..rank).fold(0.0f32, |sum, k| {
                    delta.b[o * rank + k].mul_add(delta.a[k * columns + j], sum)
                });
                assert_eq!(*found, sum * 0.7);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let delta = Delta { a: vec![1.0; 2], b: vec![0.0; 2], rank: 1, alpha: 1.0, scale: 1.0 };
        let changes = [Change { delta: &delta, factor: 1.0 }];
        for (value, dtype, fits) in [
            (65_519.0, Dtype::F16, true),
            (65_520.0, Dtype::F16, false),
            (65_520.0, Dtype::BF16, true),
            (f32::NAN, Dtype::F32, false),
            (f32::INFINITY, Dtype::BF16, false),
        ] {
            let base: Vec<u8> =
                [0.0, 0.0, value, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut out = vec![0; 4 * dtype.bitsize() / 8];
            let rows = Rows { bytes: &base, dtype: Dtype::F32, columns: 2, first: 0 };
            let stored = Stored::Float(dtype);
            let merged = Buffers::default().merge(rows, &changes, stored, &mut out);
            let converted = Buffers::default().convert(rows, stored, &mut out);
            for said in [merged, converted] {
                assert_eq!(said.is_ok(), fits, "{value}");
                if let Err(wrong) = said {
                    assert_eq!((wrong.row, wrong.column), (1, 0));
                }
            }
        }
    }

    /// By hand: steps of 1, halves to the even neighbour, the largest at either end.
    #[test]
    fn rows_in_eight_bits() {
        let mut values = vec![0.5, 1.5, -0.5, -127.5, 127.4];
        let (mut out, mut back) = (vec![9; 8], vec![0.0; 5]);
        assert_eq!(int8(&values, &mut out, &mut back), 0x3F80);
        assert_eq!(out, [128, 130, 128, 0, 255, 0, 0, 0]);
        assert_eq!(back, [0.0, 2.0, 0.0, -128.0, 127.0]);
        values.fill(0.0);
        int8(&values, &mut out, &mut back);
        assert_eq!(out[..5], [128; 5]);
        let rows = Rows { bytes: &f32::NAN.to_le_bytes(), dtype: Dtype::F32, columns: 1, first: 3 };
        let said = Buffers::default().convert(rows, Stored::Int8, &mut [0; 4]);
        assert_eq!(said.err().map(|wrong| wrong.row), Some(3));
    }
}
