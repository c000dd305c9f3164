"""PyTorch to ONNX, in the form that the target's runtime runs fastest."""
