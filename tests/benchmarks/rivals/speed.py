"""How much faster a cut model runs, in PyTorch: both in turns, with an interval."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from exporter.artifacts.latency import Speedup
from exporter.choose.costs.torch_cost_runner import leave_out, sharing_copy
from exporter.compare.timing.statistics import paired_speedup
from exporter.models.architectures import sublayers
from exporter.models.residual_stream import hooked
from tests.benchmarks.rivals.candidate import Candidate

PROMPT = 512
_TURNS = 2


def structure(candidate: Candidate) -> str:
    """What a cut model's time hangs on; models of one structure take the same."""
    parts = [
        f"{kind}{' map' * len(what.maps)}{' bias' * (what.bias is not None)}"
        for (_, kind), what in candidate.cut.items()
    ]
    parts += ["matrix" for patch in candidate.patches.values() if patch.is_matrix]
    return ", ".join(f"{count} {part}" for part, count in sorted(Counter(parts).items()))


def really_cut(model: Any, candidate: Candidate) -> Any:
    """A copy in which the branches that go are not computed; it shares the model's weights."""
    found = sharing_copy(model)
    for part in sublayers(found):
        if part.ref in candidate.cut:
            leave_out(found, part, candidate.cut[part.ref])
    return found


def speedup(model: Any, candidate: Candidate, rounds: int) -> Speedup:
    """Of a prompt of 512 tokens; each round runs whole, cut, cut, whole, or the other way round."""
    import torch

    cut = really_cut(model, candidate)
    matrices = {n: patch for n, patch in candidate.patches.items() if patch.is_matrix}
    ids = torch.arange(PROMPT)[None] % model.config.get_text_config().vocab_size
    with hooked(Candidate(patches=matrices).patched(cut)):
        for each in (model, cut):
            _milliseconds(each, ids)
        taken = np.array([_round(model, cut, ids, backwards=n % 2 > 0) for n in range(rounds)])
    return paired_speedup(taken[:, 0], taken[:, 1], seed=0, turns=_TURNS)


def _round(model: Any, cut: Any, ids: Any, *, backwards: bool) -> list[list[float]]:
    """Milliseconds, ``[arms, turns]``."""
    taken: list[list[float]] = [[], []]
    for arm in (1, 0, 0, 1) if backwards else (0, 1, 1, 0):
        taken[arm].append(_milliseconds((model, cut)[arm], ids))
    return taken


def _milliseconds(model: Any, ids: Any) -> float:
    import torch

    began = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    return 1000 * (time.perf_counter() - began)
