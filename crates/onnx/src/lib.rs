//! Steps that export ONNX models for ONNX Runtime and Transformers.js.
