"""Values, and what ONNX Runtime's own quantiser makes of them, for the tests of quantise.rs.

    python3 make.py > quantised.txt        (onnxruntime 1.30, numpy)

The first line holds the values in f32, as hexadecimal bits; then for each case: bits, block, whether
symmetric, whether in f16, K; and below it levels, scales (as bits of f32), and zero points.
"""

import numpy as np
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

rng = np.random.default_rng(3)
values = rng.standard_normal(2 * 288) * 0.05
values[:32] = 0  # a block of zeros,
values[32:64] = np.abs(values[32:64]) + 0.25  # one without a negative value,
values[64:96] = -np.abs(values[64:96])  # one without a positive one,
values[96:128] = np.arange(-16, 16) / 32  # and one of halves between levels.
values = values.astype(np.float16).astype(np.float32)


def text(numbers):
    return " ".join(f"{n:x}" for n in numbers.reshape(-1))


def bits_of(floats):
    return floats.astype(np.float32).view(np.uint32)


print("# Made by make.py.")
print(text(bits_of(values)))
for bits, quantise in ((4, quantize_matmul_4bits), (8, quantize_matmul_8bits)):
    for block, k in ((32, 288), (128, 288)):
        for symmetric in (1, 0):
            for half in (0, 1):
                kind = np.float16 if half else np.float32
                n, blocks = values.size // k, -(-k // block)
                # The quantiser reads all of the last block.
                weight = np.zeros((blocks * block, n), kind)
                weight[:k] = values.reshape(n, k).T
                levels = np.zeros((n, blocks, block * bits // 8), np.uint8)
                scales = np.zeros((n, blocks), kind)
                zeros = np.zeros((n, -(-blocks * bits // 8)), np.uint8)
                quantise(levels, weight, scales, zeros, block, n, k, bool(symmetric))
                print(bits, block, symmetric, half, k)
                print(text(levels), text(bits_of(scales)), text(zeros), sep="\n")
