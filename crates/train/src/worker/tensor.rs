//! Between libtorch's tensors and safetensors files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::weights::{Dtype, Spec, Weights, Writer};
use step::Failure;
use tch::{Kind, Tensor};

/// The kinds that weights come in.
const KINDS: [(Dtype, Kind); 3] =
    [(Dtype::F32, Kind::Float), (Dtype::F16, Kind::Half), (Dtype::BF16, Kind::BFloat16)];

fn kind_of(dtype: Dtype) -> Result<Kind> {
    let known = KINDS.iter().find(|(known, _)| *known == dtype);
    known.map(|(_, kind)| *kind).with_context(|| format!("no weight has the dtype {dtype:?}"))
}

/// A weight out of a model folder, which lets go of it there.
pub fn read(weights: &Weights, name: &str) -> Result<Tensor> {
    let weight = weights.get(name).map_err(Failure::from)?;
    let shape: Vec<i64> = weight.shape.iter().map(|n| *n as i64).collect();
    let tensor = Tensor::f_from_data_size(weight.data, &shape, kind_of(weight.dtype)?)?;
    weights.let_go(name);
    Ok(tensor)
}

/// A tensor's elements as they lie in memory, whatever its device.
pub fn bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.detach().contiguous();
    let mut data = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut data, tensor.numel());
    data
}

pub fn shape(tensor: &Tensor) -> Vec<usize> {
    tensor.size().iter().map(|n| *n as usize).collect()
}

/// Writes tensors as weights of `dtype`, each rounded once.
pub fn write(path: &Path, dtype: Dtype, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let kind = kind_of(dtype)?;
    let specs = tensors.iter().map(|(name, tensor)| Spec::new(name, dtype, &shape(tensor)));
    let mut writer = Writer::create(path, specs.collect()).map_err(Failure::from)?;
    for spec in writer.order() {
        let tensor = tensors[&spec.name].detach().to_kind(kind);
        writer.write(&spec.name, &bytes(&tensor)).map_err(Failure::from)?;
    }
    Ok(writer.finish().map_err(Failure::from)?)
}

/// The tensors of a file that a script of `golden/` wrote.
#[cfg(test)]
pub fn golden(name: &str) -> std::collections::HashMap<String, Tensor> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/worker/golden");
    let path = folder.join(name).with_extension("safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}
