"""Cost tables that nobody measured, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Mapping

from made_reports import made_environment

from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostGroup, CostTable, Member, Trial
from graph_passes.types import Replacement


def made_table(
    saved_ms: Mapping[tuple[int, str], Mapping[Replacement, float]],
    *,
    baseline_ms: float = 100.0,
    at: RequestShape | None = None,
) -> CostTable:
    """A table with a group for each sublayer, whose savings simply add up."""
    groups = []
    for (layer, kind), by_replacement in saved_ms.items():
        member = Member(layer=layer, kind=kind)
        trials = [
            Trial(replacement=how, treated=[member], saved_ms=saved, std_error_ms=0.0)
            for how, saved in by_replacement.items()
        ]
        groups.append(CostGroup(signature=f"{kind} {layer}", members=[member], trials=trials))
    return CostTable(
        at=at or RequestShape(), backend="onnxruntime", provider="CPUExecutionProvider",
        environment=made_environment(), baseline_ms=baseline_ms, groups=groups,
    )  # fmt: skip
