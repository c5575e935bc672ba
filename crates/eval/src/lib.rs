//! Steps that measure models: perplexity, exact match.
