"""ONNX file and plan to pruned ONNX file, and the oracle that verifies it."""
