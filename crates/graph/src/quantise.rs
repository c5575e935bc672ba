//! Blockwise quantisation as ONNX Runtime's `MatMulNBits` reads it, byte for byte as its own
//! quantiser writes it (onnxruntime/core/mlas/lib/q4_dq.cpp).
//!
//! In f32 throughout, rounding half away from zero, multiplying by the reciprocal of the rounded
//! scale: any other order of operations gives other bytes.

use half::f16;

use crate::{Error, Options};

/// How often a scale is fitted to the levels that the one before gave.
const REFINED: usize = 4;

/// How a matrix \[N, K\] is quantised, in blocks along K.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// 4 or 8.
    pub bits: u32,
    /// Values that share a scale: a multiple of 8.
    pub block: usize,
    /// The scale maps the value of largest magnitude to −2^(bits−1), and zero lies at 2^(bits−1).
    /// Else least and most are mapped to the ends, and zero to the level nearest to it.
    pub symmetric: bool,
    /// Whether scales are f16.
    pub half_scales: bool,
    /// Of 4 bits: the range is the one of many that gives the smallest squared error.
    pub search: bool,
}

/// How the matrices of a model are quantised, where they are.
#[derive(Debug, Clone, Copy)]
pub struct Schemes {
    pub linear: Option<Scheme>,
    /// Of the embedding and the head.
    pub head: Option<Scheme>,
}

impl Schemes {
    /// For a model whose hidden size is `width`.
    pub fn new(width: usize, options: Options) -> Result<Self, Error> {
        let Options { dtype, quantisation, .. } = options;
        let scheme = |bits, block| Scheme {
            bits,
            block,
            symmetric: quantisation.symmetric,
            half_scales: dtype.is_half(),
            search: quantisation.search && bits == 4,
        };
        let Some(bits) = dtype.bits() else { return Ok(Self { linear: None, head: None }) };
        // The lookup wants rows of whole blocks.
        let block = [quantisation.block, 32].into_iter().find(|b| width.is_multiple_of(*b));
        let block = block.ok_or(Error::Width(width))?;
        Ok(Self {
            linear: Some(scheme(bits, quantisation.block)),
            head: Some(scheme(quantisation.head_bits, block)),
        })
    }
}

impl Scheme {
    /// Blocks in a row of `k` values.
    pub fn blocks(&self, k: usize) -> usize {
        k.div_ceil(self.block)
    }

    /// Bytes of a block's levels, low nibble first.
    pub fn width(&self) -> usize {
        self.block * self.bits as usize / 8
    }

    /// Bytes of the zero points of a row of `k` values, low nibble first.
    pub fn zeros_width(&self, k: usize) -> usize {
        (self.blocks(k) * self.bits as usize).div_ceil(8)
    }

    /// The level of zero where it is not said, and of what is past the last block.
    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    fn rounded(&self, scale: f32) -> f32 {
        if self.half_scales { f16::from_f32(scale).to_f32() } else { scale }
    }

    /// Quantises a row into its levels, a scale for each block, and zero points. A block that the
    /// row does not fill is filled with zero bytes. `importance` says how much an error in each value
    /// counts where a range is looked for; without it, all count the same.
    pub fn row(
        &self,
        values: &[f32],
        importance: Option<&[f32]>,
        levels: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [u8],
    ) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                // SAFETY: the features were just found.
                return unsafe { row_avx512(self, values, importance, levels, scales, zeros) };
            }
            if has!("avx2") {
                // SAFETY: the feature was just found.
                return unsafe { row_avx2(self, values, importance, levels, scales, zeros) };
            }
        }
        row_any(self, values, importance, levels, scales, zeros);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
fn row_avx512(
    scheme: &Scheme,
    values: &[f32],
    importance: Option<&[f32]>,
    levels: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [u8],
) {
    row_any(scheme, values, importance, levels, scales, zeros);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn row_avx2(
    scheme: &Scheme,
    values: &[f32],
    importance: Option<&[f32]>,
    levels: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [u8],
) {
    row_any(scheme, values, importance, levels, scales, zeros);
}

/// The same operations in the same order on every machine: Rust never fuses or reorders them.
#[inline(always)]
fn row_any(
    scheme: &Scheme,
    values: &[f32],
    importance: Option<&[f32]>,
    levels: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [u8],
) {
    zeros.fill(if scheme.bits == 4 { scheme.middle() * 0x11 } else { scheme.middle() });
    let blocks = values.chunks(scheme.block).zip(levels.chunks_exact_mut(scheme.width()));
    for (i, ((values, levels), scale)) in blocks.zip(scales).enumerate() {
        let importance = importance.map(|all| &all[i * scheme.block..][..values.len()]);
        let zero;
        (*scale, zero) = block(values, importance, scheme);
        let reciprocal = if *scale == 0.0 { 0.0 } else { 1.0 / *scale };
        if scheme.bits == 4 {
            let shift = 4 * (i % 2);
            zeros[i / 2] = zeros[i / 2] & !(15 << shift) | (zero as u8) << shift;
            fill::<4>(values, reciprocal, zero, levels);
        } else {
            zeros[i] = zero as u8;
            fill::<8>(values, reciprocal, zero, levels);
        }
    }
}

/// The scale of a block and the level of zero.
#[inline(always)]
pub fn block(values: &[f32], importance: Option<&[f32]>, scheme: &Scheme) -> (f32, f32) {
    let (exact, zero) = range(values, scheme);
    match scheme.rounded(exact) {
        scale if scheme.search && scale != 0.0 => search(values, importance, scheme, scale, zero),
        scale => (scale, zero),
    }
}

/// The scale of a block, before it is rounded, and the level of zero.
#[inline(always)]
fn range(values: &[f32], scheme: &Scheme) -> (f32, f32) {
    let (least, most) = extremes(values);
    let (middle, top) = (f32::from(scheme.middle()), ((1u32 << scheme.bits) - 1) as f32);
    if scheme.symmetric {
        let largest = if most.abs() > least.abs() { most } else { least };
        return (largest / -middle, middle);
    }
    let (least, most) = (least.min(0.0), most.max(0.0));
    let scale = (most - least) / top;
    let zero = if scale != 0.0 { 0.0 - least / scale } else { least };
    (scale, zero.round().clamp(0.0, top))
}

/// The scale and the zero of the smallest squared error: those given, or of narrower and wider ranges.
/// What is cut off at the ends may cost less than what finer levels gain. Of 4 bits.
#[inline(always)]
fn search(
    values: &[f32],
    importance: Option<&[f32]>,
    scheme: &Scheme,
    scale: f32,
    zero: f32,
) -> (f32, f32) {
    let error = |scale: f32, zero: f32| match importance {
        None => squared_error(values, scale, zero, |_| 1.0),
        Some(importance) => squared_error(values, scale, zero, |i| importance[i]),
    };
    let mut best = (scale, zero);
    let mut least = error(scale, zero);
    let mut consider = |exact: f32, zero: f32| {
        let scale = scheme.rounded(exact);
        if scale != 0.0 {
            let error = error(scale, zero);
            if error < least {
                (least, best) = (error, (scale, zero));
            }
        }
        best
    };
    if scheme.symmetric {
        // Either end may be the one with a level more.
        for step in 0..23 {
            let exact = scale * (0.6 + 0.025 * step as f32);
            consider(exact, zero);
            consider(-exact, zero);
        }
    } else {
        let (from, to) = extremes(values);
        let (from, to) = (from.min(0.0), to.max(0.0));
        for low in 0..8 {
            for high in 0..8 {
                let [from, to] =
                    [from * (0.7 + 0.05 * low as f32), to * (0.7 + 0.05 * high as f32)];
                let exact = (to - from) / 15.0;
                if exact != 0.0 {
                    consider(exact, (-from / exact).round().clamp(0.0, 15.0));
                }
            }
        }
    }
    let (mut scale, mut zero) = consider(0.0, 0.0);
    if let Some(importance) = importance {
        for _ in 0..REFINED {
            let fitted = fitted(values, importance, scale, zero);
            consider(fitted, zero);
            if !scheme.symmetric {
                consider(fitted, (zero - 1.0).max(0.0));
                consider(fitted, (zero + 1.0).min(15.0));
            }
            (scale, zero) = consider(0.0, 0.0);
        }
    }
    (scale, zero)
}

/// Of 4 bits, summed in eight lanes; `importance` of the value at a place.
#[inline(always)]
fn squared_error(values: &[f32], scale: f32, zero: f32, importance: impl Fn(usize) -> f32) -> f32 {
    let reciprocal = 1.0 / scale;
    let off = |value: f32| {
        let off = (f32::from(level::<4>(value, reciprocal, zero)) - zero) * scale - value;
        off * off
    };
    let mut sums = [0.0; 8];
    let (eights, rest) = values.as_chunks::<8>();
    for (i, eight) in eights.iter().enumerate() {
        for (lane, (sum, value)) in sums.iter_mut().zip(eight).enumerate() {
            *sum += off(*value) * importance(8 * i + lane);
        }
    }
    for (lane, (sum, value)) in sums.iter_mut().zip(rest).enumerate() {
        *sum += off(*value) * importance(8 * eights.len() + lane);
    }
    sums.iter().sum()
}

/// The scale of the smallest error for the levels that `scale` and `zero` give.
#[inline(always)]
fn fitted(values: &[f32], importance: &[f32], scale: f32, zero: f32) -> f32 {
    let reciprocal = 1.0 / scale;
    let (mut product, mut square) = (0.0f32, 0.0f32);
    for (value, importance) in values.iter().zip(importance) {
        let level = f32::from(level::<4>(*value, reciprocal, zero)) - zero;
        product += importance * value * level;
        square += importance * level * level;
    }
    if square > 0.0 { product / square } else { scale }
}

/// Least and most, of one value or more.
#[inline(always)]
fn extremes(values: &[f32]) -> (f32, f32) {
    // Integers in the order of the numbers: of those vectors find the ends at once.
    let flipped = |bits: i32| bits ^ (bits >> 31 & i32::MAX);
    let (mut least, mut most) = (i32::MAX, i32::MIN);
    for value in values {
        let key = flipped(value.to_bits() as i32);
        (least, most) = (least.min(key), most.max(key));
    }
    let [least, most] = [least, most].map(|key| f32::from_bits(flipped(key) as u32));
    // Of zeros with both signs, the first.
    if least == most { (values[0], values[0]) } else { (least, most) }
}

/// A block's levels into its bytes.
#[inline(always)]
fn fill<const BITS: u32>(values: &[f32], reciprocal: f32, zero: f32, bytes: &mut [u8]) {
    let width = 32 / (8 / BITS as usize);
    let (whole, rest) = values.as_chunks::<32>();
    let (bytes, end) = bytes.split_at_mut(whole.len() * width);
    for (values, bytes) in whole.iter().zip(bytes.chunks_exact_mut(width)) {
        pack::<BITS>(&levels::<BITS>(values, reciprocal, zero), bytes);
    }
    end.fill(0);
    if !rest.is_empty() {
        let mut padded = [0.0; 32];
        padded[..rest.len()].copy_from_slice(rest);
        let mut levels = levels::<BITS>(&padded, reciprocal, zero);
        levels[rest.len()..].fill(0);
        let width = width.min(end.len());
        pack::<BITS>(&levels, &mut end[..width]);
    }
}

#[inline(always)]
fn pack<const BITS: u32>(levels: &[u8; 32], bytes: &mut [u8]) {
    match BITS {
        4 => {
            for (byte, [low, high]) in bytes.iter_mut().zip(levels.as_chunks::<2>().0) {
                *byte = low | high << 4;
            }
        }
        _ => bytes.copy_from_slice(&levels[..bytes.len()]),
    }
}

#[inline(always)]
fn levels<const BITS: u32>(values: &[f32; 32], reciprocal: f32, zero: f32) -> [u8; 32] {
    // A loop and no `map`, which is not compiled into its caller.
    let mut levels = [0; 32];
    for (level_of, value) in levels.iter_mut().zip(values) {
        *level_of = level::<BITS>(*value, reciprocal, zero);
    }
    levels
}

/// C's `roundf` of value / scale + zero, held to the levels. Adding the number just below one half
/// and cutting off is the same for what is not negative, and has no branch.
#[inline(always)]
pub fn level<const BITS: u32>(value: f32, reciprocal: f32, zero: f32) -> u8 {
    const BELOW_HALF: f32 = 0.499_999_97;
    let top = ((1u32 << BITS) - 1) as f32;
    let level = value * reciprocal + zero;
    // One instruction each, which `max` and `min` are not: of NaN the first gives 0, too.
    let level = if level > 0.0 { level } else { 0.0 };
    let level = if level < top { level } else { top } + BELOW_HALF;
    // SAFETY: from 0 to 255.5. `as` would look at each value by itself.
    unsafe { level.to_int_unchecked::<i32>() as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Scheme =
        Scheme { bits: 4, block: 8, symmetric: true, half_scales: false, search: false };

    fn quantised(scheme: Scheme, row: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
        let blocks = scheme.blocks(row.len());
        let mut levels = vec![0xaa; blocks * scheme.width()];
        let (mut scales, mut zeros) = (vec![0.0; blocks], vec![0; scheme.zeros_width(row.len())]);
        scheme.row(row, None, &mut levels, &mut scales, &mut zeros);
        (levels, scales, zeros)
    }

    #[test]
    fn the_largest_value_keeps_its_place() {
        // -8 · s = 4 → s = -0.5; levels are w / s + 8.
        let (levels, scales, zeros) =
            quantised(PLAIN, &[4.0, -3.5, 0.0, 1.0, 0.25, -0.25, 0.0, 0.0]);
        assert_eq!(scales, [-0.5]);
        assert_eq!(levels, [0xf0, 0x68, 0x98, 0x88]);
        assert_eq!(zeros, [0x88]);
    }

    /// Of zeros with both signs, too: the scale has a sign.
    #[test]
    fn bytes_are_the_same_in_every_width() {
        let zero = |i: usize| if i.is_multiple_of(3) { 0.0 } else { -0.0 };
        let noise = |i: usize| if i < 140 { zero(i) } else { (i as f32 * 0.7).sin() };
        let row: Vec<f32> = (0..300).map(noise).collect();
        for (bits, block) in [(4, 32), (4, 128), (8, 32), (8, 128)] {
            for (symmetric, search) in [(true, false), (false, false), (true, true), (false, true)]
            {
                let scheme = Scheme {
                    bits,
                    block,
                    symmetric,
                    half_scales: true,
                    search: search && bits == 4,
                };
                let (levels, scales, zeros) = quantised(scheme, &row);
                let mut other = (vec![0; levels.len()], vec![0.0; scales.len()], zeros.clone());
                row_any(&scheme, &row, None, &mut other.0, &mut other.1, &mut other.2);
                assert_eq!((&levels, &zeros), (&other.0, &other.2), "{scheme:?}");
                let bits = |scales: &[f32]| scales.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&scales), bits(&other.1), "{scheme:?}");
            }
        }
        let scales = quantised(PLAIN, &[0.0, -0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0]).1;
        assert_eq!(scales[0].to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn a_short_last_block_is_padded_with_nothing() {
        let (levels, scales, _) = quantised(Scheme { bits: 8, ..PLAIN }, &[1.0; 12]);
        assert_eq!(scales, [-1.0 / 128.0; 2]);
        assert_eq!(levels, [0; 16]);
        let (levels, scales, _) = quantised(PLAIN, &[0.0; 8]);
        assert_eq!((scales, levels), (vec![0.0], vec![0x88; 4]));
        let (levels, ..) = quantised(Scheme { block: 128, ..PLAIN }, &[0.0; 35]);
        assert_eq!(levels, [&[0x88; 17][..], &[0x08], &[0; 46]].concat());
    }

    /// What ONNX Runtime's own quantiser makes of the same values: golden/make.py.
    #[test]
    fn bytes_are_those_of_onnx_runtime() {
        let golden = include_str!("golden/quantised.txt");
        let mut lines = golden.lines().filter(|line| !line.starts_with('#'));
        let numbers = |text: &str| -> Vec<u32> {
            text.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap()).collect()
        };
        let bytes = |text: &str| -> Vec<u8> { numbers(text).iter().map(|b| *b as u8).collect() };
        let values: Vec<f32> =
            numbers(lines.next().unwrap()).iter().map(|bits| f32::from_bits(*bits)).collect();
        let mut cases = 0;
        while let Some(head) = lines.next() {
            let head: Vec<usize> = head.split(' ').map(|word| word.parse().unwrap()).collect();
            let [bits, block, symmetric, half, k] = head[..] else { panic!("{head:?}") };
            let scheme = Scheme {
                bits: bits as u32,
                block,
                symmetric: symmetric == 1,
                half_scales: half == 1,
                search: false,
            };
            let rows = values.chunks_exact(k).map(|row| quantised(scheme, row));
            let (mut levels, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
            for row in rows {
                levels.extend(row.0);
                scales.extend(row.1.iter().map(|scale| scale.to_bits()));
                zeros.extend(row.2);
            }
            assert_eq!(levels, bytes(lines.next().unwrap()), "{scheme:?} {k}");
            assert_eq!(scales, numbers(lines.next().unwrap()), "{scheme:?} {k}");
            let expected = bytes(lines.next().unwrap());
            if !scheme.symmetric {
                assert_eq!(zeros, expected, "{scheme:?} {k}");
            }
            cases += 1;
        }
        assert_eq!(cases, 16);
    }

    #[test]
    fn both_paths_are_the_same() {
        let values: Vec<f32> = (0..357).map(|i| ((i * i) as f32).sin() * 3.0).collect();
        for (bits, block, symmetric, search) in [
            (4, 32, true, false),
            (4, 128, false, false),
            (8, 32, false, false),
            (4, 32, true, true),
            (4, 128, false, true),
        ] {
            let scheme = Scheme { bits, block, symmetric, half_scales: false, search };
            let blocks = scheme.blocks(values.len());
            let mut levels = vec![0; blocks * scheme.width()];
            let (mut scales, mut zeros) = (vec![0.0; blocks], vec![0; scheme.zeros_width(357)]);
            row_any(&scheme, &values, None, &mut levels, &mut scales, &mut zeros);
            assert_eq!(quantised(scheme, &values), (levels, scales, zeros));
        }
    }

    /// Each block, and not only their sum; and of half scales, too.
    #[test]
    fn a_search_never_loses() {
        let mut better = 0;
        for (block, symmetric, half_scales) in
            [(32, true, false), (32, false, true), (128, true, true)]
        {
            let nearest = Scheme { bits: 4, block, symmetric, half_scales, search: false };
            for i in 0..50 {
                let row: Vec<f32> =
                    (0..block).map(|j| ((i * block + j * j) as f32).sin().powi(3)).collect();
                let error = |scheme: Scheme| -> f32 {
                    let mut rounded = row.clone();
                    scheme.round(None, block, &mut rounded);
                    rounded.iter().zip(&row).map(|(a, b)| (a - b).powi(2)).sum()
                };
                let [before, after] = [nearest, Scheme { search: true, ..nearest }].map(error);
                assert!(after <= before * 1.000_01, "{nearest:?}: {after} of {before}");
                better += usize::from(after < before * 0.95);
            }
        }
        assert!(better > 75, "{better}");
        let zeros = Scheme { search: true, ..PLAIN };
        assert_eq!(quantised(zeros, &[0.0; 8]), quantised(PLAIN, &[0.0; 8]));
    }

    #[test]
    fn rounding_is_that_of_c() {
        for half in 0..=510 {
            let x = half as f32 / 2.0;
            for x in [x.next_down().next_down(), x.next_down(), x, x.next_up()] {
                assert_eq!(level::<8>(x, 1.0, 0.0), x.round().clamp(0.0, 255.0) as u8, "{x:e}");
            }
        }
    }
}
