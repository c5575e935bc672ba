//! Rounding that knows what a matrix is multiplied with: GPTQ (Frantar et al., 2022, arXiv:2210.17323).
//!
//! Columns are rounded from the first to the last, and what a column is off by is made good by those
//! that are still to come: by so much as keeps the products closest to what they were, over the
//! inputs that were seen. Knows nothing of where these come from.
//!
//! X, the inputs \[T, K\]; G = XᵀX / T + damping; R upper triangular with R·Rᵀ = G, and U = R⁻¹, so
//! that G⁻¹ = Uᵀ·U. What column j is off by goes into column k > j times U_jk / U_jj.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use checkpoint::weights::{Dtype, Spec, TensorRef, Weights, Writer};
use rayon::prelude::*;

use crate::Error;
use crate::quantise::{Scheme, block, level};

/// Of the mean of G's diagonal, as in the paper: no inverse is of few inputs alone.
const DAMPING: f64 = 0.01;
/// Columns that are made at a time: what they share is read once.
const PANEL: usize = 32;

/// What a file of one matrix holds.
const IMPORTANCE: &str = "importance";
const FEEDBACK: &str = "feedback";

/// What matrices are multiplied with. On disk: of each matrix it is the square of its width, in all
/// more than a model may take of memory.
#[derive(Debug)]
pub struct Calibration {
    dir: PathBuf,
    /// By the name that a checkpoint has for the matrix.
    matrices: BTreeMap<String, Weights>,
}

/// What is known of the input of one matrix.
pub(crate) struct Seen<'a> {
    /// G's diagonal, of K columns.
    pub importance: Vec<f32>,
    /// \[K, K\]: U_jk / U_jj.
    feedback: Option<TensorRef<'a>>,
}

impl Calibration {
    /// Nothing seen yet; what will be lies in files of the folder `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), matrices: BTreeMap::new() }
    }

    /// Whether [`Calibration::add`] is still to be called for this matrix. Some have the same input.
    pub fn wants(&self, name: &str) -> bool {
        same_input(name) == name && !self.matrices.contains_key(name)
    }

    /// Takes XᵀX / T, \[K, K\], of the linear layer that the checkpoint calls `name`.
    pub fn add(&mut self, name: &str, products: &[f32]) -> Result<(), Error> {
        let k = products.len().isqrt();
        let mut g: Vec<f64> = products.iter().map(|x| f64::from(*x)).collect();
        let damping = DAMPING * (0..k).map(|i| g[i * k + i]).sum::<f64>() / k as f64;
        // What nothing ever went into can be rounded as one likes.
        let damping = if damping == 0.0 { 1.0 } else { damping };
        (0..k).for_each(|i| g[i * k + i] += damping);
        let importance: Vec<f32> = (0..k).map(|i| g[i * k + i] as f32).collect();
        if !factorise(&mut g, k) {
            return Err(Error::Calibration(name.into()));
        }
        let feedback = inverse(&g, k);
        drop(g);
        self.keep(name, &importance, Some(&feedback))
    }

    /// Takes the diagonal alone, for a matrix of whose rows each is rounded by itself: an embedding
    /// is looked up, too, and an error that was made good elsewhere stays one there.
    pub fn add_diagonal(&mut self, name: &str, squares: &[f32]) -> Result<(), Error> {
        let damping = DAMPING as f32 * squares.iter().sum::<f32>() / squares.len().max(1) as f32;
        if !damping.is_finite() {
            return Err(Error::Calibration(name.into()));
        }
        let importance: Vec<f32> = squares.iter().map(|square| square + damping).collect();
        self.keep(name, &importance, None)
    }

    fn keep(
        &mut self,
        name: &str,
        importance: &[f32],
        feedback: Option<&[f32]>,
    ) -> Result<(), Error> {
        let k = importance.len();
        let parts = [(IMPORTANCE, Some(importance), vec![k]), (FEEDBACK, feedback, vec![k, k])];
        let parts = parts.into_iter().filter_map(|(name, values, shape)| {
            values.map(|values| (name, (values, Spec::new(name, Dtype::F32, &shape))))
        });
        let parts: BTreeMap<&str, (&[f32], Spec)> = parts.collect();
        let path = self.dir.join(format!("{name}.safetensors"));
        let specs = parts.values().map(|(_, spec)| spec.clone()).collect();
        let mut writer = Writer::create(&path, specs)?;
        for spec in writer.order() {
            let values = parts[spec.name.as_str()].0;
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.write(&spec.name, &bytes)?;
        }
        writer.finish()?;
        self.matrices.insert(name.into(), Weights::open_file(&path)?);
        Ok(())
    }

    pub(crate) fn of(&self, name: &str) -> Result<Option<Seen<'_>>, checkpoint::Error> {
        let Some(file) = self.matrices.get(same_input(name).as_str()) else { return Ok(None) };
        let importance = file.get(IMPORTANCE)?.to_f32()?;
        let feedback = if file.contains(FEEDBACK) { Some(file.get(FEEDBACK)?) } else { None };
        Ok(Some(Seen { importance, feedback }))
    }
}

/// The first of the matrices that have the same input as this one.
fn same_input(name: &str) -> String {
    name.replace(".k_proj.", ".q_proj.")
        .replace(".v_proj.", ".q_proj.")
        .replace(".up_proj.", ".gate_proj.")
}

impl Scheme {
    /// Quantises some rows of a matrix, [`Scheme::row`] by row: with what is known of its input, each
    /// row's values are changed on the way.
    pub(crate) fn rows(
        &self,
        seen: Option<&Seen>,
        columns: usize,
        values: &mut [f32],
        levels: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [u8],
    ) {
        let (blocks, zeros_width) = (self.blocks(columns), self.zeros_width(columns));
        if let Some(Seen { importance, feedback: Some(feedback) }) = seen
            && self.bits == 4
            && self.search
        {
            let to = Rounded { levels, scales, zeros };
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") {
                // SAFETY: the feature was just found.
                return unsafe { rows_avx2(self, importance, feedback, values, to) };
            }
            return rows_any(self, importance, feedback, values, to);
        }
        let importance = seen.map(|seen| seen.importance.as_slice());
        let rows = values.chunks_exact(columns).zip(levels.chunks_exact_mut(blocks * self.width()));
        let rows = rows.zip(scales.chunks_exact_mut(blocks));
        for (((values, levels), scales), zeros) in rows.zip(zeros.chunks_exact_mut(zeros_width)) {
            self.row(values, importance, levels, scales, zeros);
        }
    }
}

/// Where rows go to.
struct Rounded<'a> {
    levels: &'a mut [u8],
    scales: &'a mut [f32],
    zeros: &'a mut [u8],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn rows_avx2(
    scheme: &Scheme,
    importance: &[f32],
    feedback: &TensorRef,
    values: &mut [f32],
    to: Rounded,
) {
    rows_any(scheme, importance, feedback, values, to);
}

/// The same operations in the same order on every machine.
#[inline(always)]
fn rows_any(
    scheme: &Scheme,
    importance: &[f32],
    feedback: &TensorRef,
    values: &mut [f32],
    to: Rounded,
) {
    let k = importance.len();
    let (blocks, zeros_width) = (scheme.blocks(k), scheme.zeros_width(k));
    let row_width = blocks * scheme.width();
    to.levels.fill(0);
    to.zeros.fill(0x88);
    let mut shares = vec![0.0; k];
    for j in 0..k {
        let (at, within) = (j / scheme.block, j % scheme.block);
        let shares = &mut shares[j + 1..];
        feedback.read_f32(j * k + j + 1, shares).expect("f32, as it was written");
        for (row, values) in values.chunks_exact_mut(k).enumerate() {
            let scale = &mut to.scales[row * blocks + at];
            let zeros = &mut to.zeros[row * zeros_width + at / 2];
            let shift = 4 * (at % 2);
            if within == 0 {
                let end = k.min(j + scheme.block);
                let zero;
                (*scale, zero) = block(&values[j..end], Some(&importance[j..end]), scheme);
                *zeros = *zeros & !(15 << shift) | (zero as u8) << shift;
            }
            let zero = f32::from(*zeros >> shift & 15);
            let reciprocal = if *scale == 0.0 { 0.0 } else { 1.0 / *scale };
            let level = level::<4>(values[j], reciprocal, zero);
            let byte = row * row_width + at * scheme.width() + within / 2;
            to.levels[byte] |= level << (4 * (within % 2));
            let off = values[j] - (f32::from(level) - zero) * *scale;
            for (value, share) in values[j + 1..].iter_mut().zip(&*shares) {
                *value -= off * share;
            }
        }
    }
}

/// G → R in its upper triangle, from the last column to the first. `false` if G is not positive
/// definite, which it is but for numbers that are none.
fn factorise(g: &mut [f64], k: usize) -> bool {
    for to in (0..k).rev().step_by(PANEL) {
        let from = (to + 1).saturating_sub(PANEL);
        let columns = from..to + 1;
        // What the columns after the panel take away, of all rows at once.
        let (above, panel) = g.split_at_mut(from * k);
        let tails: Vec<Vec<f64>> = columns
            .clone()
            .map(|j| panel[(j - from) * k + to + 1..][..k - to - 1].to_vec())
            .collect();
        let take = |row: &mut [f64], columns: std::ops::Range<usize>| {
            let (head, tail) = row.split_at_mut(to + 1);
            for j in columns {
                head[j] -= dot(tail, &tails[j - from]);
            }
        };
        above.par_chunks_exact_mut(k).for_each(|row| take(row, columns.clone()));
        for (i, row) in panel.chunks_exact_mut(k).take(columns.len()).enumerate() {
            take(row, from + i..to + 1);
        }
        // Within the panel.
        for j in columns.rev() {
            let tail = panel[(j - from) * k + j + 1..][..to - j].to_vec();
            let row = &mut panel[(j - from) * k..][..k];
            let pivot = row[j] - dot(&tail, &tail);
            // Not so of a NaN, either.
            if !(pivot > 0.0 && pivot.is_finite()) {
                return false;
            }
            let pivot = pivot.sqrt();
            row[j] = pivot;
            for i in from..j {
                let row = &mut panel[(i - from) * k..][..k];
                row[j] = (row[j] - dot(&row[j + 1..=to], &tail)) / pivot;
            }
            above.par_chunks_exact_mut(k).with_min_len(64).for_each(|row| {
                row[j] = (row[j] - dot(&row[j + 1..=to], &tail)) / pivot;
            });
        }
    }
    true
}

/// R → U_jk / U_jj for k > j, zero elsewhere.
fn inverse(r: &[f64], k: usize) -> Vec<f32> {
    // Columns of U as rows.
    let mut columns = vec![0.0f32; k * k];
    columns.par_chunks_mut(PANEL * k).enumerate().for_each(|(panel, out)| {
        let first = panel * PANEL;
        let mut all: Vec<Vec<f64>> =
            (first..k.min(first + PANEL)).map(|c| vec![0.0; c + 1]).collect();
        for i in (0..first + all.len()).rev() {
            let row = &r[i * k..][..k];
            for (c, u) in (first..).zip(&mut all).filter(|(c, _)| *c >= i) {
                u[i] = if c == i { 1.0 } else { -dot(&row[i + 1..=c], &u[i + 1..=c]) } / row[i];
            }
        }
        for (out, u) in out.chunks_exact_mut(k).zip(all) {
            // U_jj = 1 / R_jj.
            let shares = u.iter().enumerate().map(|(j, u)| (u * r[j * k + j]) as f32);
            out.iter_mut().zip(shares).for_each(|(out, share)| *out = share);
        }
    });
    let mut rows = vec![0.0f32; k * k];
    rows.par_chunks_exact_mut(k).enumerate().for_each(|(j, row)| {
        (j + 1..k).for_each(|c| row[c] = columns[c * k + j]);
    });
    rows
}

/// Summed in eight lanes.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    /// Inputs [T, K] whose columns go together, and XᵀX / T.
    fn inputs(tokens: usize, k: usize) -> (Vec<f32>, Vec<f32>) {
        let (few, mix) = (noise(tokens * 5, 1), noise(5 * k, 2));
        let mut x: Vec<f32> = noise(tokens * k, 3).iter().map(|x| x * 0.2).collect();
        for (t, x) in x.chunks_exact_mut(k).enumerate() {
            for (j, x) in x.iter_mut().enumerate() {
                *x += (0..5).map(|i| few[t * 5 + i] * mix[i * k + j]).sum::<f32>();
            }
        }
        let product = |i: usize, j: usize| {
            x.chunks_exact(k).map(|x| x[i] * x[j]).sum::<f32>() / tokens as f32
        };
        let products = (0..k * k).map(|at| product(at / k, at % k)).collect();
        (x, products)
    }

    #[test]
    fn factors_multiply_to_what_they_are_of() {
        for k in [1, 7, 32, 70] {
            let (_, products) = inputs(50, k);
            let mut g: Vec<f64> = products.iter().map(|x| f64::from(*x)).collect();
            (0..k).for_each(|i| g[i * k + i] += 0.1);
            let mut r = g.clone();
            assert!(factorise(&mut r, k));
            let upper = |i: usize, j: usize| if i <= j { r[i * k + j] } else { 0.0 };
            for i in 0..k {
                for j in 0..k {
                    let found: f64 = (0..k).map(|c| upper(i, c) * upper(j, c)).sum();
                    assert!((found - g[i * k + j]).abs() < 1e-9, "{k}: {i} {j}");
                }
            }
            // U · R = 1.
            let shares = inverse(&r, k);
            for i in 0..k {
                for j in i..k {
                    let u = |c: usize| match c {
                        _ if c == i => 1.0,
                        _ => f64::from(shares[i * k + c]),
                    };
                    let found: f64 = (i..=j).map(|c| u(c) / upper(i, i) * upper(c, j)).sum();
                    let expected = f64::from(u8::from(i == j));
                    assert!((found - expected).abs() < 1e-4, "{k}: {i} {j}: {found}");
                }
            }
            r[0] = f64::NAN;
            assert!(!factorise(&mut r, k));
        }
    }

    /// Of the products, and not of the weights; and each row for itself, on any machine.
    #[test]
    fn products_are_closer_to_what_they_were() {
        let (n, k) = (12, 100);
        let (x, products) = inputs(300, k);
        let weights = noise(n * k, 4);
        let dir = tempfile::tempdir().unwrap();
        let mut calibration = Calibration::new(dir.path());
        let name = "model.layers.0.mlp.gate_proj.weight";
        calibration.add(name, &products).unwrap();
        assert!(!calibration.wants(name));
        let bytes = |calibration: &Calibration| {
            std::fs::read(calibration.dir.join(format!("{name}.safetensors"))).unwrap()
        };
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let dir = tempfile::tempdir().unwrap();
            let mut again = Calibration::new(dir.path());
            pool.install(|| again.add(name, &products)).unwrap();
            assert!(bytes(&again) == bytes(&calibration));
        }
        let seen = calibration.of("model.layers.0.mlp.up_proj.weight").unwrap().unwrap();
        for (symmetric, block) in [(true, 32), (false, 32), (false, 128)] {
            let scheme = Scheme { bits: 4, block, symmetric, half_scales: false, search: true };
            let [alone, together] = [None, Some(&seen)].map(|seen| {
                let mut rounded = weights.clone();
                scheme.round(seen, k, &mut rounded);
                x.chunks_exact(k)
                    .flat_map(|x| {
                        let rows = rounded.chunks_exact(k).zip(weights.chunks_exact(k));
                        rows.map(|(a, b)| (0..k).map(|i| (a[i] - b[i]) * x[i]).sum::<f32>().powi(2))
                    })
                    .sum::<f32>()
            });
            assert!(together < alone * 0.6, "{symmetric} {block}: {together} of {alone}");

            let quantised = |rows: usize, any: bool| {
                let (blocks, width) = (scheme.blocks(k), scheme.zeros_width(k));
                let mut levels = vec![0xaa; n * blocks * scheme.width()];
                let (mut scales, mut zeros) = (vec![0.0; n * blocks], vec![0; n * width]);
                let mut values = weights.clone();
                let parts = values
                    .chunks_mut(rows * k)
                    .zip(levels.chunks_mut(rows * blocks * scheme.width()))
                    .zip(scales.chunks_mut(rows * blocks))
                    .zip(zeros.chunks_mut(rows * width));
                for (((values, levels), scales), zeros) in parts {
                    if any {
                        let feedback = seen.feedback.as_ref().unwrap();
                        let to = Rounded { levels, scales, zeros };
                        rows_any(&scheme, &seen.importance, feedback, values, to);
                    } else {
                        scheme.rows(Some(&seen), k, values, levels, scales, zeros);
                    }
                }
                (levels, scales, zeros)
            };
            assert_eq!(quantised(12, false), quantised(5, true));
        }
    }

    #[test]
    fn inputs_that_are_no_numbers_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut calibration = Calibration::new(dir.path());
        let error = calibration.add("a", &[1.0, f32::NAN, f32::NAN, 1.0]).unwrap_err();
        assert!(error.to_string().contains("`a` is multiplied with"), "{error}");
        assert!(calibration.add_diagonal("a", &[1.0, f32::INFINITY]).is_err());
        calibration.add("a", &[0.0; 4]).unwrap();
    }
}
