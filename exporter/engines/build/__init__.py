"""TensorRT and TensorRT-RTX engines: checked, built, described, and loaded only where they fit."""
