//! Checkpoints of a run: all it takes to go on as if nothing had happened.
//!
//! Random numbers need no place here: each step seeds its own. Knows nothing of models.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::optimiser::Optimiser;
use crate::tensor::{bytes, shape};

/// The checkpoint of one run, in its scratch folder. A new one replaces the last in one move.
pub struct Checkpoint {
    path: PathBuf,
    /// The digest of what the run is: its plan. Another run's checkpoint is no use.
    run: String,
}

impl Checkpoint {
    pub fn of(scratch: &Path, run: String) -> Self {
        Self { path: scratch.join("checkpoint.safetensors"), run }
    }

    /// Keeps the state after `step` optimiser steps.
    pub fn save(&self, step: usize, optimiser: &Optimiser) -> Result<()> {
        let tensors: Vec<_> = optimiser
            .tensors()
            .map(|(name, tensor)| (name, dtype_of(tensor), shape(tensor), bytes(tensor)))
            .collect();
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            TensorView::new(*dtype, shape.clone(), data).map(|view| (name, view))
        });
        let about = HashMap::from([
            ("step".to_string(), step.to_string()),
            ("run".to_string(), self.run.clone()),
        ]);
        let new = self.path.with_extension("new");
        safetensors::serialize_to_file(views.collect::<Result<Vec<_>, _>>()?, Some(about), &new)
            .with_context(|| format!("cannot write {}", new.display()))?;
        File::open(&new)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&new, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Keeps the last checkpoint as the best, whatever follows.
    ///
    /// It links that file, once it is there: whenever the run is killed, the best of the steps up
    /// to its last checkpoint is the file under that name, or the last checkpoint itself.
    pub fn keep_as_best(&self) -> Result<()> {
        let (best, new) = (self.best(), self.best().with_extension("new"));
        let gone = fs::remove_file(&new);
        gone.or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })
            .and_then(|()| fs::hard_link(&self.path, &new))
            .and_then(|()| fs::rename(&new, &best))
            .with_context(|| format!("cannot write {}", best.display()))
    }

    /// As [`Self::load`], from the checkpoint that was kept as the best.
    pub fn load_best(&self, optimiser: &mut Optimiser) -> Result<Option<usize>> {
        Self { path: self.best(), run: self.run.clone() }.load(optimiser)
    }

    fn best(&self) -> PathBuf {
        self.path.with_file_name("best.safetensors")
    }

    /// Puts the last checkpoint's state into `optimiser`. Returns the steps that are done: none if
    /// there is no checkpoint of this run.
    pub fn load(&self, optimiser: &mut Optimiser) -> Result<Option<usize>> {
        let context = || format!("cannot read {}", self.path.display());
        if !self.path.exists() {
            return Ok(None);
        }
        let file = fs::read(&self.path).with_context(context)?;
        let Ok((_, header)) = SafeTensors::read_metadata(&file) else { return Ok(None) };
        let about = header.metadata().clone().unwrap_or_default();
        let step = about.get("step").and_then(|step| step.parse().ok());
        let (Some(step), Some(run)) = (step, about.get("run")) else { return Ok(None) };
        if *run != self.run {
            return Ok(None);
        }
        let file = SafeTensors::deserialize(&file).with_context(context)?;
        for (name, tensor) in optimiser.tensors() {
            let saved = file.tensor(&name).with_context(context)?;
            let saved = Tensor::f_from_data_size(saved.data(), &tensor.size(), tensor.kind());
            let saved = saved.with_context(context)?;
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&saved)).with_context(context)?;
        }
        optimiser.set_steps(step);
        Ok(Some(step))
    }
}

/// Parameters and moments are float32, moments in 8 bits bytes.
fn dtype_of(tensor: &Tensor) -> Dtype {
    if tensor.kind() == Kind::Uint8 { Dtype::U8 } else { Dtype::F32 }
}
