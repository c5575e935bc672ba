//! x · Wᵀ with rows of W that are read as they are needed.

use std::ops::Range;

use rayon::prelude::*;

/// Rows of W that a thread has at a time.
const BLOCK: usize = 32;
/// Sums side by side, in an order that no number of threads changes.
const LANES: usize = 16;

/// [n, in] → [n, rows], the rows of W by `read`.
pub fn product<E: Send>(
    rows: Range<usize>,
    x: &[f32],
    read: impl Fn(Range<usize>, &mut Vec<f32>) -> Result<(), E> + Sync,
) -> Result<Vec<f32>, E> {
    let width = rows.len();
    let starts: Vec<usize> = rows.clone().step_by(BLOCK).collect();
    let blocks: Vec<Result<Vec<f32>, E>> = starts
        .par_iter()
        .map_init(Vec::new, |weight, start| {
            let block = *start..(start + BLOCK).min(rows.end);
            read(block.clone(), weight)?;
            let columns = weight.len() / block.len();
            let mut out = vec![0.0; x.len() / columns * block.len()];
            multiply(x, weight, columns, &mut out);
            Ok(out)
        })
        .collect();
    let mut all: Vec<f32> = Vec::new();
    for (start, block) in starts.iter().zip(blocks) {
        let block = block?;
        let height = BLOCK.min(rows.end - start);
        all.resize(block.len() / height * width, 0.0);
        for (to, from) in all.chunks_exact_mut(width).zip(block.chunks_exact(height)) {
            to[start - rows.start..][..height].copy_from_slice(from);
        }
    }
    Ok(all)
}

/// [n, in] · [rows, in]ᵀ → [n, rows]
fn multiply(x: &[f32], weight: &[f32], columns: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        // SAFETY: both features were just found.
        return unsafe { multiply_fma(x, weight, columns, out) };
    }
    multiply_any(x, weight, columns, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_fma(x: &[f32], weight: &[f32], columns: usize, out: &mut [f32]) {
    multiply_any(x, weight, columns, out);
}

#[inline(always)]
fn multiply_any(x: &[f32], weight: &[f32], columns: usize, out: &mut [f32]) {
    let height = weight.len() / columns;
    for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(height)) {
        for (row, out) in weight.chunks_exact(columns).zip(out) {
            let (x, x_rest) = x.as_chunks::<LANES>();
            let (row, row_rest) = row.as_chunks::<LANES>();
            let mut sums = [0.0f32; LANES];
            for (x, w) in x.iter().zip(row) {
                for i in 0..LANES {
                    sums[i] = x[i].mul_add(w[i], sums[i]);
                }
            }
            for (i, (x, w)) in x_rest.iter().zip(row_rest).enumerate() {
                sums[i] = x.mul_add(*w, sums[i]);
            }
            *out = sums.iter().sum();
        }
    }
}
