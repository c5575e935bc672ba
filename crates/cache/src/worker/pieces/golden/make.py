"""A graph whose tensors lie in two files beside it and in itself, for the tests of onnx.rs.

    python3 make.py        (onnx 1.23, numpy)

writes graph.onnx. The files beside it are not needed: only the graph says where in them a tensor begins.
"""

import os
import tempfile

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper


def tensor(name, values, location=None):
    made = numpy_helper.from_array(np.arange(values, dtype=np.float32), name)
    if location:
        external_data_helper.set_external_data(made, location)
    return made


tensors = [
    tensor("first", 1000, "graph.onnx_data"),
    tensor("second", 3000, "graph.onnx_data"),
    tensor("small", 4),
    tensor("third", 2000, "graph.onnx_data_1"),
    tensor("fourth", 1000, "graph.onnx_data"),
]
output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
node = helper.make_node("Identity", ["small"], ["y"])
model = helper.make_model(helper.make_graph([node], "graph", [], [output], tensors))
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "graph.onnx")
    onnx.save_model(model, path)
    with open(path, "rb") as made, open("graph.onnx", "wb") as kept:
        kept.write(made.read())
