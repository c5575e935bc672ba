"""Makes blocks.safetensors beside it: values, and the bytes that ggml makes of them as each type.

    python3 make_blocks.py .../libggml-base.so        (numpy, safetensors; llama.cpp of llama-cpp-python 0.3.36)

Each row is a block of 256, or eight of 32. The first are there to hurt: what rounds to zero, what
has no inverse, what has no sign, what a part's trials cannot improve. The rest is weights.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
TYPES = {
    "Q4_0": (2, 18), "Q5_0": (6, 22), "Q5_1": (7, 24), "Q8_0": (8, 34),
    "Q4_K": (12, 144), "Q5_K": (13, 176), "Q6_K": (14, 210),
}
rng = np.random.default_rng(7)


def normal(scale=1.0):
    return rng.standard_normal(256) * scale


def bf16(x):
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return (bits & 0xFFFF0000).view(np.float32)


def parts(scales):
    """Sixteen parts, each of its own size."""
    return normal() * np.repeat(np.resize(scales, 16), 16)


def outlier(at, value):
    row = normal(0.02)
    row[at] = value
    return row


def rows():
    ramp = np.linspace(-1, 1, 256)
    yield from [np.zeros(256), np.full(256, -0.0), np.full(256, 0.37), np.full(256, -0.37)]
    # The first or the last value is the largest; two are, and differ in sign.
    yield from [outlier(0, 3), outlier(255, -3), outlier(31, -7), outlier([40, 50], [2, -2])]
    yield from [abs(normal()), -abs(normal()), 0.5 + normal(1e-6), -0.5 + normal(1e-6), 8 + normal()]
    # Scales that are subnormal as f16, that round to zero, that have no inverse as f32.
    yield from [normal(scale) for scale in [1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-14, 1e-15, 1e-16]]
    yield from [normal(scale) for scale in [1e-20, 1e-30, 1e-37, 1e-38, 1e-39, 1e-40, 1e-44]]
    yield from [2e4 * ramp, normal(1e4), 6e4 * ramp, np.sign(normal()) * 65000]
    # Parts whose scale is lost beside the others', as all or some of their values are zero or tiny.
    yield from [parts([0, 1]), parts([1, 0, 0, 0]), parts([1, 1e-3]), parts([1, 1e-6, 1e-12])]
    yield from [parts([1e-5, 1e-9, 0]), parts([1e4, 1e-4]), parts(10.0 ** np.arange(-12, 4))]
    constant = parts([1, 0, 1e-3])
    constant[64:96], constant[128:160] = 0.25, -0.25
    yield from [constant, constant * 1e-7]
    # Halves, for rounding; signs alone; few values; a ramp.
    yield from [np.arange(256) % 31 / 2 - 7.5, np.sign(normal()), np.round(normal()), ramp]
    yield from [np.where(rng.random(256) < share, normal(), 0) for share in [0.02, 0.1, 0.5]]
    # Any bits of a bf16 between 2^-20 and 2^4.
    noise = rng.integers(0, 2**16, (4, 256)).astype(np.uint32)
    exponent = 107 + rng.integers(0, 24, (4, 256)).astype(np.uint32)
    yield from ((noise & 0x807F | exponent << 7) << 16).view(np.float32)
    for scale in np.geomspace(0.002, 2, 16):
        yield normal(scale)
    for _ in range(28):
        yield bf16(normal(0.02) * np.repeat(rng.lognormal(0, 1, 8), 32))


def main():
    ggml = ctypes.CDLL(sys.argv[1])
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    values = np.stack([np.asarray(row, dtype=np.float32) for row in rows()])
    golden = {"values": values}
    for name, (code, size) in TYPES.items():
        out = np.zeros((len(values), values.shape[1] // (256 if "K" in name else 32), size), np.uint8)
        pointer = ctypes.c_void_p(out.ctypes.data)
        wrote = ggml.ggml_quantize_chunk(
            code, ctypes.c_void_p(values.ctypes.data), pointer, ctypes.c_int64(0),
            ctypes.c_int64(len(values)), ctypes.c_int64(256), None,
        )
        assert wrote == out.nbytes
        assert ggml.ggml_validate_row_data(code, pointer, ctypes.c_size_t(wrote)), name
        golden[name] = out
    save_file(golden, HERE / "blocks.safetensors")
    print(f"{len(values)} rows")


main()
