//! Steps that bring in what others made: Hugging Face repositories, URLs.
