//! What tch does not offer of libtorch: the Rust side of shim.cpp.
//!
//! Knows nothing of models or training steps.

use std::ffi::{CStr, c_char, c_int};

use anyhow::{Context, Result};
use tch::Tensor;
use torch_sys::C_tensor;

/// Asks libtorch for operations that give the same bits every time. Where it has none, it fails
/// if `strict`, else warns.
pub fn deterministic(strict: bool) {
    unsafe { anneal_deterministic(c_int::from(strict)) }
}

/// Goes back from `output`, whose gradient is given, and adds to the gradients of what it hangs on.
pub fn backward(output: &Tensor, gradient: &Tensor) -> Result<()> {
    match unsafe { anneal_backward(output.as_ptr(), gradient.as_ptr()) } {
        0 => Ok(()),
        _ => Err(failure()).context("the way back"),
    }
}

/// The most bytes that libtorch has held of a CUDA device at once, where it tells.
pub fn peak_memory(device: usize) -> Option<u64> {
    let device = c_int::try_from(device).ok()?;
    u64::try_from(unsafe { anneal_peak_memory(device) }).ok()
}

/// The version of libtorch that this was compiled against.
pub fn libtorch_version() -> String {
    unsafe { CStr::from_ptr(anneal_libtorch_version()) }.to_string_lossy().into_owned()
}

/// The tensor that a call returned, or why it returned none.
pub fn tensor(pointer: *mut C_tensor) -> Result<Tensor> {
    if pointer.is_null() {
        return Err(failure());
    }
    Ok(unsafe { Tensor::from_ptr(pointer) })
}

/// What the last call that failed said.
pub fn failure() -> anyhow::Error {
    let message = unsafe { CStr::from_ptr(anneal_error()) };
    anyhow::Error::msg(message.to_string_lossy().into_owned())
}

// Every pointer is an at::Tensor that lives through the call; a tensor that is returned is ours.
unsafe extern "C" {
    fn anneal_error() -> *const c_char;
    fn anneal_libtorch_version() -> *const c_char;
    fn anneal_peak_memory(device: c_int) -> i64;
    fn anneal_deterministic(strict: c_int);
    fn anneal_backward(output: *const C_tensor, gradient: *const C_tensor) -> c_int;
}
