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

    /// Each of them, and its place in `out`.
    fn each<'o>(
        self,
        stored: Stored,
        out: &'o mut [u8],
    ) -> impl Iterator<Item = (&'o [u8], &'o mut [u8])>
    where
        Self: 'o,
    {
        let row_bytes = self.columns * self.dtype.bitsize() / 8;
        self.bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(stored.row_bytes(self.columns)))
    }

    /// Fails where a value is no number, or infinite.
    pub fn check(self) -> Result<Merged, Wrong> {
        // A type's exponent, all ones: neither has another.
        fn finite<const N: usize>(bytes: &[u8], ones: impl Fn([u8; N]) -> bool) -> bool {
            bytes.as_chunks().0.iter().fold(true, |finite, bytes| finite & !ones(*bytes))
        }
        let finite = widest(
            #[inline(always)]
            || match self.dtype {
                Dtype::BF16 => finite(self.bytes, |b| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
                Dtype::F16 => finite(self.bytes, |b| u16::from_le_bytes(b) & 0x7C00 == 0x7C00),
                _ => finite(self.bytes, |b| u32::from_le_bytes(b) & 0x7F80_0000 == 0x7F80_0000),
            },
        );
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
    /// What is added to the rows at hand; that of one adapter of several.
    change: Vec<f32>,
    other: Vec<f32>,
    tile: Vec<f32>,
    /// One row, so that all that is done to it finds it in the nearest cache: the base's, merged, and
    /// what comes back of what is stored.
    weight: Vec<f32>,
    sum: Vec<f32>,
    back: Vec<f32>,
}

impl Buffers {
    /// The rows as `stored` in `out`.
    pub fn convert(&mut self, rows: Rows, stored: Stored, out: &mut [u8]) -> Result<Merged, Wrong> {
        let mut merged = Merged::default();
        self.sum.resize(rows.columns, 0.0);
        for (at, (row, out)) in rows.each(stored, out).enumerate() {
            decode(row, rows.dtype, &mut self.sum);
            merged.scales.extend(self.round(rows.first + at, stored, out)?);
        }
        Ok(merged)
    }

    /// The rows with what `changes` add to them as `stored` in `out`. The same operations in the same
    /// order on every machine: Rust never fuses or reorders them.
    pub fn merge(
        &mut self,
        rows: Rows,
        changes: &[Change],
        stored: Stored,
        out: &mut [u8],
    ) -> Result<Merged, Wrong> {
        widest(
            #[inline(always)]
            || self.merge_any(rows, changes, stored, out),
        )
    }

    #[inline(always)]
    fn merge_any(
        &mut self,
        rows: Rows,
        changes: &[Change],
        stored: Stored,
        out: &mut [u8],
    ) -> Result<Merged, Wrong> {
        let Self { change, other, tile, .. } = &mut *self;
        for (i, one) in changes.iter().enumerate() {
            let into = if i == 0 { &mut *change } else { &mut *other };
            into.resize(rows.values(), 0.0);
            product(one, rows.first, rows.columns, tile, into);
            if i > 0 {
                change.iter_mut().zip(&*other).for_each(|(sum, x)| *sum += x);
            }
        }
        let mut merged = Merged::default();
        self.weight.resize(rows.columns, 0.0);
        for (at, (row, out)) in rows.each(stored, out).enumerate() {
            let change = at * rows.columns..(at + 1) * rows.columns;
            decode(row, rows.dtype, &mut self.weight);
            self.sum.clear();
            self.sum
                .extend(self.weight.iter().zip(&self.change[change.clone()]).map(|(w, d)| w + d));
            merged.scales.extend(self.round(rows.first + at, stored, out)?);
            merged.squares.push(squares(&self.weight, &self.change[change], &self.back));
        }
        Ok(merged)
    }

    /// The row that was summed, as `stored` in `out`, and `back`; its scale, if it has one.
    #[inline(always)]
    fn round(&mut self, row: usize, stored: Stored, out: &mut [u8]) -> Result<Option<u16>, Wrong> {
        let Self { sum, back, .. } = self;
        back.resize(sum.len(), 0.0);
        let scale = match stored {
            Stored::Float(dtype) => {
                store(sum, dtype, out, back);
                None
            }
            Stored::Int8 => Some(int8(sum, out, back)),
        };
        if all_finite(back) {
            return Ok(scale);
        }
        let wrong = |values: &[f32]| values.iter().position(|x| !x.is_finite());
        let column = wrong(sum).or_else(|| wrong(back)).expect("one is not finite");
        Err(Wrong { row, column, value: sum[column] })
    }
}

/// Does `work` with the widest vectors that this processor has. All of it has to be inlined.
#[inline(always)]
fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
        fn avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw") {
            // SAFETY: the features were just found.
            return unsafe { avx512(work) };
        }
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            // SAFETY: both features were just found.
            return unsafe { avx2(work) };
        }
    }
    work()
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

/// In an order that no number of threads changes.
#[inline(always)]
fn squares(weight: &[f32], change: &[f32], back: &[f32]) -> Squares {
    let mut sums = [[0.0; LANES]; 3];
    let (w, w_rest) = lanes(weight);
    let (d, d_rest) = lanes(change);
    let (r, r_rest) = lanes(back);
    for ((w, d), r) in w.iter().zip(d).zip(r) {
        add_squares(&mut sums, w, d, r);
    }
    add_squares(&mut sums, &w_rest, &d_rest, &r_rest);
    let sums = sums.map(|lanes| lanes.iter().map(|x| f64::from(*x)).sum());
    // Squares that a single holds in full. A row of zeros has none, and is seldom.
    let [w, d, _]: Squares = sums;
    if w < 1e30 && d > 1e-30 {
        return sums;
    }
    let mut sums = Squares::default();
    for ((w, d), r) in weight.iter().zip(change).zip(back) {
        let [w, d, r] = [w, d, r].map(|x| f64::from(*x));
        let lost = r - w - d;
        sums.iter_mut().zip([w, d, lost]).for_each(|(sum, x)| *sum += x * x);
    }
    sums
}

/// Sums side by side.
const LANES: usize = 16;

#[inline(always)]
fn add_squares(
    [of_w, of_d, of_lost]: &mut [[f32; LANES]; 3],
    w: &[f32; LANES],
    d: &[f32; LANES],
    r: &[f32; LANES],
) {
    for i in 0..LANES {
        of_w[i] += w[i] * w[i];
    }
    for i in 0..LANES {
        of_d[i] += d[i] * d[i];
    }
    for i in 0..LANES {
        // Neighbours of few bits: their difference is exact.
        let lost = (r[i] - w[i]) - d[i];
        of_lost[i] += lost * lost;
    }
}

/// A row by lanes, and what is left over, with zeros.
#[inline(always)]
fn lanes(row: &[f32]) -> (&[[f32; LANES]], [f32; LANES]) {
    let (whole, rest) = row.as_chunks();
    let mut padded = [0.0; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    (whole, padded)
}

/// `out[o, j] = factor · Σ_k b[first + o, k] · a[k, j]`, k in order, fused.
#[inline(always)]
fn product(change: &Change, first: usize, columns: usize, tile: &mut Vec<f32>, out: &mut [f32]) {
    let Delta { a, b, rank, .. } = change.delta;
    let b = &b[first * rank..][..out.len() / columns * rank];
    for from in (0..columns).step_by(TILE[1]) {
        let width = TILE[1].min(columns - from);
        // The columns at hand, one below the other: beyond the last they are zero.
        tile.resize(rank * TILE[1], 0.0);
        if width < TILE[1] {
            tile.fill(0.0);
        }
        for (tile, a) in tile.as_chunks_mut().0.iter_mut().zip(a.chunks_exact(columns)) {
            let a = &a[from..from + width];
            match a.first_chunk::<{ TILE[1] }>() {
                Some(a) => *tile = *a,
                None => tile[..width].copy_from_slice(a),
            }
        }
        for (b, out) in b.chunks(TILE[0] * rank).zip(out.chunks_mut(TILE[0] * columns)) {
            let mut sums = [[0.0; TILE[1]]; TILE[0]];
            tile_product(b, tile, *rank, &mut sums);
            for (sums, out) in sums.iter().zip(out.chunks_exact_mut(columns)) {
                let out = &mut out[from..from + width];
                match out.first_chunk_mut::<{ TILE[1] }>() {
                    Some(out) => *out = sums.map(|sum| sum * change.factor),
                    None => {
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * change.factor)
                    }
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

/// Rounds to nearest, ties to even; what comes back of it in `back`.
#[inline(always)]
pub fn store(values: &[f32], dtype: Dtype, out: &mut [u8], back: &mut [f32]) {
    match dtype {
        Dtype::BF16 => {
            for ((x, out), back) in values.iter().zip(out.as_chunks_mut().0).zip(back) {
                let stored = bf16(*x);
                *out = stored.to_le_bytes();
                *back = f32::from_bits(u32::from(stored) << 16);
            }
        }
        Dtype::F16 => {
            for ((x, out), back) in values.iter().zip(out.as_chunks_mut().0).zip(back) {
                let stored = f16::from_f32(*x);
                *out = stored.to_le_bytes();
                *back = stored.to_f32();
            }
        }
        _ => {
            for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = x.to_le_bytes();
            }
            back.copy_from_slice(values);
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
