//! A causal language model as an ONNX graph: nodes, initializers, quantisation, bytes.
