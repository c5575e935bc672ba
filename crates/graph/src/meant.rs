//! A checkpoint's weights as a graph of it holds them: rounded, and numbers again.
//!
//! Knows nothing of what is computed with them.

use std::ops::Range;

use checkpoint::names;
use checkpoint::weights::Weights;
use half::f16;

use crate::calibration::Seen;
use crate::quantise::{Scheme, Schemes};
use crate::{Calibration, Error, Options};

/// What the bytes of a graph mean, made again from the checkpoint that it was written of.
pub struct Meant<'a> {
    weights: &'a Weights,
    schemes: Schemes,
    calibration: Option<&'a Calibration>,
    half: bool,
}

impl<'a> Meant<'a> {
    /// For a graph of `weights` whose hidden size is `width`, rounded by this `calibration`.
    pub fn new(
        weights: &'a Weights,
        width: usize,
        options: Options,
        calibration: Option<&'a Calibration>,
    ) -> Result<Self, Error> {
        let schemes = Schemes::new(width, options)?;
        Ok(Self { weights, schemes, calibration, half: options.dtype.is_half() })
    }

    /// Rows of the tensor that the checkpoint calls `name`, one or more. A vector is one row.
    pub fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<(), checkpoint::Error> {
        let height = rows.len();
        self.weights.rows(name, rows, out)?;
        let scheme = match name {
            names::EMBED | names::LM_HEAD => self.schemes.head,
            _ if names::is_linear(name) => self.schemes.linear,
            _ => None,
        };
        if let Some(scheme) = scheme {
            let seen = match self.calibration {
                Some(calibration) => calibration.of(name)?,
                None => None,
            };
            scheme.round(seen.as_ref(), out.len() / height, out);
        } else if self.half && !name.ends_with("norm.weight") {
            // Norms are f32 in any graph.
            out.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
        }
        Ok(())
    }
}

impl Scheme {
    /// Rows, quantised and numbers again.
    pub(crate) fn round(&self, seen: Option<&Seen>, columns: usize, rows: &mut [f32]) {
        let (blocks, zeros_width) = (self.blocks(columns), self.zeros_width(columns));
        let count = rows.len() / columns;
        let mut levels = vec![0; count * blocks * self.width()];
        let (mut scales, mut zeros) = (vec![0.0; count * blocks], vec![0; count * zeros_width]);
        self.rows(seen, columns, rows, &mut levels, &mut scales, &mut zeros);
        let level = |bytes: &[u8], i: usize| match self.bits {
            4 => bytes[i / 2] >> (4 * (i % 2)) & 15,
            _ => bytes[i],
        };
        for (at, row) in rows.chunks_exact_mut(columns).enumerate() {
            let levels = &levels[at * blocks * self.width()..];
            let zeros = &zeros[at * zeros_width..];
            for (i, x) in row.iter_mut().enumerate() {
                let block = i / self.block;
                let from_zero = i32::from(level(levels, i)) - i32::from(level(zeros, block));
                *x = from_zero as f32 * scales[at * blocks + block];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_again_changes_nothing() {
        let values: Vec<f32> = (0..100).map(|i| ((i * i) as f32 * 0.1).sin()).collect();
        for (bits, symmetric, near) in [(4, true, 0.14), (4, false, 0.08), (8, true, 0.008)] {
            let scheme = Scheme { bits, block: 32, symmetric, half_scales: false, search: false };
            let mut once = values.clone();
            scheme.round(None, 100, &mut once);
            assert!(once.iter().zip(&values).all(|(a, b)| (a - b).abs() < near), "{scheme:?}");
            let mut twice = once.clone();
            scheme.round(None, 100, &mut twice);
            assert!(once.iter().zip(&twice).all(|(a, b)| (a - b).abs() < 1e-6), "{scheme:?}");
        }
    }
}
