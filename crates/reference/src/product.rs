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
    {
        use std::is_x86_feature_detected as has;
        if has!("avx512f") {
            // SAFETY: the feature was just found.
            return unsafe { multiply_avx512(x, weight, columns, out) };
        }
        if has!("avx2") && has!("fma") {
            // SAFETY: both features were just found.
            return unsafe { multiply_fma(x, weight, columns, out) };
        }
    }
    multiply_any(x, weight, columns, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f")]
fn multiply_avx512(x: &[f32], weight: &[f32], columns: usize, out: &mut [f32]) {
    multiply_any(x, weight, columns, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_fma(x: &[f32], weight: &[f32], columns: usize, out: &mut [f32]) {
    multiply_any(x, weight, columns, out);
}

/// Four rows of W at a time: what is read of x serves them all, and no sum waits for another.
#[inline(always)]
fn multiply_any(x: &[f32], weight: &[f32], columns: usize, out: &mut [f32]) {
    let height = weight.len() / columns;
    for (i, rows) in weight.chunks(4 * columns).enumerate() {
        let at = 4 * i;
        for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(height)) {
            if rows.len() == 4 * columns {
                let (low, high) = rows.split_at(2 * columns);
                let ((a, b), (c, d)) = (low.split_at(columns), high.split_at(columns));
                out[at..at + 4].copy_from_slice(&four(x, [a, b, c, d]));
                continue;
            }
            for (row, out) in rows.chunks_exact(columns).zip(&mut out[at..]) {
                *out = one(x, row);
            }
        }
    }
}

/// x · each of the rows, whose sums are named so that they stay in registers.
#[inline(always)]
fn four(x: &[f32], [a, b, c, d]: [&[f32]; 4]) -> [f32; 4] {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let parts = [a, b, c, d].map(|row| row.as_chunks::<LANES>());
    let [(a, _), (b, _), (c, _), (d, _)] = parts;
    let [mut s, mut t, mut u, mut v] = [[0.0f32; LANES]; 4];
    for ((((x, a), b), c), d) in chunks.iter().zip(a).zip(b).zip(c).zip(d) {
        for i in 0..LANES {
            s[i] = x[i].mul_add(a[i], s[i]);
            t[i] = x[i].mul_add(b[i], t[i]);
            u[i] = x[i].mul_add(c[i], u[i]);
            v[i] = x[i].mul_add(d[i], v[i]);
        }
    }
    let [(_, a), (_, b), (_, c), (_, d)] = parts;
    [ended(s, rest, a), ended(t, rest, b), ended(u, rest, c), ended(v, rest, d)]
}

/// x · row.
#[inline(always)]
fn one(x: &[f32], row: &[f32]) -> f32 {
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (row, row_rest) = row.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for (x, w) in x.iter().zip(row) {
        for i in 0..LANES {
            sums[i] = x[i].mul_add(w[i], sums[i]);
        }
    }
    ended(sums, x_rest, row_rest)
}

/// The sum of the lanes, and what no whole chunk was left for.
#[inline(always)]
fn ended(mut sums: [f32; LANES], x: &[f32], row: &[f32]) -> f32 {
    for (i, (x, w)) in x.iter().zip(row).enumerate() {
        sums[i] = x.mul_add(*w, sums[i]);
    }
    sums.iter().sum()
}
