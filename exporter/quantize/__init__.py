"""Weights in fewer bits, on top of the cut.

In come an ONNX file and settings (:mod:`~exporter.quantize.settings`); out goes an ONNX file that
carries a record of what was done. A new way of rounding is a function in
:mod:`~exporter.quantize.rounding` and its branch in :mod:`~exporter.quantize.weight_only`.
"""
