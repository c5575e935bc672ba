//! The tensors of a safetensors file.
//!
//! Knows nothing of what they are for.

use anyhow::Context;
use safetensors::tensor::{Dtype, SafeTensors};

use super::{Number, Tensor, Values};

pub fn read(bytes: &[u8]) -> anyhow::Result<Vec<Tensor<'_>>> {
    let mut views = SafeTensors::deserialize(bytes).context("no safetensors file")?.tensors();
    // The crate gives them in no order.
    views.sort_by(|(a, x), (b, y)| (x.data().as_ptr(), a).cmp(&(y.data().as_ptr(), b)));
    let tensors = views.into_iter().map(|(name, view)| {
        let shape = view.shape().to_vec();
        let values = match number(view.dtype()) {
            Some(number) => Values::numbers(number, &shape, view.data().into())
                .with_context(|| format!("tensor `{name}`"))?,
            None => Values::Opaque(view.data().into()),
        };
        Ok(Tensor { name, shape, kind: format!("{:?}", view.dtype()), values })
    });
    tensors.collect()
}

fn number(dtype: Dtype) -> Option<Number> {
    Some(match dtype {
        Dtype::F64 => Number::F64,
        Dtype::F32 => Number::F32,
        Dtype::F16 => Number::F16,
        Dtype::BF16 => Number::BF16,
        Dtype::I64 => Number::I64,
        Dtype::I32 => Number::I32,
        Dtype::I16 => Number::I16,
        Dtype::I8 => Number::I8,
        Dtype::U64 => Number::U64,
        Dtype::U32 => Number::U32,
        Dtype::U16 => Number::U16,
        Dtype::U8 | Dtype::BOOL => Number::U8,
        _ => return None,
    })
}
