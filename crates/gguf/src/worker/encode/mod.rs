//! Rows of a tensor in the file's type: rounded once, from the checkpoint's own values.
//!
//! Knows nothing of files. A value that the type cannot hold is told, never written. The bytes are
//! those of ggml's `quantize_row_*_ref` (ggml/src/ggml-quants.c), which take sums value after value
//! and fuse nothing. Neither does what stands here: it works on many blocks side by side instead, and
//! its bytes are the same on every machine.

mod blocks;
mod k;
#[cfg(test)]
mod tests;

use half::{bf16, f16};

use crate::format::Type;

/// Why values cannot be written; `at` counts from the first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wrong {
    /// A NaN or an infinity in the checkpoint.
    NotFinite { at: usize, value: f32 },
    /// Beyond what the type holds.
    TooLarge { at: usize, value: f32 },
}

/// Encodes `values`, whole rows, as `kind` into `out`, as long as [`Type::row_bytes`] says.
pub fn rows(values: &[f32], kind: Type, out: &mut [u8]) -> Result<(), Wrong> {
    match kind {
        Type::F32 => checked::<F32>(values, out),
        Type::F16 => checked::<F16>(values, out),
        Type::BF16 => checked::<BF16>(values, out),
        Type::Q4_0 => checked::<blocks::Q4_0>(values, out),
        Type::Q5_0 => checked::<blocks::Q5_0>(values, out),
        Type::Q5_1 => checked::<blocks::Q5_1>(values, out),
        Type::Q8_0 => checked::<blocks::Q8_0>(values, out),
        Type::Q4K => checked::<k::Affine<4>>(values, out),
        Type::Q5K => checked::<k::Affine<5>>(values, out),
        Type::Q6K => checked::<k::Symmetric>(values, out),
    }
}

/// A type's bytes.
trait Encoder {
    /// Values and bytes of a block.
    const BLOCK: (usize, usize);
    /// Where in a block its scales lie, as f16.
    const SCALES: &[usize];
    /// From here on the type cannot hold a value, in whatever block.
    const LIMIT: f32 = (1 << 30) as f32;

    /// Values below the limit; a scale may come out as an infinity. `N`: numbers side by side.
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]);
}

fn checked<E: Encoder>(values: &[f32], out: &mut [u8]) -> Result<(), Wrong> {
    if !encoded::<E>(values, out) {
        let beyond = |x: &f32| x.is_nan() || x.abs() >= E::LIMIT;
        let at = values.iter().position(beyond).expect("one is beyond the limit");
        let value = values[at];
        return Err(match value.is_finite() {
            true => Wrong::TooLarge { at, value },
            false => Wrong::NotFinite { at, value },
        });
    }
    // As ggml does it: which values are too large depends on the others, a scale says so at once.
    let (len, bytes) = E::BLOCK;
    for &scale in E::SCALES {
        let infinite = |block: &[u8]| block[scale + 1] & 0x7C == 0x7C;
        if let Some(block) = out.chunks_exact(bytes).position(infinite) {
            let largest = (block * len..(block + 1) * len)
                .max_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()));
            let at = largest.expect("a block has values");
            return Err(Wrong::TooLarge { at, value: values[at] });
        }
    }
    Ok(())
}

/// Encodes, unless a value is beyond the limit: with the widest vectors that this machine has.
fn encoded<E: Encoder>(values: &[f32], out: &mut [u8]) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
            // SAFETY: the features were just found.
            return unsafe { with_avx512::<E>(values, out) };
        }
        if has!("avx2") {
            // SAFETY: the feature was just found.
            return unsafe { with_avx2::<E>(values, out) };
        }
    }
    any::<E, 8>(values, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
fn with_avx512<E: Encoder>(values: &[f32], out: &mut [u8]) -> bool {
    any::<E, 32>(values, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<E: Encoder>(values: &[f32], out: &mut [u8]) -> bool {
    any::<E, 8>(values, out)
}

#[inline(always)]
fn any<E: Encoder, const N: usize>(values: &[f32], out: &mut [u8]) -> bool {
    // As bits, NaN comes after infinity and infinity after every number.
    let mut largest = 0;
    for x in values {
        largest = largest.max(x.abs().to_bits());
    }
    let holds = largest < E::LIMIT.to_bits();
    if holds {
        E::encode::<N>(values, out);
    }
    holds
}

/// From here on an f32 has no fraction: adding it rounds, to even where there is a choice.
const WHOLE: f32 = 12_582_912.0;

/// ggml's `nearest_int`: the nearest whole number, and for what is none a multiple of 256. Unlike
/// Rust's cast it is done many at a time.
#[inline(always)]
fn integer(x: f32) -> i32 {
    ((x + WHOLE).to_bits() & 0x007F_FFFF) as i32 - 0x0040_0000
}

struct F32;
struct F16;
struct BF16;

impl Encoder for F32 {
    const BLOCK: (usize, usize) = Type::F32.block();
    const SCALES: &[usize] = &[];
    const LIMIT: f32 = f32::INFINITY;

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
            *out = x.to_le_bytes();
        }
    }
}

impl Encoder for F16 {
    const BLOCK: (usize, usize) = Type::F16.block();
    const SCALES: &[usize] = &[];
    /// Halfway between the largest f16 and what would come after it: from here it is infinity.
    const LIMIT: f32 = 65520.0;

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
            *out = f16::from_f32(*x).to_le_bytes();
        }
    }
}

impl Encoder for BF16 {
    const BLOCK: (usize, usize) = Type::BF16.block();
    const SCALES: &[usize] = &[];
    /// As for F16.
    const LIMIT: f32 = f32::from_bits(0x7F7F_8000);

    #[inline(always)]
    fn encode<const N: usize>(values: &[f32], out: &mut [u8]) {
        for (x, out) in values.iter().zip(out.as_chunks_mut().0) {
            *out = bf16::from_f32(*x).to_le_bytes();
        }
    }
}
