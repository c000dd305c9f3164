"""Which kind of healing a machine can afford: training, or folding, which costs little."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from exporter.errors import HealingError, is_out_of_memory
from exporter.heal.options import TRAINED, HealOptions
from exporter.models.loading.model_source import LoadedModel
from exporter.models.tasks import task_of
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch

USUAL_TIME_S = 600.0
"""Of a training that nobody asked for."""
_FEWEST_TOKENS = 20_000
_RATES = {"cpu": 5e10, "cuda": 5e13}
"""Operations a second of a thread or a GPU; a machine with bfloat16 does twice as many."""
_OPERATIONS = 8
"""For each token and weight: both models forward, the student backward."""
_BESIDE_BYTES, _COPIES = 4 << 30, 4
"""Of activations and kept answers; of each trained number gradient, moments, and best value."""


def in_turn(
    options: HealOptions, loaded: LoadedModel, progress: Progress = QUIET
) -> list[HealOptions]:
    """The kinds that are tried one after the other, until one gains something.

    A fold that may put maps in the branches' places goes on to the best of these, or none: a first
    look (``--quick``) asks for that, and is to tell what a cut costs in any case.
    """
    first = settled(options, loaded, progress)
    if options.kind == "fold" and options.replacements != "none":
        return [first, without_training(options, "best")]
    if options.kind != "auto":
        return [first]
    folded, best = without_training(options), without_training(options, "best")
    return [first, folded, best] if first.trains else [folded, best]


def settled(options: HealOptions, loaded: LoadedModel, progress: Progress = QUIET) -> HealOptions:
    """The options with ``auto`` made one of the kinds.

    A training has the number of tokens that the model's kind is trained on.
    """
    options = options.for_task(task_of(loaded.model))
    if options.kind != "auto":
        return options
    model, time_s = loaded.model, options.time_s or USUAL_TIME_S
    tokens = int(time_s * operations_per_second() / (_OPERATIONS * task_of(model).multiplied))
    weights = model.num_parameters() * model.dtype.itemsize
    copies = _COPIES if options.train == "all" else 1
    needed, free = _BESIDE_BYTES + copies * weights, available_bytes()
    device = training_device(model)
    if device.type == "cuda":
        import torch

        free = int(torch.cuda.mem_get_info(device)[0]) - (0 if device == model.device else weights)
    if free is not None and needed > free:
        reason = f"training needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} are free"
    elif tokens < _FEWEST_TOKENS:
        reason = f"about {tokens:,} tokens could be trained on in {time_s / 60:.0f} minutes"
    else:
        # No more than the time allows: what the model samples takes its time before that.
        tokens = min(options.trained_tokens, tokens)
        progress.say(
            f"heal: a training of at most {time_s / 60:.0f} minutes, {tokens:,} tokens; more "
            "time would recover more"
        )
        return replace(options, kind="distill", time_s=time_s, tokens=tokens)
    progress.say(f"heal: {reason}, so weights are folded instead of trained")
    return without_training(options)


def without_training(options: HealOptions, kind: Literal["fold", "best"] = "fold") -> HealOptions:
    """The options with kept weights folded, or the best replacements, in place of a training."""
    usual = HealOptions()
    kept = {name: getattr(usual, name) for name in TRAINED}
    if kind == "best":
        kept["replacements"] = usual.replacements
    return replace(options, kind=kind, **kept)


def operations_per_second() -> float:
    """Of this machine while it is quiet, as a rule of thumb."""
    import torch

    if torch.cuda.is_available():
        return _RATES["cuda"]
    return _RATES["cpu"] * torch.get_num_threads()


@contextlib.contextmanager
def telling_memory(options: HealOptions) -> Iterator[None]:
    """Says what needs less where memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = "a smaller --sequence-length or batch_size"
        raise HealingError(
            f"Memory ran out while the cut was healed ({options.decided}).",
            f"Try {smaller}, step_tokens or rank." if options.trains else f"Try {smaller}.",
            code="out-of-memory",
        ) from error


def training_device(model: Any) -> torch.device:
    """Where a model is trained: on a GPU where there is one."""
    import torch

    if model.device.type != "cpu" or not torch.cuda.is_available():
        return torch.device(model.device)
    return torch.device("cuda")
