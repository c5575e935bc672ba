//! Parts of a layer as one operation each, forwards and backwards: the Rust side of fused.cpp.
//!
//! Knows nothing of models.

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::linear::{Lora, Weight};
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

/// x·Wᵀ + bias + scale · (dropped x·Aᵀ)·Bᵀ with a frozen W, on any device.
///
/// `x` is [N, in]; the result has its kind. `dropout` is of the adapter's input.
pub fn frozen_linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: Option<&Lora>,
    dropout: f64,
) -> Tensor {
    let null = std::ptr::null();
    let out = weight.size()[0];
    let [weight, scales, steps, offset] = match weight {
        Weight::Dense(weight) => [pointer(weight), null, null, null],
        Weight::Nf4(nf4) => [&nf4.packed, &nf4.scales, &nf4.steps, &nf4.offset].map(pointer),
    };
    let (a, b) = lora.map_or((null, null), |lora| (pointer(&lora.a), pointer(&lora.b)));
    let scale = lora.map_or(0.0, |lora| lora.scale);
    let (x, bias) = (pointer(x), bias.map_or(null, pointer));
    finish(unsafe {
        anneal_frozen_linear(x, weight, scales, steps, offset, bias, a, b, out, scale, dropout)
    })
}

/// The sum over rows of weight · -ln p / `divisor`, where p is what the softmax of x·Wᵀ gives the
/// row's target: a float32 tensor of no dimensions. `tile` logits at a time, on any device.
///
/// `x` is [N, C], `weight` [V, C], both of one kind; `targets` [N], int64; `weights` [N], float32.
pub fn cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    divisor: f64,
    tile: usize,
) -> Tensor {
    let (x, weight) = (pointer(x), pointer(weight));
    let (targets, weights) = (pointer(targets), pointer(weights));
    finish(unsafe { anneal_cross_entropy(x, weight, targets, weights, divisor, tile as i64) })
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
    fn anneal_frozen_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        scales: *const C_tensor,
        steps: *const C_tensor,
        offset: *const C_tensor,
        bias: *const C_tensor,
        a: *const C_tensor,
        b: *const C_tensor,
        out: i64,
        scale: f64,
        dropout: f64,
    ) -> *mut C_tensor;
    fn anneal_cross_entropy(
        x: *const C_tensor,
        weight: *const C_tensor,
        targets: *const C_tensor,
        weights: *const C_tensor,
        divisor: f64,
        tile: i64,
    ) -> *mut C_tensor;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blockwise::Nf4;

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

    /// What it computes, operation by operation, for a matrix in the kind of `x`.
    fn chain(x: &Tensor, weight: &Tensor, bias: &Tensor, lora: &Lora) -> Tensor {
        let y = x.linear(weight, Some(bias));
        let wide = x.to_kind(Kind::Float);
        let delta = wide.matmul(&lora.a.tr()).matmul(&lora.b.tr()) * lora.scale;
        (y.to_kind(Kind::Float) + delta).to_kind(x.kind())
    }

    #[test]
    fn an_adapted_layer_is_the_chain_of_its_operations() {
        tch::manual_seed(3);
        let (x, a, b) = (leaf(&[19, 12]), leaf(&[4, 12]), leaf(&[10, 4]));
        let lora = Lora { a: a.shallow_clone(), b: b.shallow_clone(), scale: 0.7, dropout: 0.0 };
        let weight = Tensor::randn([10, 12], (Kind::Float, Device::Cpu));
        let bias = Tensor::randn([10], (Kind::Float, Device::Cpu));
        let nf4 = Nf4::quantise(&weight, Device::Cpu).unwrap();
        for weight in [Weight::Dense(weight), Weight::Nf4(nf4)] {
            let dense = weight.dense().unwrap();
            let ours = || frozen_linear(&x, &weight, Some(&bias), Some(&lora), 0.0);
            agree(&[&x, &a, &b], ours, || chain(&x, &dense, &bias, &lora));
            let ours = || frozen_linear(&x, &weight, Some(&bias), None, 0.0);
            agree(&[&x], ours, || x.linear(&dense, Some(&bias)));
        }
    }

    /// In bfloat16 the sum is rounded once here, and the gradient too.
    #[test]
    fn an_adapter_of_a_layer_in_16_bits_is_in_32() {
        tch::manual_seed(5);
        let half = |t: Tensor| t.to_kind(Kind::BFloat16);
        let (a, b) = (leaf(&[4, 12]), leaf(&[10, 4]));
        let x = half(Tensor::randn([19, 12], (Kind::Float, Device::Cpu))).set_requires_grad(true);
        let lora = Lora { a: a.shallow_clone(), b: b.shallow_clone(), scale: 0.7, dropout: 0.0 };
        let weight = half(Tensor::randn([10, 12], (Kind::Float, Device::Cpu)));
        let bias = half(Tensor::randn([10], (Kind::Float, Device::Cpu)));
        let expected = chain(&x, &weight, &bias, &lora);
        let weight = Weight::Dense(weight);
        let y = frozen_linear(&x, &weight, Some(&bias), Some(&lora), 0.0);
        assert!(y.kind() == Kind::BFloat16 && y.allclose(&expected, 1e-2, 1e-2, false));
        let pairs = gradients(&y, &[&x, &a, &b]).into_iter();
        for (ours, chain) in pairs.zip(gradients(&expected, &[&x, &a, &b])) {
            let [ours, chain] = [ours, chain].map(|t| t.to_kind(Kind::Float));
            let largest = chain.abs().max().double_value(&[]);
            assert!((ours - chain).abs().max().double_value(&[]) <= 1e-2 * largest);
        }
    }

    #[test]
    fn dropout_is_of_the_adapters_input_and_the_same_on_the_way_back() {
        tch::manual_seed(6);
        let (x, a, b) = (leaf(&[50, 40]), leaf(&[4, 40]), leaf(&[10, 4]));
        let lora = Lora { a: a.shallow_clone(), b: b.shallow_clone(), scale: 1.0, dropout: 0.5 };
        let weight = Weight::Dense(Tensor::zeros([10, 40], (Kind::Float, Device::Cpu)));
        let forward = |x: &Tensor| {
            tch::manual_seed(7);
            frozen_linear(x, &weight, None, Some(&lora), 0.5)
        };
        // As many as were asked for, in rows and columns of their own.
        let ones = Tensor::ones([200, 300], (Kind::Float, Device::Cpu));
        let unit = Tensor::eye(300, (Kind::Float, Device::Cpu));
        let all = Lora { a: unit.copy(), b: unit, scale: 1.0, dropout: 0.3 };
        let zero = Weight::Dense(Tensor::zeros([300, 300], (Kind::Float, Device::Cpu)));
        let kept = frozen_linear(&ones, &zero, None, Some(&all), 0.3);
        let gone = kept.eq(0.0).to_kind(Kind::Float);
        for (share, slack) in [
            (gone.mean(Kind::Float), 0.01),
            (gone.mean_dim(0, false, Kind::Float).max(), 0.15),
            (gone.mean_dim(1, false, Kind::Float).max(), 0.15),
            ((&gone * gone.roll(1, 0)).mean(Kind::Float).sqrt(), 0.01),
            ((&gone * gone.roll(1, 1)).mean(Kind::Float).sqrt(), 0.01),
        ] {
            assert!((share.double_value(&[]) - 0.3).abs() < slack, "{share}");
        }

        let (y, undropped) = (forward(&x), x.matmul(&a.tr()).matmul(&b.tr()));
        assert!(!y.allclose(&undropped, 1e-3, 1e-3, false));
        // Linear in x with the same mask: half the input, half the output; and the gradient along
        // x is the output.
        assert!((forward(&(&x * 0.5)) * 2.0).allclose(&y, 1e-5, 1e-5, false));
        y.sum(Kind::Float).backward();
        let along = (x.grad() * &x).sum(Kind::Float).double_value(&[]);
        let along_a = (a.grad() * &a).sum(Kind::Float).double_value(&[]);
        let sum = y.sum(Kind::Float).double_value(&[]);
        assert!(
            (along - sum).abs() < 1e-3 && (along_a - sum).abs() < 1e-3,
            "{along} {along_a} {sum}"
        );
    }

    #[test]
    fn a_loss_is_the_chain_of_its_operations_whatever_the_tiles() {
        tch::manual_seed(8);
        let (x, w) = (leaf(&[37, 16]), leaf(&[53, 16]));
        let targets = Tensor::randint(53, [37], (Kind::Int64, Device::Cpu));
        let weights = Tensor::rand([37], (Kind::Float, Device::Cpu));
        let logits = x.linear::<Tensor>(&w, None);
        let miss =
            logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::None, -100, 0.0);
        let expected = miss.dot(&weights) / 7.0;
        let theirs = gradients(&expected, &[&x, &w]);
        for tile in [37 * 53, 5 * 53, 1] {
            let ours = cross_entropy(&x, &w, &targets, &weights, 7.0, tile);
            assert!(ours.allclose(&expected, 1e-6, 1e-6, false), "{tile}");
            for (ours, theirs) in gradients(&ours, &[&x, &w]).iter().zip(&theirs) {
                let error = (ours - theirs).abs().max().double_value(&[]);
                assert!(error <= 1e-6 * theirs.abs().max().double_value(&[]), "{tile}");
                // In one piece to the bit.
                assert!(tile < 37 * 53 || error == 0.0);
            }
        }
        // Where nothing is trained there is nothing to go back to.
        let ours = tch::no_grad(|| cross_entropy(&x, &w, &targets, &weights, 7.0, 100));
        assert!(!ours.requires_grad() && ours.allclose(&expected, 1e-6, 1e-6, false));
    }

    #[test]
    fn a_loss_in_16_bits_is_that_of_its_logits() {
        tch::manual_seed(9);
        let half = |t: Tensor| t.to_kind(Kind::BFloat16).detach().set_requires_grad(true);
        let x = half(Tensor::randn([21, 16], (Kind::Float, Device::Cpu)));
        let w = half(Tensor::randn([999, 16], (Kind::Float, Device::Cpu)) * 2.0);
        let targets = Tensor::randint(999, [21], (Kind::Int64, Device::Cpu));
        let weights = Tensor::rand([21], (Kind::Float, Device::Cpu));
        let logits = x.linear::<Tensor>(&w, None).to_kind(Kind::Float);
        let each = tch::Reduction::None;
        let miss = logits.cross_entropy_loss::<Tensor>(&targets, None, each, -100, 0.0);
        let expected = miss.dot(&weights) / 3.0;
        let theirs = gradients(&expected, &[&x, &w]);
        for tile in [21 * 999, 4 * 999] {
            let ours = cross_entropy(&x, &w, &targets, &weights, 3.0, tile);
            assert!(ours.allclose(&expected, 1e-5, 1e-5, false), "{ours} {expected}");
            for (ours, theirs) in gradients(&ours, &[&x, &w]).iter().zip(&theirs) {
                let [ours, theirs] = [ours, theirs].map(|t| t.to_kind(Kind::Float));
                let error = (&ours - &theirs).abs().max().double_value(&[]);
                assert!(error <= 1e-2 * theirs.abs().max().double_value(&[]), "{tile}: {error}");
            }
        }
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
