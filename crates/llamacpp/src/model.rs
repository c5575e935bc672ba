//! One model, one context: tokens in, logits or tokens out.
//!
//! Each call begins with an empty cache, so no answer depends on the one before.

use std::ffi::{CStr, c_char, c_void};
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

use crate::Error;
use crate::chat::Chat;

/// Tokens that are computed at a time.
const BATCH: usize = 512;
/// A model may know more positions than anyone has memory for.
const MOST_POSITIONS: u32 = 8192;

/// How attention is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Attention {
    /// As llama.cpp does it unasked, and so as users have it: fused, with an f16 cache.
    #[default]
    Usual,
    /// In f32 throughout, to hold a file against the checkpoint that it was made of.
    Exact,
}

/// A GGUF model, loaded.
#[derive(Debug)]
pub struct Model {
    /// Borrows `model`, which is why it comes first: fields are dropped in order.
    context: LlamaContext<'static>,
    model: Box<LlamaModel>,
    batch: LlamaBatch<'static>,
    /// None where the file has no template.
    chat: Option<Result<Chat, String>>,
    vocab_size: usize,
}

/// How well a text was foretold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Nll {
    /// −Σ ln p over the supervised tokens, in nats.
    pub sum: f64,
    /// How many they are.
    pub tokens: usize,
}

impl Model {
    /// Loads the GGUF file at `path`; it computes on `threads` threads.
    pub fn load(path: &Path, threads: usize) -> Result<Self, Error> {
        Self::load_with(path, threads, Attention::Usual)
    }

    /// [`Model::load`] with a say in how attention is computed.
    pub fn load_with(path: &Path, threads: usize, attention: Attention) -> Result<Self, Error> {
        Self::open(path, None, threads, attention)
    }

    /// [`Model::load_with`] and the LoRA adapter of another GGUF file, as `--lora` adds it.
    pub fn load_adapted(
        path: &Path,
        adapter: &Path,
        threads: usize,
        attention: Attention,
    ) -> Result<Self, Error> {
        Self::open(path, Some(adapter), threads, attention)
    }

    fn open(
        path: &Path,
        adapter: Option<&Path>,
        threads: usize,
        attention: Attention,
    ) -> Result<Self, Error> {
        let failed = |message: String| Error::Load { path: path.into(), message };
        let backend = backend()?;
        // The crate asserts it in debug builds.
        if let Err(e) = std::fs::metadata(path) {
            return Err(failed(e.to_string()));
        }
        let mut last = LAST_ERROR.lock().expect("no panic while holding it");
        last.clear();
        drop(last);
        let params = LlamaModelParams::default().with_n_gpu_layers(0);
        let mut model = LlamaModel::load_from_file(backend, path, &params)
            .map_err(|e| failed(said(e.to_string())))?;
        let not_added = |path: &Path, why: String| {
            let message = said(why);
            Error::Load { path: path.into(), message }
        };
        let adapter = adapter.map(|path| {
            let loaded = model.lora_adapter_init(path);
            loaded.map(|adapter| (adapter, path)).map_err(|e| not_added(path, e.to_string()))
        });
        let mut adapter = adapter.transpose()?;
        let model = Box::new(model);
        let positions = NonZeroU32::new(model.n_ctx_train().min(MOST_POSITIONS));
        let threads = i32::try_from(threads.max(1)).unwrap_or(i32::MAX);
        let mut params = LlamaContextParams::default()
            .with_n_ctx(positions)
            .with_n_batch(BATCH as u32)
            .with_n_ubatch(BATCH as u32)
            .with_n_threads(threads)
            .with_n_threads_batch(threads)
            .with_offload_kqv(false)
            .with_op_offload(false);
        if attention == Attention::Exact {
            params = params
                .with_flash_attention_policy(llama_cpp_sys_2::LLAMA_FLASH_ATTN_TYPE_DISABLED)
                .with_type_k(KvCacheType::F32)
                .with_type_v(KvCacheType::F32);
        }
        let mut context =
            model.new_context(backend, params).map_err(|e| failed(said(e.to_string())))?;
        if let Some((adapter, path)) = &mut adapter {
            // It lives as long as the model does.
            let set = context.lora_adapter_set(adapter, 1.0);
            set.map_err(|e| not_added(path, e.to_string()))?;
        }
        // SAFETY: the context points at the model, which is boxed, never moved out of the box nor
        // lent as `&mut`, and is dropped after the context.
        let context =
            unsafe { std::mem::transmute::<LlamaContext<'_>, LlamaContext<'static>>(context) };
        let vocab = model.vocab();
        let text = |token: LlamaToken| match token.0 {
            -1 => String::new(),
            _ => vocab.text(token).map_or_else(String::new, |t| t.to_string_lossy().into_owned()),
        };
        let template = model.chat_template(None).ok().and_then(|t| t.to_string().ok());
        let chat = template.map(|source| {
            Chat::new(&source, &text(vocab.bos()), &text(vocab.eos())).map_err(|e| e.to_string())
        });
        let vocab_size = vocab.n_tokens() as usize;
        Ok(Self { context, model, batch: LlamaBatch::new(BATCH, 1), chat, vocab_size })
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Prompt and answer together.
    pub fn max_positions(&self) -> usize {
        self.context.n_ctx() as usize
    }

    /// Special tokens in the text are recognised, none is added.
    pub fn tokenize(&self, text: &str) -> Vec<u32> {
        let tokens = self.model.vocab().tokenize(text.as_bytes(), false, true);
        tokens.into_iter().map(|token| token.0 as u32).collect()
    }

    /// The text of tokens; where it breaks off inside a character, `�`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let vocab = self.model.vocab();
        let mut bytes = Vec::new();
        for token in ids.iter().filter(|id| (**id as usize) < self.vocab_size).map(token) {
            if !(skip_special_tokens && vocab.is_control(token)) {
                bytes.extend(vocab.token_to_piece(token, true, None));
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A conversation of (role, content) as the file's own template has it, up to where the
    /// answer begins.
    pub fn chat_prompt(&self, messages: &[(&str, &str)]) -> Result<String, Error> {
        match &self.chat {
            None => Err(Error::NoTemplate),
            Some(Err(message)) => Err(Error::Template { message: message.clone() }),
            Some(Ok(chat)) => chat.prompt(messages),
        }
    }

    /// The tokens that end an answer, by llama.cpp's lights. Ascending.
    pub fn end_ids(&self) -> Vec<u32> {
        let vocab = self.model.vocab();
        (0..self.vocab_size as u32).filter(|id| vocab.is_eog(token(id))).collect()
    }

    /// For each position the logits of what comes next: \[tokens\]\[vocabulary\].
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, Error> {
        let mut all = Vec::with_capacity(tokens.len());
        self.forward(tokens, |_| true, |_, logits| all.push(logits.to_vec()))?;
        Ok(all)
    }

    /// How well the tokens marked in `supervised` are foretold by those before them. The first
    /// token of all has nothing before it and does not count.
    pub fn nll(&mut self, tokens: &[u32], supervised: &[bool]) -> Result<Nll, Error> {
        if tokens.len() != supervised.len() {
            return Err(Error::Marks { tokens: tokens.len(), marks: supervised.len() });
        }
        let mut nll = Nll::default();
        let foretells = |at: usize| supervised.get(at + 1) == Some(&true);
        self.forward(tokens, foretells, |at, logits| {
            nll.sum -= log_probability(logits, tokens[at + 1]);
            nll.tokens += 1;
        })?;
        Ok(nll)
    }

    /// The greedy answer to a prompt, without the token that ended it. It also ends where the
    /// context does.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        end_ids: &[u32],
    ) -> Result<Vec<u32>, Error> {
        let last = prompt.len().saturating_sub(1);
        let mut next = 0;
        self.forward(prompt, |at| at == last, |_, logits| next = greedy(logits))?;
        let mut answer = Vec::new();
        while answer.len() < max_new && !end_ids.contains(&next) {
            answer.push(next);
            let at = prompt.len() + answer.len() - 1;
            if answer.len() == max_new || at >= self.max_positions() {
                break;
            }
            self.decode_batch(&[next], at, |_| true, |_, logits| next = greedy(logits))?;
        }
        Ok(answer)
    }

    /// Reads `tokens` into an empty cache, and shows `see` the logits of the positions that are
    /// `wanted`, in order.
    fn forward(
        &mut self,
        tokens: &[u32],
        wanted: impl Fn(usize) -> bool,
        mut see: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let max = self.max_positions();
        if tokens.is_empty() {
            return Err(Error::Empty);
        }
        if tokens.len() > max {
            return Err(Error::TooLong { tokens: tokens.len(), max });
        }
        if let Some(&id) = tokens.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(Error::Token { id, vocab_size: self.vocab_size });
        }
        self.context.clear_kv_cache();
        // llama.cpp rounds a small context up, and asserts that no batch is larger than it was.
        let batch = BATCH.min(self.context.n_batch() as usize);
        for (n, part) in tokens.chunks(batch).enumerate() {
            self.decode_batch(part, n * batch, &wanted, &mut see)?;
        }
        Ok(())
    }

    /// Reads a batch that stands at position `from`.
    fn decode_batch(
        &mut self,
        tokens: &[u32],
        from: usize,
        wanted: impl Fn(usize) -> bool,
        mut see: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let failed = |message: String| Error::Decode { message };
        self.batch.clear();
        for (i, id) in tokens.iter().enumerate() {
            let at = from + i;
            self.batch
                .add(token(id), at as i32, &[0], wanted(at))
                .map_err(|e| failed(e.to_string()))?;
        }
        self.context.decode(&mut self.batch).map_err(|e| failed(said(e.to_string())))?;
        for i in (0..tokens.len()).filter(|i| wanted(from + i)) {
            see(from + i, self.context.get_logits_ith(i as i32));
        }
        Ok(())
    }
}

fn token(id: &u32) -> LlamaToken {
    LlamaToken(*id as i32)
}

/// The most likely token; the lowest id where two are equal.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// ln softmax(logits)\[id\], in f64.
fn log_probability(logits: &[f32], id: u32) -> f64 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - highest).exp()).sum();
    f64::from(logits[id as usize]) - highest - sum.ln()
}

/// llama.cpp, started once and never stopped.
fn backend() -> Result<&'static LlamaBackend, Error> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    let started = BACKEND.get_or_init(|| {
        // SAFETY: the function lives as long as the program and touches nothing but its lock.
        unsafe { llama_cpp_sys_2::llama_log_set(Some(log), std::ptr::null_mut()) };
        LlamaBackend::init().map_err(|e| e.to_string())
    });
    started.as_ref().map_err(|message| Error::Backend { message: message.clone() })
}

/// What llama.cpp last complained of: its functions return no reasons.
static LAST_ERROR: Mutex<String> = Mutex::new(String::new());

unsafe extern "C" fn log(
    level: llama_cpp_sys_2::ggml_log_level,
    text: *const c_char,
    _: *mut c_void,
) {
    if level == llama_cpp_sys_2::GGML_LOG_LEVEL_ERROR && !text.is_null() {
        // SAFETY: llama.cpp passes a C string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        if let Ok(mut last) = LAST_ERROR.lock()
            && last.is_empty()
        {
            // The first complaint is the cause.
            *last = text.trim().to_string();
        }
    }
}

/// What llama.cpp said about a failure, else `otherwise`.
fn said(otherwise: String) -> String {
    let mut last = LAST_ERROR.lock().expect("no panic while holding it");
    match std::mem::take(&mut *last) {
        said if said.is_empty() => otherwise,
        said => said,
    }
}
