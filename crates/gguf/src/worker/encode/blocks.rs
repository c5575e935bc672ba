//! Blocks of 32 values: Q4_0, Q5_0, Q8_0 with a scale, Q5_1 with a scale and a minimum.
//!
//! Knows nothing of vectors: the loops have no branches, so the compiler makes them.

use half::f16;

use super::{Encoder, integer};
use crate::format::Type;

pub struct Q4_0;
pub struct Q5_0;
pub struct Q5_1;
pub struct Q8_0;

impl Encoder for Q4_0 {
    const BLOCK: (usize, usize) = Type::Q4_0.block();
    const SCALES: &[usize] = &[0];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (block, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut::<18>().0) {
            let scale = outermost(block) / -8.0;
            let inverse = inverse(scale);
            out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            for i in 0..16 {
                let level = |x: f32| cut(x * inverse + 8.5).min(15) as u8;
                out[2 + i] = level(block[i]) | level(block[i + 16]) << 4;
            }
        }
    }
}

impl Encoder for Q5_0 {
    const BLOCK: (usize, usize) = Type::Q5_0.block();
    const SCALES: &[usize] = &[0];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (block, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut::<22>().0) {
            let scale = outermost(block) / -16.0;
            let inverse = inverse(scale);
            out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            let mut levels = [0; 32];
            for (level, x) in levels.iter_mut().zip(block) {
                *level = cut(x * inverse + 16.5).min(31) as u8;
            }
            five_bits(&levels, &mut out[2..]);
        }
    }
}

impl Encoder for Q5_1 {
    const BLOCK: (usize, usize) = Type::Q5_1.block();
    const SCALES: &[usize] = &[0, 2];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (block, out) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<24>().0) {
            let (mut min, mut max) = (f32::MAX, -f32::MAX);
            for x in block {
                min = if *x < min { *x } else { min };
                max = if *x > max { *x } else { max };
            }
            let scale = (max - min) / 31.0;
            let inverse = inverse(scale);
            out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            out[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
            let mut levels = [0; 32];
            for (level, x) in levels.iter_mut().zip(block) {
                *level = cut((x - min) * inverse + 0.5) as u8;
            }
            five_bits(&levels, &mut out[4..]);
        }
    }
}

impl Encoder for Q8_0 {
    const BLOCK: (usize, usize) = Type::Q8_0.block();
    const SCALES: &[usize] = &[0];

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (block, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut::<34>().0) {
            let scale = largest(block) / 127.0;
            let inverse = inverse(scale);
            out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            for (x, out) in block.iter().zip(&mut out[2..]) {
                *out = round(x * inverse) as u8;
            }
        }
    }
}

/// The fifth bits of all levels, then the lower four, two to a byte.
#[inline(always)]
fn five_bits(levels: &[u8; 32], out: &mut [u8]) {
    for (eight, out) in levels.as_chunks::<8>().0.iter().zip(&mut out[..4]) {
        // The product brings bit 4 of byte i to bit i of the highest byte.
        let fifths = u64::from_le_bytes(*eight) >> 4 & 0x0101_0101_0101_0101;
        *out = (fifths.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
    for i in 0..16 {
        out[4 + i] = levels[i] & 15 | levels[i + 16] << 4;
    }
}

/// How far from zero the furthest is. Numbers without a sign are in the order of their bits, whose
/// maximum vectors find at once.
#[inline(always)]
fn largest(block: &[f32; 32]) -> f32 {
    f32::from_bits(block.iter().fold(0, |most, x| x.abs().to_bits().max(most)))
}

/// The first of those that are furthest from zero, with its sign; zeros have none.
#[inline(always)]
fn outermost(block: &[f32; 32]) -> f32 {
    // As integers, bits with a sign are below zero.
    let above = block.iter().fold(0, |most, x| (x.to_bits() as i32).max(most));
    let below = block.iter().fold(0, |most, x| ((-x).to_bits() as i32).max(most));
    let [most, least] = [above, below].map(|bits| f32::from_bits(bits as u32));
    if above != below {
        return if above > below { most } else { -least };
    }
    let first = block.iter().find(|x| x.abs() == most);
    if most > 0.0 { *first.unwrap_or(&most) } else { 0.0 }
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale != 0.0 { 1.0 / scale } else { 0.0 }
}

/// C's cast to an integer. Under a scale whose inverse is an infinity nothing fits one; the lowest byte
/// is then zero here as in ggml.
#[inline(always)]
fn cut(x: f32) -> i32 {
    integer(x.trunc())
}

/// C's `roundf` and [`cut`]. Adding the number just below one half and cutting off is the same, and
/// has no branch.
#[inline(always)]
fn round(x: f32) -> i32 {
    const BELOW_HALF: f32 = 0.499_999_97;
    cut(x + BELOW_HALF.copysign(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_c() {
        // Every value near a multiple of a half, and a walk through the rest.
        for half in -256..=256 {
            let x = half as f32 / 2.0;
            for x in
                [x.next_down().next_down(), x.next_down(), x, x.next_up(), x.next_up().next_up()]
            {
                assert_eq!(round(x), x.round() as i32, "{x:e}");
            }
        }
        for bits in (0..0x4300_0000u32).step_by(997) {
            let x = f32::from_bits(bits);
            assert_eq!((round(x), round(-x)), (x.round() as i32, -x.round() as i32), "{x:e}");
        }
    }
}
