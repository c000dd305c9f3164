"""ReplaceMe: neighbouring blocks go, and a linear map in the MLP before them does their work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.heal.ridge import Sums
from exporter.models.architectures import layer_modules
from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.streams import layer_states, least_turning_span
from tests.benchmarks.rivals.workplace import Workplace

if TYPE_CHECKING:
    import torch

_RIDGE = 1e-7
"""Relative to the mean eigenvalue: for a system that is as good as singular."""


def replace_me(work: Workplace, dropped: int) -> Candidate:
    """Drops the span that turns the stream least, with a map folded into ``down_proj``."""
    first = least_turning_span(work.model, work.few, dropped)
    change = _map(work, first, dropped)
    name, weight = _down_projection(work, first - 1)
    folded = (change.T @ weight.double()).to(weight.dtype).contiguous()
    layers = range(first, first + dropped)
    return Candidate.without_blocks(work.model, layers, weights={name: folded})


def _map(work: Workplace, first: int, span: int) -> torch.Tensor:
    """T, ``[hidden, hidden]``, float64, to be multiplied from the right."""
    import torch

    width = work.model.config.get_text_config().hidden_size
    sums = Sums(width, width)
    for states in layer_states(work.model, work.text):
        before, last = states[first - 1], states[first + span - 1]
        x, y = before.mlp_out - before.mlp_in, last.output - before.mlp_in
        sums.add(x.flatten(0, 1), y.flatten(0, 1))
    ridge = _RIDGE * sums.xx.trace() / width
    square = sums.xx + ridge * torch.eye(width).to(sums.xx)
    found: torch.Tensor = torch.linalg.solve(square, sums.xy)
    return found


def _down_projection(work: Workplace, layer: int) -> tuple[str, torch.Tensor]:
    """The last product of a Llama-like MLP: its weight's name, and ``[hidden, inner]``."""
    mlp: Any = layer_modules(work.model)[layer].mlp
    weight = mlp.down_proj.weight
    names = {id(parameter): name for name, parameter in work.model.named_parameters()}
    return names[id(weight)], weight.data
