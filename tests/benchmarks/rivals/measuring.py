"""What a cut model is worth: its damage on texts, its speed in PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np

from exporter.artifacts.latency import Speedup
from exporter.compare.timing.statistics import estimate, log_ratios
from exporter.models.ablation.branch_replacements import BranchReplacement, first_input
from exporter.models.architectures import SublayerModules, sublayers
from exporter.models.residual_stream import hooked
from exporter.models.tasks import Tokens
from tests.benchmarks.rivals.work import BATCH, WHOLE, Candidate

POSITIONS = 2
"""The damage is measured at every second: the whole model's answers are then kept in memory."""
_KEPT_BYTES = 2 << 30
PROMPT = 512
_TURNS = 2


def structure(candidate: Candidate) -> str:
    """What a cut model's time hangs on; models of one structure take the same."""
    parts = [
        f"{kind}{' map' * (what.weight is not None)}{' bias' * (what.bias is not None)}"
        for (_, kind), what in candidate.cut.items()
    ]
    parts += ["matrix" for patch in candidate.patches.values() if patch.is_matrix]
    return ", ".join(f"{count} {part}" for part, count in sorted(Counter(parts).items()))


def really_cut(model: Any, candidate: Candidate) -> Any:
    """A copy in which the branches that go are not computed; it shares the model's weights."""
    own = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    result = copy.deepcopy(model, own)
    for part in sublayers(result):
        if part.ref in candidate.cut:
            leave_out(result, part, candidate.cut[part.ref])
    return result


def leave_out(model: Any, part: SublayerModules, instead: BranchReplacement) -> None:
    """Puts something else in a branch's place, so that the branch isn't computed any more."""
    import torch

    first, last, read = part.reads, part.contribution, list[Any]()
    form = _output_form(model, last)

    def begin(*args: Any, **kwargs: Any) -> Any:
        read[:] = [first_input(args, kwargs)]
        return begun(read[0])

    def end(*args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs) if first is last else read.pop()
        tensor = instead.contribution(x)
        return form(torch.zeros_like(x) if tensor is None else tensor)

    if first is not last:
        begun = _output_form(model, first)
        first.forward = begin
    last.forward = end  # type: ignore[method-assign]


def _output_form(model: Any, module: Any) -> Callable[[Any], Any]:
    """What a module gives back, with another first tensor and nothing else in it."""
    import torch

    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    finally:
        handle.remove()
    if not isinstance(seen[0], tuple):
        return lambda tensor: tensor
    rest = (None,) * (len(seen[0]) - 1)
    return lambda tensor: (tensor, *rest)


def speedup(model: Any, candidate: Candidate, rounds: int) -> Speedup:
    """Of a prompt of 512 tokens; each round runs whole, cut, cut, whole, or the other way round."""
    import torch

    cut = really_cut(model, candidate)
    matrices = {n: patch for n, patch in candidate.patches.items() if patch.is_matrix}
    ids = torch.arange(PROMPT)[None] % model.config.get_text_config().vocab_size
    with hooked(Candidate(patches=matrices).patched(cut)):
        for item in (model, cut):
            _milliseconds(item, ids)
        taken = np.array([_round(model, cut, ids, backwards=n % 2 > 0) for n in range(rounds)])
    return estimate(log_ratios(taken[:, 0], taken[:, 1], turns=_TURNS)).speedup()


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


class DomainMeter:
    """Holds candidates against the whole model on one text; the whole model's answers are kept."""

    def __init__(self, model: Any, text: Any) -> None:
        self._now, self._clusters = WHOLE, text.clusters
        self._meter = Tokens(model).meter(text.input_ids, text.mask, batch_size=BATCH,
            positions=POSITIONS, kept_bytes=_KEPT_BYTES, within=lambda: self._now.within(model),
        )  # fmt: skip

    def measure(self, candidate: Candidate) -> dict[str, list[float]]:
        """The damage by sample, and each sample's document."""
        self._now = candidate
        damage = self._meter.measure(candidate.cut)
        sums = {f.name: getattr(damage, f.name).tolist() for f in dataclasses.fields(damage)}
        return {**sums, "clusters": self._clusters.tolist()}
