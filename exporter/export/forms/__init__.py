"""A graph written for the runtime that will run it: by which exporter, with which passes after.

In goes a loaded PyTorch model, out comes a folder with ``model.onnx`` and a note in it of how it
was written. A new target is one file with its writer and one entry in ``TARGETS``.
"""
