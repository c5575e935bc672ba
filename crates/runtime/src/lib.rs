//! A causal language model on ONNX Runtime: sessions, KV cache, sampling.
