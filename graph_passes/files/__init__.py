"""ONNX files and their weights: read safely, copied in pieces, placed whole or not at all."""
