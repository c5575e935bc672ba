//! The exported file in llama.cpp itself.
