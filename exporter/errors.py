"""One error class a stage. Only ``exporter.cli`` turns them into exit codes."""

from __future__ import annotations

from graph_passes.errors import DepthcutError, OnnxFileError, SurgeryError

__all__ = [
    "ArtifactError",
    "BackendError",
    "CalibrationError",
    "ComparisonError",
    "DepthcutError",
    "ExportError",
    "MissingDependencyError",
    "ModelSourceError",
    "OnnxFileError",
    "PlanError",
    "ScoringError",
    "SurgeryError",
    "TextSourceError",
    "UnknownArchitectureError",
    "UsageError",
    "VerificationError",
]


class UsageError(DepthcutError):
    """The call itself is wrong: options that exclude each other, a name that is not there."""


class MissingDependencyError(DepthcutError):
    """An optional library is not installed. The hint names the extra that brings it."""


class ArtifactError(DepthcutError):
    """A stage's file is missing, of a newer schema, or not valid."""


class ModelSourceError(DepthcutError):
    """A model can't be loaded from where it is said to be."""


class UnknownArchitectureError(ModelSourceError):
    """The model loads, but where its attention and MLP modules are is not known."""


class TextSourceError(DepthcutError):
    """A text for calibration or evaluation can't be read."""


class CalibrationError(DepthcutError):
    """The calibration text does not give enough tokens."""


class ScoringError(DepthcutError):
    """Importance can't be computed: NaN activations, no tokens."""


class PlanError(DepthcutError):
    """A plan names sublayers that don't exist, or drops more than may be dropped."""


class ExportError(DepthcutError):
    """PyTorch's exporter failed, or its graph does not compute what PyTorch computes."""


class VerificationError(SurgeryError):
    """The pruned graph does not compute what the masked original computes."""


class BackendError(DepthcutError):
    """An execution backend can't load or run the model as asked."""


class ComparisonError(DepthcutError):
    """Two arms can't be compared: other inputs, vocabularies or texts."""
