//! What tch does not offer of libtorch: the Rust side of shim.cpp.
//!
//! Knows nothing of models or training steps.

use std::ffi::{CStr, c_char, c_int};

use anyhow::{Context, Result, bail};
use tch::Tensor;
use torch_sys::C_tensor;

/// Asks libtorch for operations that give the same bits every time. Where it has none, it fails
/// if `strict`, else warns.
pub fn deterministic(strict: bool) {
    unsafe { anneal_deterministic(c_int::from(strict)) }
}

/// The common 2-norm of the gradients of `params`, and what to divide them by so that it is at most
/// `max_norm` (0: any): tensors of no dimensions on the parameters' device.
pub fn gradient_norm(params: &[Tensor], max_norm: f64) -> Result<(Tensor, Tensor)> {
    let both = unsafe { anneal_gradient_norm(pointers(params).as_ptr(), len(params), max_norm) };
    let both = tensor(both).context("the norm of the gradients")?;
    Ok((both.get(0), both.get(1)))
}

/// Parameters with what AdamW remembers of each: slices of one length.
pub struct Moments<'a> {
    pub params: &'a [Tensor],
    /// Running means of the gradient and of its square, shaped like the parameters.
    pub first: &'a [Tensor],
    pub second: &'a [Tensor],
    /// Updates so far: a number each.
    pub steps: &'a [Tensor],
}

/// One update by AdamW (Loshchilov & Hutter, 2019) from the parameters' gradients divided by
/// `divisor`; they are let go of.
pub fn adamw(
    state: Moments,
    divisor: &Tensor,
    rate: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
) -> Result<()> {
    if state.params.is_empty() {
        return Ok(());
    }
    let failed = unsafe {
        anneal_adamw(
            pointers(state.params).as_ptr(),
            pointers(state.first).as_ptr(),
            pointers(state.second).as_ptr(),
            pointers(state.steps).as_ptr(),
            len(state.params),
            divisor.as_ptr(),
            rate,
            betas[0],
            betas[1],
            eps,
            weight_decay,
        )
    };
    if failed != 0 {
        bail!("AdamW: {}", error());
    }
    Ok(())
}

/// The version of libtorch that this was compiled against.
pub fn libtorch_version() -> String {
    unsafe { CStr::from_ptr(anneal_libtorch_version()) }.to_string_lossy().into_owned()
}

fn pointers(tensors: &[Tensor]) -> Vec<*mut C_tensor> {
    tensors.iter().map(|t| t.as_ptr() as *mut C_tensor).collect()
}

fn len(tensors: &[Tensor]) -> c_int {
    c_int::try_from(tensors.len()).expect("fewer than 2³¹ tensors")
}

/// The tensor that a call returned, or why it returned none.
pub fn tensor(pointer: *mut C_tensor) -> Result<Tensor> {
    if pointer.is_null() {
        bail!("{}", error());
    }
    Ok(unsafe { Tensor::from_ptr(pointer) })
}

fn error() -> String {
    unsafe { CStr::from_ptr(anneal_error()) }.to_string_lossy().into_owned()
}

// Every pointer is an at::Tensor that lives through the call; a tensor that is returned is ours.
unsafe extern "C" {
    fn anneal_error() -> *const c_char;
    fn anneal_libtorch_version() -> *const c_char;
    fn anneal_deterministic(strict: c_int);
    fn anneal_gradient_norm(
        params: *const *mut C_tensor,
        count: c_int,
        max_norm: f64,
    ) -> *mut C_tensor;
    fn anneal_adamw(
        params: *const *mut C_tensor,
        first: *const *mut C_tensor,
        second: *const *mut C_tensor,
        steps: *const *mut C_tensor,
        count: c_int,
        divisor: *const C_tensor,
        rate: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
    ) -> c_int;
}
