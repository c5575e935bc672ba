//! Steps that train: pretraining from scratch, LoRA.
