//! Blocks of 256 values whose parts have scales of their own: Q4_K, Q5_K, Q6_K.
//!
//! The levels of a part are found by trial: about twenty scales, the least error wins. A trial's sums
//! are taken value after value, so that vectors can't help within a part; but they can with `N` parts
//! side by side, a value of each at a time.
//!
//! Once its scale was rounded to what the file can hold, a part's levels are computed anew. Where it
//! became zero, the levels of the trial that won are kept: ggml has it so, and so the bytes do.

use half::f16;

use super::{Encoder, WHOLE, integer};
use crate::format::Type;

/// Values of a block.
const BLOCK: usize = 256;

/// Q4_K and Q5_K: eight parts of 32, x ≈ scale · level − least, with levels of `BITS` bits.
pub struct Affine<const BITS: u32>;
/// Q6_K: sixteen parts of 16, x ≈ scale · level.
pub struct Symmetric;

impl Encoder for Affine<4> {
    const BLOCK: (usize, usize) = Type::Q4K.block();
    const SCALES: &[usize] = &[0, 2];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        affine::<4, 144, N>(values, out);
    }
}

impl Encoder for Affine<5> {
    const BLOCK: (usize, usize) = Type::Q5K.block();
    const SCALES: &[usize] = &[0, 2];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        affine::<5, 176, N>(values, out);
    }
}

impl Encoder for Symmetric {
    const BLOCK: (usize, usize) = Type::Q6K.block();
    const SCALES: &[usize] = &[208];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        let (values, out) = (values.as_chunks().0, out.as_chunks_mut().0);
        let at_a_time = (N / 16).max(1);
        let whole = values.len() / at_a_time * at_a_time;
        let (values, rest) = values.split_at(whole);
        let (out, rest_out) = out.split_at_mut(whole);
        for (values, out) in values.chunks_exact(at_a_time).zip(out.chunks_exact_mut(at_a_time)) {
            // Fewer numbers than a block has parts would leave it in pieces.
            if N > 16 { symmetric::<N>(values, out) } else { symmetric::<16>(values, out) }
        }
        for (values, out) in rest.iter().zip(rest_out) {
            symmetric::<16>(std::slice::from_ref(values), std::slice::from_mut(out));
        }
    }
}

#[inline(always)]
fn affine<const BITS: u32, const BYTES: usize, const N: usize>(values: &[f32], out: &mut [u8]) {
    let (values, out) = (values.as_chunks().0, out.as_chunks_mut::<BYTES>().0);
    let at_a_time = N / 8;
    let whole = values.len() / at_a_time * at_a_time;
    let (values, rest) = values.split_at(whole);
    let (out, rest_out) = out.split_at_mut(whole);
    for (values, out) in values.chunks_exact(at_a_time).zip(out.chunks_exact_mut(at_a_time)) {
        let found = search::<BITS, N>(&side_by_side(values));
        for (at, (values, out)) in values.iter().zip(out).enumerate() {
            pack_affine::<BITS, N>(values, &found, at * 8, out);
        }
    }
    for (values, out) in rest.iter().zip(rest_out) {
        let found = search::<BITS, 8>(&side_by_side(std::slice::from_ref(values)));
        pack_affine::<BITS, 8>(values, &found, 0, out);
    }
}

/// `[i][n]`: value `i` of part `n`. Blocks hold `N` parts of `LEN` values.
#[inline(always)]
fn side_by_side<const LEN: usize, const N: usize>(blocks: &[[f32; BLOCK]]) -> [[f32; N]; LEN] {
    let mut x = [[0.0; N]; LEN];
    for (n, part) in blocks.as_flattened().as_chunks::<LEN>().0.iter().enumerate() {
        for i in 0..LEN {
            x[i][n] = part[i];
        }
    }
    x
}

/// What the trials of an affine part came to.
struct Found<const N: usize> {
    scale: [f32; N],
    least: [f32; N],
    /// Level of x in the trial that won: (x − base) · inverse.
    base: [f32; N],
    inverse: [f32; N],
}

/// `make_qkx2_quants` of ggml, for `N` parts.
#[inline(always)]
fn search<const BITS: u32, const N: usize>(x: &[[f32; N]; 32]) -> Found<N> {
    let most = ((1 << BITS) - 1) as f32;
    let (first, trials) = if BITS == 4 { (-1.0f32, 21) } else { (-0.5, 16) };

    let mut weights = [[0.0; N]; 32];
    let mut squares = [0.0; N];
    for x in x {
        for n in 0..N {
            squares[n] += x[n] * x[n];
        }
    }
    let means = squares.map(|sum| (sum / 32.0).sqrt());
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum, mut sum_x) = ([0.0; N], [0.0; N]);
    for n in 0..N {
        sum[n] = means[n] + x[0][n].abs();
        sum_x[n] = sum[n] * x[0][n];
    }
    weights[0] = sum;
    for (x, weights) in x.iter().zip(&mut weights).skip(1) {
        for n in 0..N {
            let w = means[n] + x[n].abs();
            min[n] = if x[n] < min[n] { x[n] } else { min[n] };
            max[n] = if x[n] > max[n] { x[n] } else { max[n] };
            sum[n] += w;
            sum_x[n] += w * x[n];
            weights[n] = w;
        }
    }
    let mut constant = [false; N];
    let (mut scale, mut inverse, mut error) = ([0.0; N], [0.0; N], [0.0; N]);
    for n in 0..N {
        min[n] = if min[n] > 0.0 { 0.0 } else { min[n] };
        constant[n] = max[n] == min[n];
        inverse[n] = most / (max[n] - min[n]);
        scale[n] = 1.0 / inverse[n];
    }
    let (mut base, start) = (min, min);
    for (x, w) in x.iter().zip(&weights) {
        for n in 0..N {
            let level = nearest(inverse[n] * (x[n] - min[n])).clamp(0.0, most);
            let off = scale[n] * level + min[n] - x[n];
            error[n] += w[n] * (off * off);
        }
    }

    let mut levels = [[0.0; N]; 32];
    for trial in 0..trials {
        let reach = first + 0.1 * trial as f32 + most;
        let (mut tried, mut sum_l, mut sum_ll, mut sum_xl) =
            ([0.0; N], [0.0; N], [0.0; N], [0.0; N]);
        for n in 0..N {
            tried[n] = reach / (max[n] - min[n]);
        }
        for ((x, w), levels) in x.iter().zip(&weights).zip(&mut levels) {
            for n in 0..N {
                let level = nearest(tried[n] * (x[n] - min[n])).clamp(0.0, most);
                levels[n] = level;
                let weighted = w[n] * level;
                sum_l[n] += weighted;
                sum_ll[n] += weighted * level;
                sum_xl[n] += weighted * x[n];
            }
        }
        // The scale and the minimum of the least squares.
        let (mut solved, mut by, mut from) = ([false; N], [0.0; N], [0.0; N]);
        for n in 0..N {
            let determinant = sum[n] * sum_ll[n] - sum_l[n] * sum_l[n];
            solved[n] = determinant > 0.0;
            let both = (sum[n] * sum_xl[n] - sum_x[n] * sum_l[n]) / determinant;
            let least = (sum_ll[n] * sum_x[n] - sum_l[n] * sum_xl[n]) / determinant;
            let alone = sum_xl[n] / sum_ll[n];
            by[n] = if least > 0.0 { alone } else { both };
            from[n] = if least > 0.0 { 0.0 } else { least };
        }
        let mut errors = [0.0; N];
        for ((x, w), levels) in x.iter().zip(&weights).zip(&levels) {
            for n in 0..N {
                let off = by[n] * levels[n] + from[n] - x[n];
                errors[n] += w[n] * (off * off);
            }
        }
        let mut wins = [0; N];
        for n in 0..N {
            wins[n] = mask(solved[n] & (errors[n] < error[n]));
        }
        for n in 0..N {
            error[n] = chosen(wins[n], errors[n], error[n]);
            scale[n] = chosen(wins[n], by[n], scale[n]);
            inverse[n] = chosen(wins[n], tried[n], inverse[n]);
            base[n] = chosen(wins[n], min[n], base[n]);
            // The next trial goes on from here, as in ggml.
            min[n] = chosen(wins[n], from[n], min[n]);
        }
    }
    let mut least = [0.0; N];
    for n in 0..N {
        scale[n] = if constant[n] { 0.0 } else { scale[n] };
        inverse[n] = if constant[n] { 0.0 } else { inverse[n] };
        least[n] = if constant[n] { -start[n] } else { -min[n] };
    }
    Found { scale, least, base, inverse }
}

/// A block of Q4_K or Q5_K, whose parts are those from `at` on.
#[inline(always)]
fn pack_affine<const BITS: u32, const N: usize>(
    values: &[f32; BLOCK],
    found: &Found<N>,
    at: usize,
    out: &mut [u8],
) {
    let largest = |parts: &[f32]| parts.iter().fold(0.0, |a, b| if *b > a { *b } else { a });
    let (scales, leasts) = (&found.scale[at..at + 8], &found.least[at..at + 8]);
    let (scale, least) = (largest(scales) / 63.0, largest(leasts) / 63.0);
    let (scale, least) = (f16::from_f32(scale), f16::from_f32(least));
    out[..2].copy_from_slice(&scale.to_le_bytes());
    out[2..4].copy_from_slice(&least.to_le_bytes());

    // Six bits for each; of the last four parts, two bits lie with the first four.
    let six_bits = |parts: &[f32]| {
        let largest = largest(parts);
        let inverse = if largest > 0.0 { 63.0 / largest } else { 0.0 };
        let mut six = [0; 8];
        for (six, part) in six.iter_mut().zip(parts) {
            // The lowest byte, as C has it: a scale below zero is cut to 63.
            *six = (integer(inverse * part) as u8).min(63);
        }
        six
    };
    let (six_scales, six_leasts) = (six_bits(scales), six_bits(leasts));
    for i in 0..4 {
        let (low, high) = ((six_scales[i], six_leasts[i]), (six_scales[i + 4], six_leasts[i + 4]));
        out[4 + i] = low.0 | high.0 >> 4 << 6;
        out[8 + i] = low.1 | high.1 >> 4 << 6;
        out[12 + i] = high.0 & 15 | (high.1 & 15) << 4;
    }

    let most = (1 << BITS) - 1;
    let mut levels = [[0; 32]; 8];
    for (part, (levels, x)) in levels.iter_mut().zip(values.as_chunks::<32>().0).enumerate() {
        let by = scale.to_f32() * f32::from(six_scales[part]);
        let least = least.to_f32() * f32::from(six_leasts[part]);
        if by == 0.0 {
            let (base, inverse) = (found.base[at + part], found.inverse[at + part]);
            for (level, x) in levels.iter_mut().zip(x) {
                *level = integer(inverse * (x - base)).clamp(0, most) as u8;
            }
        } else {
            for (level, x) in levels.iter_mut().zip(x) {
                *level = integer((x + least) / by).clamp(0, most) as u8;
            }
        }
    }
    let (high, low) = out[16..].split_at_mut(if BITS == 5 { 32 } else { 0 });
    for (pair, out) in levels.as_chunks::<2>().0.iter().zip(low.as_chunks_mut::<32>().0) {
        for i in 0..32 {
            out[i] = pair[0][i] & 15 | pair[1][i] << 4;
        }
    }
    for (i, high) in high.iter_mut().enumerate() {
        *high = 0;
        for (part, levels) in levels.iter().enumerate() {
            *high |= (levels[i] >> 4) << part;
        }
    }
}

/// Blocks of Q6_K, sixteen parts each, with `make_qx_quants` of ggml for `N` parts.
#[inline(always)]
fn symmetric<const N: usize>(values: &[[f32; BLOCK]], out: &mut [[u8; 210]]) {
    let x: [[f32; N]; 16] = side_by_side(values);
    let (mut outermost, mut largest) = ([0.0f32; N], [0.0f32; N]);
    let (mut weights, mut cubes) = ([[0.0; N]; 16], [[0.0; N]; 16]);
    for ((x, weights), cubes) in x.iter().zip(&mut weights).zip(&mut cubes) {
        for n in 0..N {
            let further = mask(x[n].abs() > largest[n]);
            largest[n] = chosen(further, x[n].abs(), largest[n]);
            outermost[n] = chosen(further, x[n], outermost[n]);
            weights[n] = x[n] * x[n];
            cubes[n] = weights[n] * x[n];
        }
    }
    let (mut scale, mut inverse, mut best) = ([0.0; N], [0.0; N], [0.0; N]);
    for trial in [0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let reach = -(32.0 + 0.1 * trial as f32);
        let (mut tried, mut sum_xl, mut sum_ll) = ([0.0; N], [0.0; N], [0.0; N]);
        for n in 0..N {
            tried[n] = reach / outermost[n];
        }
        for ((x, weights), cubes) in x.iter().zip(&weights).zip(&cubes) {
            for n in 0..N {
                let level = nearest(tried[n] * x[n]).clamp(-32.0, 31.0);
                sum_xl[n] += cubes[n] * level;
                sum_ll[n] += weights[n] * level * level;
            }
        }
        for n in 0..N {
            let by = sum_xl[n] / sum_ll[n];
            let better = sum_xl[n] * sum_xl[n] > best[n] * sum_ll[n];
            let solved = if trial == 0 { sum_ll[n] != 0.0 } else { (sum_ll[n] > 0.0) & better };
            let (solved, first) = (mask(solved), mask(trial == 0));
            scale[n] = chosen(solved, by, scale[n]);
            best[n] = chosen(solved, by * sum_xl[n], best[n]);
            inverse[n] = chosen(solved | first, tried[n], inverse[n]);
        }
    }
    let mut empty = [false; N];
    for n in 0..N {
        empty[n] = largest[n] < EPSILON;
        scale[n] = if empty[n] { 0.0 } else { scale[n] };
    }
    for (at, (values, out)) in values.iter().zip(out).enumerate() {
        let parts = at * 16..(at + 1) * 16;
        pack_symmetric(values, &scale[parts.clone()], &inverse[parts.clone()], &empty[parts], out);
    }
}

/// A part without a value of this size counts as zero.
const EPSILON: f32 = 1e-15;

/// A block of Q6_K from the scales of its parts.
#[inline(always)]
fn pack_symmetric(
    values: &[f32; BLOCK],
    scales: &[f32],
    inverses: &[f32],
    empty: &[bool],
    out: &mut [u8; 210],
) {
    let (mut outermost, mut largest) = (0.0, 0.0);
    for scale in scales {
        if scale.abs() > largest {
            (outermost, largest) = (*scale, scale.abs());
        }
    }
    if largest < EPSILON {
        *out = [0; 210];
        return;
    }
    let inverse = -128.0 / outermost;
    let scale = f16::from_f32(1.0 / inverse);
    out[208..].copy_from_slice(&scale.to_le_bytes());
    let mut levels = [0; BLOCK];
    let parts = levels.as_chunks_mut::<16>().0.iter_mut().zip(values.as_chunks::<16>().0);
    for (part, (levels, x)) in parts.enumerate() {
        let eight = integer(inverse * scales[part]).min(127) as i8;
        out[192 + part] = eight as u8;
        let by = scale.to_f32() * f32::from(eight);
        if by != 0.0 {
            for (level, x) in levels.iter_mut().zip(x) {
                *level = (integer(x / by).clamp(-32, 31) + 32) as u8;
            }
        } else if !empty[part] {
            for (level, x) in levels.iter_mut().zip(x) {
                *level = (integer(inverses[part] * x).clamp(-32, 31) + 32) as u8;
            }
        }
    }
    // Each half of 128 is four quarters, which share bytes.
    for (half, levels) in levels.as_chunks::<128>().0.iter().enumerate() {
        for i in 0..32 {
            let [a, b, c, d] = [levels[i], levels[i + 32], levels[i + 64], levels[i + 96]];
            out[64 * half + i] = a & 15 | c << 4;
            out[64 * half + 32 + i] = b & 15 | d << 4;
            out[128 + 32 * half + i] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
}

/// All bits or none.
#[inline(always)]
fn mask(yes: bool) -> u32 {
    u32::from(yes).wrapping_neg()
}

/// `a` where the mask says so, else `b`: bit by bit, as of an `if` the compiler makes a jump, and
/// no vector has one.
#[inline(always)]
fn chosen(mask: u32, a: f32, b: f32) -> f32 {
    f32::from_bits(a.to_bits() & mask | b.to_bits() & !mask)
}

/// The nearest whole number.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    x + WHOLE - WHOLE
}
