//! A plain or ONNX model folder on ONNX Runtime.
//!
//! Knows nothing of llama.cpp.

use anyhow::Result;
use checkpoint::chat::{Message, Template, Tokenizer};
use runtime::{Model, Options, Runtime};
use step::Failure;
use step::worker::{Input, Job};

use super::Scored;

pub struct Onnx {
    model: Model,
    template: Template,
    tokenizer: Tokenizer,
    stop_ids: Vec<u32>,
}

pub fn open(job: &Job, input: &Input) -> Result<Onnx> {
    let runtime = Runtime::init(job.tool("onnxruntime")?).map_err(Failure::from)?;
    job.version("onnxruntime", runtime.version());
    let tokenizer = Tokenizer::from_dir(&input.path).map_err(Failure::from)?;
    let template = Template::from_dir(&input.path).map_err(Failure::from)?;
    // A plain folder's graph: it lives as long as this model is measured.
    let scratch = job.scratch().join("graph").join(&input.label);
    let options = Options { threads: job.threads(), scratch: &scratch };
    let model = Model::open(&input.path, options).map_err(Failure::from)?;
    Ok(Onnx { model, template, stop_ids: tokenizer.end_ids(), tokenizer })
}

impl Scored for Onnx {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn logits(&mut self, rows: &[&[u32]]) -> Result<Vec<f32>> {
        Ok(self.model.logits_batch(rows).map_err(Failure::from)?)
    }

    fn answers(&mut self, prompts: &[Vec<u32>], max_new: usize) -> Result<Vec<Vec<u32>>> {
        let answers = self.model.generate_batch(prompts, max_new, &self.stop_ids);
        Ok(answers.map_err(Failure::from)?)
    }

    fn prompt(&self, messages: &[Message]) -> Result<String> {
        Ok(self.template.render(messages, true).map_err(Failure::from)?)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text).map_err(Failure::from)?)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.tokenizer.decode(ids, true).map_err(Failure::from)?)
    }
}
