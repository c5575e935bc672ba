"""What optimisers make of a matrix and a vector in four steps.

Makes optimisers.safetensors beside it, which the worker's tests read:
    python3 optimisers.py        (torch 2.11, transformers 5.23, bitsandbytes 0.50, safetensors)

AdamW in 8 bits is bitsandbytes' optimizer_update_8bit_blockwise; its moments are rounded as its
default and CUDA kernels do, where its C++ for processors now and then takes a neighbour.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.cpu import ops
from safetensors.torch import save_file
from transformers.optimization import Adafactor

STEPS, RATE, DECAY = 4, 1e-2, 0.1


def nearest(numbers, table, scales, codes, size):
    bounds = (table[:-1] + table[1:]) / 2
    for i, block in enumerate(numbers.view(-1).split(size)):
        scales[i] = block.abs().max()
        codes[i * size : (i + 1) * size] = torch.bucketize(block * (1 / scales[i]), bounds).to(torch.uint8)


ops._quant_blockwise_fp32_direct = nearest

torch.manual_seed(0)
start = {"matrix": torch.randn(70, 72), "vector": torch.randn(100)}
gradients = {
    name: torch.stack([torch.randn_like(p) * 10.0 ** torch.randn_like(p) for _ in range(STEPS)])
    for name, p in start.items()
}
tensors = {f"start.{n}": p for n, p in start.items()} | {f"gradients.{n}": g for n, g in gradients.items()}

params = {name: p.clone().requires_grad_() for name, p in start.items()}
adafactor = Adafactor(
    params.values(), lr=RATE, scale_parameter=False, relative_step=False, weight_decay=DECAY
)
for step in range(STEPS):
    for name, p in params.items():
        p.grad = gradients[name][step].clone()
    adafactor.step()
tensors |= {f"adafactor.{n}": p.detach() for n, p in params.items()}

matrix = start["matrix"].clone()
tables = [bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)]
codes = [torch.zeros(matrix.numel(), dtype=torch.uint8) for _ in tables]
scales = [torch.zeros(-(-matrix.numel() // 256)) for _ in tables]
for step in range(STEPS):
    flat = matrix.view(-1)
    ops._optimizer_update_8bit_blockwise_cpu(
        "adam", gradients["matrix"][step].view(-1), flat, codes[0], codes[1], 0.9, 0.99, 0.0, 0.0, 1e-8,
        step + 1, RATE, tables[0], tables[1], scales[0], scales[1], DECAY, 1.0,
    )
tensors |= {"adamw-8bit.matrix": matrix, "adamw-8bit.first": codes[0], "adamw-8bit.second": codes[1]}
save_file({n: t.contiguous() for n, t in tensors.items()}, Path(__file__).parent / "optimisers.safetensors")
