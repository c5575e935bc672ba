//! Blockwise quantisation as ONNX Runtime's `MatMulNBits` reads it, byte for byte as its own
//! quantiser writes it (onnxruntime/core/mlas/lib/q4_dq.cpp, symmetric).
//!
//! In f32 throughout, rounding half away from zero, multiplying by the reciprocal of the rounded
//! scale: any other order of operations gives other bytes.

use rayon::prelude::*;

/// A matrix \[N, K\] in blocks along K.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantised {
    /// \[N, ceil(K/block), block·bits/8\], low nibble first.
    pub data: Vec<u8>,
    /// \[N, ceil(K/block)\].
    pub scales: Vec<f32>,
}

/// Quantises `weights`, row-major \[N, K\], to `bits` (4 or 8) in blocks of `block`.
///
/// Symmetric: the scale maps the value of largest magnitude to −2^(bits−1), and zero lies at
/// 2^(bits−1).
pub fn symmetric(weights: &[f32], k: usize, bits: u32, block: usize) -> Quantised {
    debug_assert!(matches!(bits, 4 | 8) && block.is_multiple_of(8));
    let blocks = k.div_ceil(block);
    let width = block * bits as usize / 8;
    let n = weights.len() / k;
    let mut data = vec![0u8; n * blocks * width];
    let mut scales = vec![0f32; n * blocks];
    data.par_chunks_mut(blocks * width)
        .zip(scales.par_chunks_mut(blocks))
        .zip(weights.par_chunks(k))
        .for_each(|((data, scales), row)| {
            let rows = row.chunks(block).zip(data.chunks_mut(width)).zip(scales);
            for ((values, bytes), scale) in rows {
                *scale = block_of(values, bits, bytes);
            }
        });
    Quantised { data, scales }
}

/// Quantises one block into `bytes`, which are zero, and gives its scale.
fn block_of(values: &[f32], bits: u32, bytes: &mut [u8]) -> f32 {
    let middle = (1u32 << (bits - 1)) as f32;
    let top = ((1u32 << bits) - 1) as f32;
    let (mut least, mut most) = (f32::MAX, f32::MIN);
    for &value in values {
        least = least.min(value);
        most = most.max(value);
    }
    let largest = if most.abs() > least.abs() { most } else { least };
    let scale = largest / -middle;
    let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for (i, &value) in values.iter().enumerate() {
        let level = (value * reciprocal + middle).round().clamp(0.0, top) as u8;
        match bits {
            4 => bytes[i / 2] |= level << (4 * (i % 2)),
            _ => bytes[i] = level,
        }
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_value_keeps_its_place() {
        // -8 · s = 4 → s = -0.5; levels are w / s + 8.
        let q = symmetric(&[4.0, -3.5, 0.0, 1.0, 0.25, -0.25, 0.0, 0.0], 8, 4, 8);
        assert_eq!(q.scales, [-0.5]);
        assert_eq!(q.data, [0xf0, 0x68, 0x98, 0x88]);
    }

    #[test]
    fn a_short_last_block_is_padded_with_nothing() {
        let q = symmetric(&[1.0; 12], 12, 8, 8);
        assert_eq!(q.scales, [-1.0 / 128.0; 2]);
        assert_eq!(q.data, [[0u8; 8], [0, 0, 0, 0, 0, 0, 0, 0]].concat());
        let q = symmetric(&[0.0; 8], 8, 4, 8);
        assert_eq!((q.scales, q.data), (vec![0.0], vec![0x88; 4]));
    }

    #[test]
    fn no_value_is_further_off_than_half_a_step() {
        let values: Vec<f32> =
            (0..4096).map(|i| ((i * 2654435761u64) % 1999) as f32 - 999.0).collect();
        for bits in [4, 8] {
            let q = symmetric(&values, 64, bits, 32);
            for (i, value) in values.iter().enumerate() {
                let level: u8 = match bits {
                    4 => q.data[i / 2] >> (4 * (i % 2)) & 15,
                    _ => q.data[i],
                };
                let scale = q.scales[i / 32];
                let back = (f32::from(level) - (1 << (bits - 1)) as f32) * scale;
                // The value of the other sign may fall off the end by one step.
                let limit = if u32::from(level) == (1u32 << bits) - 1 { 1.0 } else { 0.5 };
                assert!((back - value).abs() <= limit * scale.abs() + 1e-3, "{value} → {back}");
            }
        }
    }
}
