"""A graph written for the runtime that will run it: by which exporter, with which passes after."""

from exporter.export.forms.targets import TARGETS, TargetForm, refuse_options
from exporter.export.forms.write import write_form

__all__ = ["TARGETS", "TargetForm", "refuse_options", "write_form"]
