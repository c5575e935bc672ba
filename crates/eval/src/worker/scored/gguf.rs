//! A GGUF file on llama.cpp, with the tokenizer and the chat template that it carries.
//!
//! Knows nothing of ONNX Runtime.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use checkpoint::chat::Message;
use llamacpp::Model;
use step::Failure;
use step::worker::{Input, Job};

use super::Scored;

pub struct Gguf {
    model: Model,
    stop_ids: Vec<u32>,
}

pub fn open(job: &Job, input: &Input) -> Result<Gguf> {
    let path = file_in(&input.path)?;
    let bytes = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    // llama.cpp's threads spin while they wait for each other: on a busy machine two of them fell
    // from thousands of tokens a second to under thirty, with a model too small to need the second.
    let model = Model::load(&path, job.threads_for(bytes)).map_err(failed)?;
    job.version("llama.cpp", llamacpp::VERSION);
    Ok(Gguf { stop_ids: model.end_ids(), model })
}

/// The one GGUF file of an artifact.
fn file_in(dir: &Path) -> Result<PathBuf> {
    let context = || format!("cannot read {}", dir.display());
    let mut files = Vec::new();
    for entry in dir.read_dir().with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.extension().is_some_and(|e| e == "gguf") {
            files.push(path);
        }
    }
    match files.as_slice() {
        [one] => Ok(one.clone()),
        _ => {
            let message = format!("{}: {} GGUF files, expected one", dir.display(), files.len());
            Err(Failure::input(message).into())
        }
    }
}

impl Scored for Gguf {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn logits(&mut self, rows: &[&[u32]]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for row in rows {
            all.extend(self.model.logits(row).map_err(failed)?.into_iter().flatten());
        }
        Ok(all)
    }

    fn answers(&mut self, prompts: &[Vec<u32>], max_new: usize) -> Result<Vec<Vec<u32>>> {
        let answer = |prompt: &Vec<u32>| self.model.generate(prompt, max_new, &self.stop_ids);
        Ok(prompts.iter().map(answer).collect::<Result<_, _>>().map_err(failed)?)
    }

    fn prompt(&self, messages: &[Message]) -> Result<String> {
        let turns: Vec<(&str, &str)> =
            messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        Ok(self.model.chat_prompt(&turns).map_err(failed)?)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.model.tokenize(text))
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.model.decode(ids, true))
    }
}

fn failed(error: llamacpp::Error) -> Failure {
    match error {
        llamacpp::Error::Backend { .. } | llamacpp::Error::Decode { .. } => {
            Failure::environment(error.to_string())
        }
        _ => Failure::input(error.to_string()),
    }
}
