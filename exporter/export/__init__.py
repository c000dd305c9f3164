"""PyTorch to ONNX, in the form that the target's runtime runs fastest.

In goes a loaded model, out comes a folder with ``model.onnx``, which ``parity`` holds against
PyTorch. A new target is a file in ``forms`` and an entry in its table.
"""
