"""How a PyTorch model may be loaded."""

from __future__ import annotations

from typing import Any

from exporter.option_types import Dtype, OutputFolder
from exporter.options import Options, dataclass, only_with, option

LOADING = "How MODEL is loaded"


@dataclass(frozen=True)
class SourceOptions(Options):
    """How the PyTorch model may be loaded; all dangers are off by default."""

    dtype: Dtype = option("float32", "The weights' type.", section=LOADING)
    revision: str | None = option(None, "Revision of a hub model.", metavar="NAME", section=LOADING)
    trust_remote_code: bool = option(
        False, "Dangerous: run Python code that comes with the model.", section=LOADING, rare=True
    )
    allow_pickle: bool = option(
        False,
        "Dangerous: load weights from pickle files (pytorch_model.bin).",
        section=LOADING,
        rare=True,
    )
    allow_any_model_type: bool = option(
        False,
        "Dangerous: allow every model type of transformers, including those whose code was "
        "not reviewed for depthcut.",
        section=LOADING,
        rare=True,
    )

    @property
    def reading(self) -> dict[str, Any]:
        """What is read, and what it may do: all but the dtype."""
        return {name: value for name, value in vars(self).items() if name != "dtype"}


@dataclass(frozen=True)
class StreamOptions(Options):
    """Whether and how weights are read a layer at a time."""

    stream: bool = option(
        False,
        "Read the weights a layer at a time, for models larger than memory.",
        section=LOADING,
    )
    stream_dir: OutputFolder | None = option(
        None,
        "For --stream: folder for a file with the hidden states.",
        usual="in memory if they fit, otherwise in the system's temporary folder",
        section=LOADING,
        rare=True,
    )
    rules = (only_with("stream_dir", "stream"),)
