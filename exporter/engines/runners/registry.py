"""Which class runs an ONNX file: a row for each backend.

A new backend is one file and one row. The file, ``runners/NAME.py``, has a subclass of
:class:`~exporter.engines.runners.base.Runner` whose constructor takes the ONNX file, ``provider``
and ``threads``; it imports its library through :func:`exporter.optional.require`, and says in
``capabilities`` what it can do. With its row here, ``NAME:PATH`` is an arm of ``depthcut compare``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.engines.runners.base import Runner

ONNX = "onnx"
"""The backend of a path without a name before it."""

RUNNERS: dict[str, tuple[str, str]] = {
    ONNX: ("exporter.engines.runners.onnxruntime", "OnnxRuntimeRunner"),
}
"""By a backend's name, the module and the class of its runner; imported when it is asked for."""


def open_runner(name: str, model: Path, *, provider: str = "cpu", threads: int) -> Runner:
    """A runner of an ONNX file, not entered.

    Args:
        name: The backend's, among :data:`RUNNERS`.
        model: The file.
        provider: Where it runs: ``cpu`` or ``cuda``.
        threads: CPU threads for one operator.

    Raises:
        BackendError: The backend doesn't know the provider.
    """
    module, kind = RUNNERS[name]
    runner: Runner = getattr(import_module(module), kind)(model, provider=provider, threads=threads)
    return runner
