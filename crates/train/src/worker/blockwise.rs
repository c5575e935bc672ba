//! Numbers in blocks that share a scale: the Rust side of blockwise.cpp.
//!
//! Knows nothing of models or layers.

use std::ffi::c_int;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::shim;

/// A matrix in 4 bits: NF4 with double quantisation (Dettmers et al., 2023), its bytes those of
/// bitsandbytes. It is made once and never trained.
pub struct Nf4 {
    /// [n / 2], uint8: two numbers a byte, the first in the high half.
    pub packed: Tensor,
    /// [n / 64], uint8: each block's largest magnitude, itself in 8 bits.
    pub scales: Tensor,
    /// [n / 64 / 256], float32: the scale of 256 such scales.
    pub steps: Tensor,
    /// float32, of no dimensions: the mean of all scales, taken off before they were rounded.
    pub offset: Tensor,
    pub rows: i64,
    pub columns: i64,
}

impl Nf4 {
    /// From a matrix of any kind, on the processor; the result is on `device`.
    pub fn quantise(weight: &Tensor, device: Device) -> Result<Self> {
        let (rows, columns) = weight.size2()?;
        let mut out = [std::ptr::null_mut(); 4];
        let failed =
            unsafe { anneal_nf4_quantise(weight.to_kind(Kind::Float).as_ptr(), out.as_mut_ptr()) };
        if failed != 0 {
            return Err(shim::failure()).context("NF4");
        }
        let [packed, scales, steps, offset] =
            out.map(|tensor| unsafe { Tensor::from_ptr(tensor) }.to_device(device));
        Ok(Self { packed, scales, steps, offset, rows, columns })
    }

    /// [rows, columns] in float32 or bfloat16.
    pub fn dequantise(&self, kind: Kind) -> Result<Tensor> {
        let Self { packed, scales, steps, offset, rows, columns } = self;
        let [packed, scales, steps, offset] = [packed, scales, steps, offset].map(|t| t.as_ptr());
        shim::tensor(unsafe {
            let half = c_int::from(kind == Kind::BFloat16);
            anneal_nf4_dequantise(packed, scales, steps, offset, *rows, *columns, half)
        })
        .context("NF4")
    }
}

/// What AdamW remembers of a parameter, in 8 bits: blocks of 256 numbers share a scale, as
/// bitsandbytes has it.
pub struct Moments {
    /// [n], uint8: the running mean of the gradient.
    pub first: Tensor,
    /// [n / 256], float32
    pub first_scales: Tensor,
    /// Of its square.
    pub second: Tensor,
    pub second_scales: Tensor,
}

impl Moments {
    /// All zero, for a parameter of this shape on its device.
    pub fn new(param: &Tensor) -> Self {
        let (count, device) = (param.numel() as i64, param.device());
        let bytes = || Tensor::zeros([count], (Kind::Uint8, device));
        let scales = || Tensor::zeros([(count + 255) / 256], (Kind::Float, device));
        Self { first: bytes(), first_scales: scales(), second: bytes(), second_scales: scales() }
    }
}

// Every pointer is an at::Tensor that lives through the call; a tensor that is returned is ours.
unsafe extern "C" {
    fn anneal_nf4_quantise(weight: *const C_tensor, out: *mut *mut C_tensor) -> c_int;
    fn anneal_nf4_dequantise(
        packed: *const C_tensor,
        scales: *const C_tensor,
        steps: *const C_tensor,
        offset: *const C_tensor,
        rows: i64,
        columns: i64,
        half: c_int,
    ) -> *mut C_tensor;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::golden;

    #[test]
    fn nf4_is_that_of_bitsandbytes_byte_for_byte() {
        let golden = golden("blockwise");
        for case in ["many", "outliers", "zeros", "uneven"] {
            let of = |part: &str| &golden[&format!("{case}.{part}")];
            let ours = Nf4::quantise(of("weight"), Device::Cpu).unwrap();
            let parts = [&ours.packed, &ours.scales, &ours.steps, &ours.offset];
            for (part, ours) in ["packed", "scales", "steps", "offset"].into_iter().zip(parts) {
                let theirs = of(part).view_as(ours);
                assert_eq!(ours.kind(), theirs.kind(), "{case}: {part}");
                let differ = ours.ne_tensor(&theirs).sum(Kind::Int64).int64_value(&[]);
                assert_eq!(differ, 0, "{case}: {part}: of {}", ours.numel());
            }
            let Some(theirs) = golden.get(&format!("{case}.dequantised")) else { continue };
            for kind in [Kind::Float, Kind::BFloat16] {
                let theirs = theirs.to_kind(kind);
                assert!(ours.dequantise(kind).unwrap().equal(&theirs), "{case}: {kind:?}");
            }
        }
    }
}
