"""The other side of `cargo xtask bench train`: transformers and PEFT in a plain loop.

`train.py --make DIR DEVICE` fills a model folder with random weights for the config.json in it.
`train.py REQUEST.json` trains on the request that our worker takes, and answers in its protocol:
the same weights, rows, first adapter and keys, so the losses are to agree.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

# In the order of the forward pass, in which our worker draws the adapter.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def emit(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)


def make(folder, device):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def load(params, folder):
    compute = getattr(torch, params["compute"])
    four_bits = None
    if params["bits"] == 4:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=compute,
        attn_implementation="sdpa",
        quantization_config=four_bits,
        device_map=params["device"],
    )
    targets = params["target_modules"]
    config = LoraConfig(
        r=params["rank"],
        lora_alpha=params["alpha"],
        lora_dropout=params["dropout"],
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.config.use_cache = False
    # The draws of our worker. B is zero on both sides.
    torch.manual_seed(params["seed"])
    for layer in model.get_base_model().model.layers:
        linears = {name.rsplit(".", 1)[-1]: module for name, module in layer.named_modules()}
        for name in LINEARS:
            if hasattr(linears[name], "lora_A"):
                a = linears[name].lora_A["default"].weight
                bound = a.shape[1] ** -0.5
                a.data.copy_(torch.empty(a.shape).uniform_(-bound, bound))
    return model


def batch(params, folder):
    """All rows, each less its last token, and what comes after each position."""
    data = load_file(Path(folder) / "train.safetensors")
    rows = [data["input_ids"][a:b].long() for a, b in data["offsets"].unfold(0, 2, 1).tolist()]
    ids, targets = [r[:-1] for r in rows], [r[1:] for r in rows]
    if params["packing"] == "always":
        # With positions that begin again and no mask, transformers keeps the rows apart.
        positions = torch.cat([torch.arange(len(r)) for r in ids])[None]
        made = {"input_ids": torch.cat(ids)[None], "position_ids": positions}
        targets = torch.cat(targets)[None]
    else:
        made, targets = {"input_ids": torch.stack(ids)}, torch.stack(targets)
    made |= {"labels": targets, "shift_labels": targets}
    return {name: tensor.to(params["device"]) for name, tensor in made.items()}


def train(request):
    params = request["params"]
    torch.set_num_threads(request["threads"])
    if params["bits"] == 4:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            emit("note", text="bitsandbytes cannot be imported")
            return
    model = load(params, request["inputs"]["base"][0]["path"])
    inputs = batch(params, request["inputs"]["dataset"][0]["path"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained,
        lr=params["learning_rate"],
        betas=params["betas"],
        weight_decay=params["weight_decay"],
        fused=True,
    )
    model.train()
    # The rows are one batch.
    steps, last = int(params["epochs"]), 0.0
    for step in range(1, steps + 1):
        loss = model(**inputs).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, params["max_grad_norm"])
        optimiser.step()
        optimiser.zero_grad()
        values = {"loss": loss.item(), "grad_norm": norm.item()}
        # As often as our worker does.
        if time.monotonic() - last >= 0.1 or step == steps:
            last = time.monotonic()
            emit("progress", phase="train", done=step, total=steps, unit="steps", values=values)


if sys.argv[1] == "--make":
    make(*sys.argv[2:])
else:
    train(json.loads(Path(sys.argv[1]).read_text()))
