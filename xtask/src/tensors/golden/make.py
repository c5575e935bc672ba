"""Makes the golden files in this folder: what other people's libraries read out of them.

types.gguf holds tensors of each type that we decode, `x`, and what the package `gguf` makes of them,
`x.expected`. packed.onnx holds packed weights, and as `x.expected` what ONNX Runtime computes with
them: a product with the identity, or all rows gathered.

    pip install gguf==0.19.0 onnx==1.23.2 onnxruntime==1.31.1
    python xtask/src/tensors/golden/make.py
"""

from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
from gguf import GGMLQuantizationType as T
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
rng = np.random.default_rng(7)


def halves(*values):
    return np.array(values, dtype=np.float16).view(np.uint8)


def noise(n):
    return rng.integers(0, 256, n, dtype=np.uint8)


def types():
    writer = gguf.GGUFWriter(HERE / "types.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)

    def add(name, data, kind, expected=True):
        writer.add_tensor(name, data, raw_dtype=kind)
        if expected:
            values = gguf.quants.dequantize(data, kind).astype(np.float32)
            assert np.isfinite(values).all()
            writer.add_tensor(f"{name}.expected", values)

    some = rng.standard_normal((2, 5)).astype(np.float32)
    add("f32", some, T.F32)
    add("f16", some.astype(np.float16), T.F16)
    add("bf16", gguf.quants.quantize(some, T.BF16), T.BF16)
    # Every byte but the scales is noise, so that each bit counts.
    for name, kind, low in [("q8_0", T.Q8_0, 32), ("q4_0", T.Q4_0, 16), ("q5_0", T.Q5_0, 20)]:
        rows = [np.concatenate([halves(d), noise(low)]) for d in (0.0371, -1.5)]
        add(name, np.stack(rows), kind)
    for name, kind, low in [("q4_k", T.Q4_K, 140), ("q5_k", T.Q5_K, 172)]:
        add(name, np.concatenate([halves(0.0123, 0.271), noise(low)])[None], kind)
    add("q6_k", np.concatenate([noise(208), halves(0.00173)])[None], T.Q6_K)
    add("q5_1", np.concatenate([halves(0.0371, -0.271), np.arange(20, dtype=np.uint8) * 13])[None], T.Q5_1)
    # Not decoded: known by its first bytes.
    unknown = np.zeros((1, 74), dtype=np.uint8)
    unknown[0, :2] = [7, 10]
    add("iq2_xs", unknown, T.IQ2_XS, expected=False)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed():
    """Nodes of ONNX Runtime with weights of noise; `expected` is what it computes with them."""
    initializers, nodes, outputs = [], [], []

    def tensor(name, array):
        initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(op, name, inputs, **attributes):
        nodes.append(helper.make_node(op, inputs, [name], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def scales(*shape):
        """Few bits, so that products are exact in whatever order they are computed."""
        return (rng.integers(1, 64, shape) / 1024).astype(np.float32)

    def matmul(name, n, k, bits, block, zeros=None):
        blocks = -(-k // block)
        inputs = [
            tensor(f"{name}.identity", np.eye(k, dtype=np.float32)),
            tensor(name, noise(n * blocks * block * bits // 8).reshape(n, blocks, -1)),
            tensor(f"{name}.scales", scales(n * blocks)),
        ]
        if zeros == "packed":
            inputs.append(tensor(f"{name}.zeros", noise(n * -(-blocks * bits // 8))))
        if zeros == "floats":
            floats = rng.integers(0, 16, n * blocks).astype(np.float32) + np.float32(0.5)
            inputs.append(tensor(f"{name}.zeros", floats))
        node("MatMulNBits", f"{name}.out", inputs, K=k, N=n, bits=bits, block_size=block)

    matmul("four", 3, 64, 4, 32)
    # Three blocks a row, so that zero points begin within a byte; the last is not full.
    matmul("zeros", 2, 80, 4, 32, zeros="packed")
    matmul("floats", 2, 64, 4, 32, zeros="floats")
    matmul("eight", 2, 32, 8, 16)
    matmul("two", 2, 32, 2, 16)

    def gather(name, rows, columns, bits, block, zeros=False):
        inputs = [
            tensor(name, noise(rows * columns * bits // 8).reshape(rows, -1)),
            tensor(f"{name}.rows", np.arange(rows)),
            tensor(f"{name}.scales", scales(rows, columns // block)),
        ]
        if zeros:
            count = -(-columns // block * bits // 8)
            inputs.append(tensor(f"{name}.zeros", noise(rows * count).reshape(rows, count)))
        how = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        node("GatherBlockQuantized", f"{name}.out", inputs, **how)

    gather("embed8", 2, 32, 8, 16)
    gather("embed4", 2, 32, 4, 16)
    gather("embed4z", 2, 64, 4, 16, zeros=True)

    def model(outputs):
        graph = helper.make_graph(nodes, "golden", [], outputs, initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model(outputs).SerializeToString(), options)
    for output, values in zip(outputs, session.run(None, {})):
        tensor(output.name.replace(".out", ".expected"), values)
    # What made them is not looked at.
    initializers[:] = [t for t in initializers if not t.name.endswith((".identity", ".rows"))]
    initializers.extend(typed())
    golden = model(outputs)
    at = [t.name for t in golden.graph.initializer].index("four.expected")
    outside = golden.graph.initializer[at]
    (HERE / "packed.onnx_data").write_bytes(b"before" + outside.raw_data)
    onnx.external_data_helper.set_external_data(
        outside, "packed.onnx_data", offset=6, length=len(outside.raw_data)
    )
    outside.ClearField("raw_data")
    (HERE / "packed.onnx").write_bytes(golden.SerializeToString())


def typed():
    """Numbers in the fields that are there for their type, not in `raw_data`."""
    values = [-2.0, 0.5, 3.0]
    floats = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"]
    integers = ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"]
    for kind in floats + integers:
        some = values if kind in floats else [abs(int(v)) if kind[0] == "U" else int(v) for v in values]
        yield helper.make_tensor(kind.lower(), getattr(TensorProto, kind), [3], some)
        yield numpy_helper.from_array(np.array(some, dtype=np.float32), f"{kind.lower()}.expected")


types()
packed()
