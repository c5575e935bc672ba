"""Two adapters for each tiny model of the train family's golden folder, and what PEFT merges of them.

Makes the folders beside it, which the tests of checkpoint, merge and adapter read,
or those that are named:
    python3 make.py [NAME ...]        (torch 2.11, transformers 5.23, peft 0.21, safetensors)

`first` is that folder's own adapter; `second` has ranks and alphas by pattern, and rsLoRA. Of the
merged weights only the last block is kept: files stay small, and names and shapes are those of all.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
BASES = HERE / "../../../train/src/worker/golden"
WEIGHTS = {"first": 0.7, "second": -0.4}


def first():
    return LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")


def second(queries, values, last):
    return LoraConfig(
        r=2, lora_alpha=5, use_rslora=True, target_modules=sorted({queries, values, "down_proj"}),
        rank_pattern={"down_proj": 4, f"^model.layers.{last}.self_attn.{queries}": 1},
        # The first key that fits is taken: the second is for the other blocks.
        alpha_pattern={f"layers.{last}.self_attn.{values}": 7, f"self_attn.{values}": 3.5},
        task_type="CAUSAL_LM",
    )


def base(name):
    return AutoModelForCausalLM.from_pretrained(BASES / name, dtype=torch.float32)


def merged(name, adapter, queries, last):
    """The merge of a saved adapter, or of both by their weights, into a fresh base."""
    model = PeftModel.from_pretrained(base(name), HERE / name / "first", adapter_name="first")
    model.load_adapter(HERE / name / "second", adapter_name="second")
    # PEFT takes rsLoRA and the like of the combined adapter from the first in the list.
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "both", combination_type="cat")
    model.set_adapter(adapter)
    weights = model.merge_and_unload().state_dict()
    # Files stay small: every layer of both together, queries alone of one adapter.
    wanted = "proj.weight" if adapter == "both" else f"self_attn.{queries}.weight"
    layer = f"model.layers.{last}."
    return {n: t for n, t in weights.items() if n.startswith(layer) and n.endswith(wanted)}


for name in sys.argv[1:] or ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"]:
    queries, values = ("qkv_proj", "qkv_proj") if name == "phi3" else ("q_proj", "v_proj")
    torch.manual_seed(11)
    model = base(name)
    last = model.config.num_hidden_layers - 1
    model = get_peft_model(model, first(), adapter_name="first")
    model.add_adapter("second", second(queries, values, last))
    theirs = load_file(BASES / name / "expected.safetensors")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_" in n and ".first." in n:
                p.copy_(theirs["adapter." + n.replace(".first", "").removeprefix("base_model.model.")])
            elif ".lora_" in n:
                torch.nn.init.normal_(p, 0.0, 0.2)
    for config in model.peft_config.values():
        config.base_model_name_or_path = f"tiny/{name}"
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for card in folder.rglob("README.md"):
        card.unlink()
    kept = {}
    for adapter in ["first", "second", "both"]:
        kept |= {f"{adapter}.{n}": t.contiguous() for n, t in merged(name, adapter, queries, last).items()}
    save_file(kept, folder / "merged.safetensors")
    print(name, [(str(f.relative_to(folder)), f.stat().st_size) for f in folder.rglob("*.*")])
