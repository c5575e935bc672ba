//! A row of a tensor in the file's type: rounded once, from the checkpoint's own value.
//!
//! Knows nothing of files. A value that the type cannot hold is told, never written.

use half::{bf16, f16};

use crate::format::Type;

/// The values of one block of Q8_0, and the bytes that it takes: an f16 scale and 32 × i8.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = 34;

/// Why a row cannot be written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wrong {
    /// A NaN or an infinity in the checkpoint.
    NotFinite { column: usize, value: f32 },
    /// Beyond what the type holds.
    TooLarge { column: usize, value: f32 },
}

/// Encodes `row` as `kind` into `out`, which is [`Type::row_bytes`] long.
pub fn row(row: &[f32], kind: Type, out: &mut [u8]) -> Result<(), Wrong> {
    if !all_finite(row) {
        let column = row.iter().position(|x| !x.is_finite()).expect("one is not finite");
        return Err(Wrong::NotFinite { column, value: row[column] });
    }
    let limit = match kind {
        Type::F32 => f32::INFINITY,
        // Halfway between the largest f16 and what would come after it: from here it is infinity.
        Type::F16 => 65520.0,
        Type::BF16 => f32::from_bits(0x7F7F_8000),
        // The scale is an f16: amax / 127.
        Type::Q8_0 => 127.0 * 65504.0,
    };
    if limit < f32::INFINITY
        && let Some(column) = row.iter().position(|x| x.abs() >= limit)
    {
        return Err(Wrong::TooLarge { column, value: row[column] });
    }
    match kind {
        Type::F32 => {
            for (x, out) in row.iter().zip(out.chunks_exact_mut(4)) {
                out.copy_from_slice(&x.to_le_bytes());
            }
        }
        Type::F16 => {
            for (x, out) in row.iter().zip(out.chunks_exact_mut(2)) {
                out.copy_from_slice(&f16::from_f32(*x).to_le_bytes());
            }
        }
        Type::BF16 => {
            for (x, out) in row.iter().zip(out.chunks_exact_mut(2)) {
                out.copy_from_slice(&bf16::from_f32(*x).to_le_bytes());
            }
        }
        Type::Q8_0 => q8_0(row, out),
    }
    Ok(())
}

/// Without a branch in the loop, so that it is done many at a time.
fn all_finite(row: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    row.iter().fold(true, |finite, x| finite & (x.to_bits() & EXPONENT != EXPONENT))
}

/// ggml's `quantize_row_q8_0_ref`: d = max|x| / 127, rounding half away from zero.
fn q8_0(row: &[f32], out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just found.
        return unsafe { q8_0_avx2(row, out) };
    }
    q8_0_any(row, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn q8_0_avx2(row: &[f32], out: &mut [u8]) {
    q8_0_any(row, out);
}

/// The same operations in the same order on every machine: Rust never fuses or reorders them.
#[inline(always)]
fn q8_0_any(row: &[f32], out: &mut [u8]) {
    for (block, out) in row.as_chunks::<BLOCK>().0.iter().zip(out.chunks_exact_mut(BLOCK_BYTES)) {
        // Eight maxima side by side; the largest is the same in any order.
        let mut most = [0.0f32; 8];
        for eight in block.as_chunks::<8>().0 {
            for (most, x) in most.iter_mut().zip(eight) {
                let size = x.abs();
                *most = if size > *most { size } else { *most };
            }
        }
        let largest = most.iter().fold(0.0, |a: f32, b| if *b > a { *b } else { a });
        let scale = largest / 127.0;
        let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
        out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        for (x, out) in block.iter().zip(&mut out[2..]) {
            *out = round(x * inverse) as i8 as u8;
        }
    }
}

/// C's `roundf` for what fits an i32. Adding the number just below one half and cutting off is the
/// same, and has no branch.
#[inline(always)]
fn round(x: f32) -> i32 {
    const BELOW_HALF: f32 = 0.499_999_97;
    (x + BELOW_HALF.copysign(x)) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(values: &[f32], kind: Type) -> Result<Vec<u8>, Wrong> {
        let mut out = vec![0; kind.row_bytes(values.len())];
        row(values, kind, &mut out).map(|()| out)
    }

    /// Blocks whose scale is an exact power of two or zero, so that each level is known on paper.
    #[test]
    fn q8_0_is_what_paper_says() {
        let mut block = [0.0f32; 32];
        assert_eq!(encoded(&block, Type::Q8_0).unwrap(), [0; 34]);
        // d = 127 / 127 = 1: halves go away from zero.
        block[..9].copy_from_slice(&[127.0, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49, -126.5, 126.4]);
        let bytes = encoded(&block, Type::Q8_0).unwrap();
        assert_eq!(bytes[..2], [0x00, 0x3C]);
        let levels: Vec<i8> = bytes[2..].iter().map(|b| *b as i8).collect();
        assert_eq!(levels[..9], [127, 1, -1, 2, -2, 3, 0, -127, 126]);
        assert!(levels[9..].iter().all(|l| *l == 0));
        // d = 0.25, the largest is negative.
        block = [0.0; 32];
        block[30] = -31.75;
        block[31] = 10.0;
        let bytes = encoded(&block, Type::Q8_0).unwrap();
        assert_eq!(
            (bytes[..2].to_vec(), bytes[32] as i8, bytes[33] as i8),
            (vec![0, 0x34], -127, 40)
        );
    }

    /// Values in the first line, in the second the bytes that ggml's own quantiser made of them.
    #[test]
    fn q8_0_is_what_ggml_makes() {
        let values: Vec<f32> = include_str!("golden/q8_0.txt")
            .lines()
            .next()
            .unwrap()
            .split(' ')
            .map(|bits| f32::from_bits(u32::from_str_radix(bits, 16).unwrap()))
            .collect();
        let expected: Vec<u8> = include_str!("golden/q8_0.txt")
            .lines()
            .nth(1)
            .unwrap()
            .split(' ')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        assert_eq!(encoded(&values, Type::Q8_0).unwrap(), expected);
    }

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

    #[test]
    fn both_paths_are_the_same() {
        let values: Vec<f32> = (0..320).map(|i| ((i * i) as f32).sin() * 3.0).collect();
        let mut plain = vec![0; Type::Q8_0.row_bytes(values.len())];
        q8_0_any(&values, &mut plain);
        assert_eq!(encoded(&values, Type::Q8_0).unwrap(), plain);
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let with = |x: f32| [&[1.0; 31][..], &[x]].concat();
        for kind in [Type::F32, Type::F16, Type::BF16, Type::Q8_0] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let wrong = encoded(&with(bad), kind).unwrap_err();
                assert!(matches!(wrong, Wrong::NotFinite { column: 31, .. }), "{wrong:?}");
            }
        }
        assert!(encoded(&with(-65519.9), Type::F16).is_ok());
        assert_eq!(
            encoded(&with(-65520.0), Type::F16),
            Err(Wrong::TooLarge { column: 31, value: -65520.0 })
        );
        assert!(encoded(&with(f32::MAX), Type::F32).is_ok());
        assert!(encoded(&with(f32::MAX), Type::BF16).is_err());
        assert!(encoded(&with(9e6), Type::Q8_0).is_err());
    }
}
