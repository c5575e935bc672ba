"""Matrices in NF4 as bitsandbytes holds them, their scales rounded as its default and CUDA kernels do:
its C++ for processors now and then takes a neighbour.

Makes blockwise.safetensors beside it, which the worker's tests read:
    python3 blockwise.py        (torch 2.11, bitsandbytes 0.50, safetensors)
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
torch.set_num_threads(1)
outliers = torch.randn(24, 128) * 0.02
outliers[::7, ::11] *= 40
zeros = torch.randn(20, 64) * 0.1
zeros[3:9] = 0
cases = {
    "many": (torch.randn(72, 256) * 0.05).bfloat16(),  # more than 256 blocks
    "outliers": outliers,
    "zeros": zeros,
    "uneven": torch.randn(9, 23),  # neither whole blocks nor whole bytes
}
tensors = {}
for case, weight in cases.items():
    _, plain = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales, table = plain.absmax - state.offset, state.state2.code
    scaled = scales * (1 / state.state2.absmax).repeat_interleave(256)[: len(scales)]
    state.absmax = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    state.dtype = torch.float32
    tensors |= {
        f"{case}.weight": weight,
        f"{case}.packed": packed.reshape(-1),
        f"{case}.scales": state.absmax,
        f"{case}.steps": state.state2.absmax,
        f"{case}.offset": state.offset.reshape(1),
    }
    if case != "many":
        tensors[f"{case}.dequantised"] = bnb.dequantize_4bit(packed, state)
save_file({n: t.contiguous() for n, t in tensors.items()}, Path(__file__).parent / "blockwise.safetensors")
