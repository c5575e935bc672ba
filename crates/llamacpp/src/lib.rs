//! A causal language model on llama.cpp: what users of a GGUF file will see.
//!
//! Knows nothing of how the file was made. Processor only. Everything is behind the feature
//! `engine`, since it compiles llama.cpp.
//!
//! One build of it gives the same numbers on machines of one instruction set: ggml is compiled
//! for a fixed set (AVX2, FMA and F16C on x86-64), never for the machine at hand, and its own
//! threads divide rows, not sums.

#[cfg(feature = "engine")]
mod chat;
#[cfg(feature = "engine")]
mod error;
#[cfg(feature = "engine")]
mod model;

#[cfg(feature = "engine")]
pub use error::Error;
#[cfg(feature = "engine")]
pub use model::{Attention, Model, Nll};

/// The pinned crate; each version carries its own llama.cpp.
pub const VERSION: &str = "llama-cpp-2 0.1.160";
