//! Steps that make training data: tokenizers, chat datasets.
