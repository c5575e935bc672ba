//! A Hugging Face model folder: config.json, safetensors, tokenizer, chat template.
