//! Steps that export GGUF models for llama.cpp.
