//! Parts of a layer as one operation each, forwards and backwards: the Rust side of fused.cpp.
//!
//! Knows nothing of models.

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::shim;

/// Whether [`rms_norm`] and [`rotate`] can take `x`: they are loops of ours for the processor.
pub fn takes(x: &Tensor) -> bool {
    x.device() == Device::Cpu && x.kind() == Kind::Float
}

/// weight · x / √(mean x² + eps) over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    finish(unsafe { anneal_rms_norm(pointer(x), pointer(weight), eps) })
}

/// Turns the halves of each head against each other.
///
/// `x` is [.., n·D], heads side by side, and its rows repeat the positions 0..T; `cos` and `sin`
/// are [T, D], both halves alike.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    finish(unsafe { anneal_rotate(pointer(x), pointer(cos), pointer(sin)) })
}

/// x·Wᵀ + scale · (x·Aᵀ)·Bᵀ with a frozen W, on any device.
///
/// `x` is [N, in], `weight` [out, in], `a` [rank, in], `b` [out, rank], all of one kind.
pub fn lora_linear(x: &Tensor, weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Tensor {
    let (x, weight, a, b) = (pointer(x), pointer(weight), pointer(a), pointer(b));
    finish(unsafe { anneal_lora_linear(x, weight, a, b, scale) })
}

fn pointer(tensor: &Tensor) -> *const C_tensor {
    tensor.as_ptr()
}

/// As tch does: what goes wrong here are shapes that do not fit.
fn finish(tensor: *mut C_tensor) -> Tensor {
    shim::tensor(tensor).unwrap_or_else(|error| panic!("{error}"))
}

// Every pointer is an at::Tensor that lives through the call; a tensor that is returned is ours.
unsafe extern "C" {
    fn anneal_rms_norm(x: *const C_tensor, weight: *const C_tensor, eps: f64) -> *mut C_tensor;
    fn anneal_rotate(
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
    ) -> *mut C_tensor;
    fn anneal_lora_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        a: *const C_tensor,
        b: *const C_tensor,
        scale: f64,
    ) -> *mut C_tensor;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The gradients of `y`'s sum, each element weighted differently, with respect to `leaves`.
    fn gradients(y: &Tensor, leaves: &[&Tensor]) -> Vec<Tensor> {
        let weights = Tensor::arange(y.numel() as i64, (Kind::Float, Device::Cpu)).sin();
        (y.reshape([-1]) * weights).sum(Kind::Float).backward();
        leaves
            .iter()
            .map(|leaf| {
                let gradient = leaf.grad().copy();
                let _ = leaf.grad().zero_();
                gradient
            })
            .collect()
    }

    fn leaf(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true)
    }

    /// Both give the same values and the same gradients, up to the order of sums.
    fn agree(leaves: &[&Tensor], ours: impl Fn() -> Tensor, chain: impl Fn() -> Tensor) {
        let (y, expected) = (ours(), chain());
        assert!(y.allclose(&expected, 1e-5, 1e-6, false), "values");
        let (a, b) = (gradients(&y, leaves), gradients(&expected, leaves));
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let error = (a - b).abs().max().double_value(&[]);
            let largest = b.abs().max().double_value(&[]);
            assert!(error <= 1e-5 * largest, "gradient {i}: off by {error} of {largest}");
        }
    }

    #[test]
    fn a_norm_is_the_chain_of_its_operations() {
        tch::manual_seed(1);
        // Neither the rows nor the width are multiples of what the loops take at once.
        let (x, w) = (leaf(&[77, 83]), leaf(&[83]));
        let chain = || &w * (&x * (x.square().mean_dim(-1, true, Kind::Float) + 1e-5_f64).rsqrt());
        agree(&[&x, &w], || rms_norm(&x, &w, 1e-5), chain);
    }

    #[test]
    fn a_rotation_is_the_chain_of_its_operations() {
        tch::manual_seed(2);
        let (rows, positions, heads, size) = (3, 5, 2, 8);
        let x = leaf(&[rows * positions, heads * size]);
        let angles = Tensor::randn([positions, size / 2], (Kind::Float, Device::Cpu));
        let angles = Tensor::cat(&[&angles, &angles], 1);
        let (cos, sin) = (angles.cos(), angles.sin());
        let chain = || {
            let x = x.view([rows, positions, heads, size]).transpose(1, 2);
            let half = size / 2;
            let turned = Tensor::cat(&[-x.narrow(3, half, half), x.narrow(3, 0, half)], 3);
            (x * &cos + turned * &sin).transpose(1, 2).reshape([rows * positions, heads * size])
        };
        agree(&[&x], || rotate(&x, &cos, &sin), chain);
    }

    #[test]
    fn an_adapted_layer_is_the_chain_of_its_operations() {
        tch::manual_seed(3);
        let (x, a, b) = (leaf(&[19, 12]), leaf(&[4, 12]), leaf(&[10, 4]));
        let w = Tensor::randn([10, 12], (Kind::Float, Device::Cpu));
        let chain = || x.matmul(&w.tr()) + x.matmul(&a.tr()).matmul(&b.tr()) * 0.7;
        agree(&[&x, &a, &b], || lora_linear(&x, &w, &a, &b, 0.7), chain);
    }

    #[test]
    fn threads_do_not_matter() {
        tch::manual_seed(4);
        let (x, w) = (leaf(&[1000, 64]), leaf(&[64]));
        let bits = |threads| {
            tch::set_num_threads(threads);
            let y = rms_norm(&x, &w, 1e-5);
            let gradients = gradients(&y, &[&x, &w]);
            let all = std::iter::once(y.detach()).chain(gradients);
            all.map(|t| Vec::<f32>::try_from(t.reshape([-1])).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(bits(1), bits(3));
    }
}
