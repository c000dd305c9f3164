"""A graph written for the runtime that will run it: by which exporter, with which passes after."""

from exporter.forms.targets import TARGETS, TargetForm, refuse_options
from exporter.forms.write import write_form

__all__ = ["TARGETS", "TargetForm", "refuse_options", "write_form"]
