"""A graph written for the runtime that will run it: by which exporter, with which passes after.

In goes a loaded PyTorch model, out comes a folder with ``model.onnx`` and a note in it of how it
was written. A new target is one file with its writer and one entry in ``TARGETS``.
"""

from exporter.export.forms.targets import TARGETS, TargetForm, refuse_options
from exporter.export.forms.write import write_form

__all__ = ["TARGETS", "TargetForm", "refuse_options", "write_form"]
