//! What an optimiser does to parameters, once their gradients are there: the Rust side of update.cpp.
//!
//! Knows nothing of models or schedules.

use std::ffi::c_int;

use anyhow::{Context, Result};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::{blockwise, shim};

/// The common 2-norm of the gradients of `params`, and what to divide them by so that it is at most
/// `max_norm` (0: any): tensors of no dimensions on the parameters' device.
pub fn gradient_norm(params: &[&Tensor], max_norm: f64) -> Result<(Tensor, Tensor)> {
    let both = unsafe { anneal_gradient_norm(pointers(params).as_ptr(), len(params), max_norm) };
    let both = shim::tensor(both).context("the norm of the gradients")?;
    Ok((both.get(0), both.get(1)))
}

/// How one update is made.
pub struct Update<'a> {
    /// What the gradients are divided by: of no dimensions, on their device.
    pub divisor: &'a Tensor,
    /// Counted from 1.
    pub step: usize,
    pub rate: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
}

/// Parameters with what AdamW remembers of each: lists of one length.
#[derive(Default)]
pub struct Moments<'a> {
    pub params: Vec<&'a Tensor>,
    /// Running means of the gradient and of its square, shaped like the parameters.
    pub first: Vec<&'a Tensor>,
    pub second: Vec<&'a Tensor>,
    /// Updates so far: a number each.
    pub steps: Vec<&'a Tensor>,
}

impl Update<'_> {
    /// By AdamW (Loshchilov & Hutter, 2019). Lets go of the gradients.
    pub fn adamw(&self, state: &Moments) -> Result<()> {
        if state.params.is_empty() {
            return Ok(());
        }
        let [params, first, second, steps] =
            [&state.params, &state.first, &state.second, &state.steps].map(|all| pointers(all));
        done(unsafe {
            anneal_adamw(
                params.as_ptr(),
                first.as_ptr(),
                second.as_ptr(),
                steps.as_ptr(),
                len(&params),
                self.divisor.as_ptr(),
                self.rate,
                self.betas[0],
                self.betas[1],
                self.eps,
                self.weight_decay,
            )
        })
        .context("AdamW")
    }

    /// By AdamW with its moments in 8 bits. Lets go of the gradient.
    pub fn adamw_8bit(&self, param: &Tensor, state: &blockwise::Moments) -> Result<()> {
        done(unsafe {
            anneal_adamw_8bit(
                param.as_ptr(),
                state.first.as_ptr(),
                state.first_scales.as_ptr(),
                state.second.as_ptr(),
                state.second_scales.as_ptr(),
                self.step as i64,
                self.divisor.as_ptr(),
                self.rate,
                self.betas[0],
                self.betas[1],
                self.eps,
                self.weight_decay,
            )
        })
        .context("AdamW in 8 bits")
    }

    /// By Adafactor (Shazeer & Stern, 2018), which has no betas. Lets go of the gradient.
    pub fn adafactor(&self, param: &Tensor, state: &Squares) -> Result<()> {
        let null = std::ptr::null();
        let (rows, columns, second) = match state {
            Squares::Factored { rows, columns } => (rows.as_ptr(), columns.as_ptr(), null),
            Squares::Each(second) => (null, null, second.as_ptr()),
        };
        done(unsafe {
            anneal_adafactor(
                param.as_ptr(),
                rows,
                columns,
                second,
                self.step as i64,
                self.divisor.as_ptr(),
                self.rate,
                self.weight_decay,
            )
        })
        .context("Adafactor")
    }
}

/// The second moment that Adafactor remembers of a parameter.
pub enum Squares {
    /// Means over each row and over each column.
    Factored { rows: Tensor, columns: Tensor },
    /// Of every number.
    Each(Tensor),
}

impl Squares {
    /// All zero, for a parameter of this shape on its device.
    pub fn new(param: &Tensor) -> Self {
        let zeros = |size| Tensor::zeros([size], (Kind::Float, param.device()));
        match param.size()[..] {
            [rows, columns] => Self::Factored { rows: zeros(rows), columns: zeros(columns) },
            _ => Self::Each(param.detach().zeros_like()),
        }
    }
}

fn done(failed: c_int) -> Result<()> {
    if failed == 0 { Ok(()) } else { Err(shim::failure()) }
}

fn pointers<T: std::borrow::Borrow<Tensor>>(tensors: &[T]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.borrow().as_ptr()).collect()
}

fn len<T>(all: &[T]) -> c_int {
    c_int::try_from(all.len()).expect("fewer than 2³¹ tensors")
}

// Every pointer is an at::Tensor that lives through the call; a tensor that is returned is ours.
unsafe extern "C" {
    fn anneal_gradient_norm(
        params: *const *const C_tensor,
        count: c_int,
        max_norm: f64,
    ) -> *mut C_tensor;
    fn anneal_adamw(
        params: *const *const C_tensor,
        first: *const *const C_tensor,
        second: *const *const C_tensor,
        steps: *const *const C_tensor,
        count: c_int,
        divisor: *const C_tensor,
        rate: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
    ) -> c_int;
    fn anneal_adamw_8bit(
        param: *const C_tensor,
        first: *const C_tensor,
        first_scales: *const C_tensor,
        second: *const C_tensor,
        second_scales: *const C_tensor,
        step: i64,
        divisor: *const C_tensor,
        rate: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
    ) -> c_int;
    fn anneal_adafactor(
        param: *const C_tensor,
        rows: *const C_tensor,
        columns: *const C_tensor,
        second: *const C_tensor,
        step: i64,
        divisor: *const C_tensor,
        rate: f64,
        weight_decay: f64,
    ) -> c_int;
}
