"""Tiny random models of each architecture, and what transformers and PEFT compute with them.

Makes the folders beside it, which the tests of this and other workers read, or those that are named:
    python3 make.py [NAME ...]        (torch 2.11, transformers 5.23, peft 0.21, safetensors)

Shapes are odd on purpose: heads that are not hidden / heads wide, windows shorter than the rows,
positions beyond where the rotary scaling begins, and of Phi-3 before it too.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
COMMON = dict(
    vocab_size=48, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=None,
)
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.25, 1.5], "long_factor": [1.5, 3.0, 4.5],
}
MODELS = {
    "llama": LlamaConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, attention_bias=True, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "mistral": MistralConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, sliding_window=7, tie_word_embeddings=True,
    ),
    "qwen2": Qwen2Config(
        **COMMON, num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1,
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=16, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(
        **COMMON, num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=20, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    ),
    # transformers holds longrope's factors to hidden / heads: 8, of which 6 turn.
    "phi3": Phi3Config(
        **COMMON | {"hidden_size": 32}, num_hidden_layers=2, sliding_window=7, tie_word_embeddings=False,
        original_max_position_embeddings=16, rope_parameters=dict(LONGROPE),
    ),
    "phi3-short": Phi3Config(
        **COMMON | {"hidden_size": 32}, num_hidden_layers=1, tie_word_embeddings=True,
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
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    ids = torch.randint(0, config.vocab_size, (2, 23))
    with torch.no_grad():
        logits = model(ids).logits
    adapter = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(model, adapter)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for weight in trained.values():
        torch.nn.init.normal_(weight, 0.0, 0.2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    tensors = {"ids": ids, "logits": logits, "loss": loss.detach().reshape(1)}
    for n, weight in trained.items():
        n = n.replace(".default", "").removeprefix("base_model.model.")
        tensors["adapter." + n] = weight.detach().clone()
        tensors["gradient." + n] = weight.grad.clone()

    # Fifty steps on the same rows.
    optimiser = torch.optim.AdamW(trained.values(), lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "expected.safetensors")
    text = json.loads((folder / "config.json").read_text())
    print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes", text.get("layer_types"))
