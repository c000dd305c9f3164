"""What costs depend on: the model, the request, the engine, and the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exporter.artifacts import Environment, library_versions
from exporter.choose.costs.cost_runners import CostRunner
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable
from exporter.engines.environment import environment
from exporter.errors import CostError

MODEL = "model"
"""The role of the model's hash in ``made_from``."""
_MACHINE = ("machine", "processor", "cpu_count", "gpu", "affinity")
_LIBRARIES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
    "llama-cpp-python",
)


@dataclass(frozen=True)
class Conditions:
    """Under what costs are measured.

    Attributes:
        sha256: Of the model's files.
        at: The request.
        backend: What runs it.
        provider: On what.
        rank: Of linear maps.
        threads: CPU threads; None takes any.
        environment: The machine.
        has_linear: Whether there are linear maps; else their rank does not matter.
    """

    sha256: str
    at: RequestShape
    backend: str
    provider: str
    rank: int | None
    threads: int | None
    environment: Environment
    has_linear: bool = True

    def differences(self, table: CostTable) -> Iterator[tuple[str, Any, Any]]:
        """Where a table was measured under others: what differs, there and here."""
        yield from _differing("model", table.made_from.get(MODEL), self.sha256)
        yield from _differing("request", str(table.at), str(self.at))
        yield from _differing("backend", table.backend, self.backend)
        yield from _differing("provider", table.provider, self.provider)
        trials = (trial for group in table.groups for trial in group.trials)
        if self.has_linear and any(trial.replacement == "linear" for trial in trials):
            yield from _differing("rank", table.rank, self.rank)
        if self.threads is not None:
            yield from _differing("threads", table.environment.threads, self.threads)
        for name in _MACHINE:
            there, here = (getattr(each, name) for each in (table.environment, self.environment))
            yield from _differing(name, there, here)
        versions = library_versions()
        for name in _LIBRARIES if self.backend else ():
            if _decides(name, self.backend):
                yield from _differing(name, table.versions.get(name), versions.get(name))

    def refuse_other(self, table: CostTable, name: str) -> None:
        """Refuses costs that say nothing of this model here.

        Args:
            table: The costs.
            name: What errors call them.

        Raises:
            CostError: It says what differs.
        """
        for what, there, here in self.differences(table):
            if what == "model":
                raise CostError(
                    f"{name} holds the costs of another model: its SHA-256 is {there}, and that "
                    f"of the model here {here}.",
                    "Measure this model's: depthcut costs.",
                    code="another-model",
                )
            raise CostError(
                f"{name} was measured under other conditions: {what} {there}, and here {here}.",
                "Measure again: depthcut costs; or ask for what was measured.",
                code="other-conditions",
            )


def _differing(what: str, there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    if there != here:
        yield what, there, here


def _decides(library: str, backend: str) -> bool:
    """Whether a library's version decides how fast a backend is."""
    if backend.startswith(("pytorch", "torch")):
        return library in ("torch", "transformers")
    if backend == "llama.cpp":
        return library == "llama-cpp-python"
    return library.removesuffix("-gpu") == backend


def conditions(
    cost_runner: CostRunner, at: RequestShape, threads: int | None, *, has_linear: bool = True
) -> Conditions:
    """What costs are measured under on a cost_runner, here and now.

    Args:
        cost_runner: The model and the engine.
        at: The request.
        threads: CPU threads; None for any.
        has_linear: Whether linear maps are measured, whose rank then matters.
    """
    return Conditions(
        sha256=cost_runner.sha256,
        at=at,
        backend=cost_runner.backend,
        provider=cost_runner.provider,
        rank=cost_runner.rank,
        threads=threads,
        environment=environment(threads=threads or cost_runner.threads, gpu=cost_runner.on_gpu),
        has_linear=has_linear,
    )


def refuse_too_long(name: str, longest: int | None, at: RequestShape) -> None:
    """Refuses a request that reaches more positions than a model has.

    Args:
        name: What errors call the model.
        longest: How many it has; None for no limit.
        at: The request.

    Raises:
        CostError: It says how many there are.
    """
    if longest is not None and at.longest > longest:
        raise CostError(
            f"{name} ends at {longest} positions; the request {at} reaches {at.longest}.",
            "Ask for a shorter prompt or fewer new tokens.",
            code="context-too-long",
        )
