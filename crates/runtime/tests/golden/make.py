"""Tiny random models of each architecture, and the logits that transformers computes with them.

Makes the folders beside it, or those that are named:
    python3 make.py [NAME ...]        (torch 2.11, transformers 5.23, safetensors)

As those of crates/train/src/worker/golden, but with heads that ONNX Runtime's attention takes (of a
multiple of 16) and widths in which a whole number of blocks lies, so that each can be quantised.
Windows are shorter than the rows, and rows longer than where rotary scaling begins.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
COMMON = dict(
    vocab_size=40, hidden_size=32, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=None,
)
PHI = COMMON | {"hidden_size": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.75 * i for i in range(8)],
}
MODELS = {
    "llama": LlamaConfig(
        **COMMON, num_hidden_layers=2, head_dim=32, attention_bias=True, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "mistral": MistralConfig(
        **COMMON, num_hidden_layers=2, head_dim=32, sliding_window=7, tie_word_embeddings=True,
    ),
    "qwen2": Qwen2Config(
        **COMMON, num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1,
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=32, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(
        **COMMON, num_hidden_layers=3, head_dim=32, query_pre_attn_scalar=20, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    ),
    # transformers holds longrope's factors to hidden / heads: 32, of which 16 turn.
    "phi3": Phi3Config(
        **PHI, num_hidden_layers=2, sliding_window=7, tie_word_embeddings=False,
        original_max_position_embeddings=16, rope_parameters=dict(LONGROPE),
    ),
    "phi3-short": Phi3Config(
        **PHI, num_hidden_layers=1, tie_word_embeddings=True,
        original_max_position_embeddings=23, rope_parameters=LONGROPE | {"attention_factor": 1.3},
    ),
}


def randomise(model):
    """What starts as ones or zeros would hide that it is used."""
    for name, weight in model.named_parameters():
        from_zero = model.config.model_type == "gemma3_text"
        scale, shift = (0.1, 0.0 if from_zero else 1.0) if "norm" in name else (0.3, 0.0)
        torch.nn.init.normal_(weight, shift, scale)


for name in sys.argv[1:] or MODELS:
    config = MODELS[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomise(model)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    # Files of half the size. What is computed below is computed in float32, from the same values.
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, config.vocab_size, (2, 23))
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"ids": ids.int(), "logits": logits.contiguous()}, folder / "expected.safetensors")
    text = json.loads((folder / "config.json").read_text())
    print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes", text.get("layer_types"))
