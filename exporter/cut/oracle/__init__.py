"""Holds a pruned graph against the masked original, on ONNX Runtime, with random inputs."""
