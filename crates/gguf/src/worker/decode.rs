//! Rows of a file's type as numbers again, by the operations of ggml's `dequantize_row_*`
//! (ggml/src/ggml-quants.c).
//!
//! Knows nothing of files.

use half::{bf16, f16};

use crate::format::Type;

/// Decodes `bytes`, whole blocks of `kind`, into `out`, which has a place for each value.
pub fn rows(bytes: &[u8], kind: Type, out: &mut [f32]) {
    let (values, size) = kind.block();
    let blocks = bytes.chunks_exact(size).zip(out.chunks_exact_mut(values));
    match kind {
        Type::F32 => {
            blocks.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        Type::F16 => blocks.for_each(|(b, out)| out[0] = half(b, 0)),
        Type::BF16 => {
            blocks.for_each(|(b, out)| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32());
        }
        Type::Q8_0 => blocks.for_each(|(b, out)| {
            let scale = half(b, 0);
            each(out, |i| f32::from(b[2 + i] as i8) * scale);
        }),
        Type::Q4_0 => blocks.for_each(|(b, out)| {
            let (scale, low) = (half(b, 0), &b[2..18]);
            each(out, |i| f32::from(nibble(low, i) as i8 - 8) * scale);
        }),
        Type::Q5_0 => blocks.for_each(|(b, out)| {
            let (scale, high, low) = (half(b, 0), &b[2..6], &b[6..22]);
            each(out, |i| f32::from(five(low, high, i) as i8 - 16) * scale);
        }),
        Type::Q5_1 => blocks.for_each(|(b, out)| {
            let (scale, least, high, low) = (half(b, 0), half(b, 2), &b[4..8], &b[8..24]);
            each(out, |i| f32::from(five(low, high, i)) * scale + least);
        }),
        Type::Q4K => blocks.for_each(|(b, out)| {
            let levels = &b[16..144];
            affine(b, out, |part, i| levels[part / 2 * 32 + i] >> (4 * (part % 2)) & 15);
        }),
        Type::Q5K => blocks.for_each(|(b, out)| {
            let (high, levels) = (&b[16..48], &b[48..176]);
            let low = |part, i| levels[part / 2 * 32 + i] >> (4 * (part % 2)) & 15;
            affine(b, out, |part, i| low(part, i) | (high[i] >> part & 1) << 4);
        }),
        Type::Q6K => blocks.for_each(|(b, out)| {
            let (low, high, scales, scale) = (&b[..128], &b[128..192], &b[192..208], half(b, 208));
            // Each half of 128 is four quarters, which share bytes.
            each(out, |i| {
                let (half, quarter, at) = (i / 128, i / 32 % 4, i % 32);
                let low = low[half * 64 + quarter % 2 * 32 + at] >> (4 * (quarter / 2)) & 15;
                let high = high[half * 32 + at] >> (2 * quarter) & 3;
                let level = (low | high << 4) as i8 - 32;
                scale * f32::from(scales[i / 16] as i8) * f32::from(level)
            });
        }),
    }
}

fn each(out: &mut [f32], value: impl Fn(usize) -> f32) {
    out.iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The lower halves of all 16 bytes come before the upper ones.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i % 16] >> (4 * (i / 16)) & 15
}

fn five(low: &[u8], high: &[u8], i: usize) -> u8 {
    nibble(low, i) | (high[i / 8] >> (i % 8) & 1) << 4
}

/// Q4_K and Q5_K: eight parts of 32, each with a scale and a minimum in 6 bits (`get_scale_min_k4`).
fn affine(block: &[u8], out: &mut [f32], level: impl Fn(usize, usize) -> u8) {
    let (scale, least, packed) = (half(block, 0), half(block, 2), &block[4..16]);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (by, minimum) = match part {
            0..4 => (packed[part] & 63, packed[part + 4] & 63),
            _ => (
                packed[part + 4] & 15 | packed[part - 4] >> 6 << 4,
                packed[part + 4] >> 4 | packed[part] >> 6 << 4,
            ),
        };
        let (by, minimum) = (scale * f32::from(by), least * f32::from(minimum));
        each(out, |i| by * f32::from(level(part, i)) - minimum);
    }
}
