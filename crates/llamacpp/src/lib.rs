//! A causal language model on llama.cpp.
