"""Multiple-choice items as a model in PyTorch is asked them, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.compare.tasks.items import Item, known_tasks, read_task
from exporter.models.ablation.choices import ChoiceItem, ChoiceMeter, ChoiceRow


@dataclass(frozen=True)
class Answers:
    """One model's answers to a task's items."""

    right: np.ndarray[Any, np.dtype[np.float64]]
    log_p: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def of(cls, log_likelihoods: Sequence[Sequence[float]], golds: Sequence[int]) -> Answers:
        """Of each item's choices, in nats."""
        right, log_p = [], []
        for values, gold in zip(log_likelihoods, golds, strict=True):
            right.append(float(int(np.argmax(values)) == gold))
            log_p.append(float(values[gold] - np.logaddexp.reduce(values)))
        return cls(np.array(right), np.array(log_p))


class Asked:
    """The items of a folder's tasks, put to one model and to cuts of it."""

    def __init__(self, loaded: Any, folder: Path, items: int) -> None:
        self._tasks = {
            # By length, so that little of a run is padding.
            name: sorted(
                choice_items(loaded.tokenizer, read_task(folder, name, limit=items).items),
                key=lambda item: item.longest,
            )
            for name in known_tasks(folder)
        }
        self._meters = {
            name: ChoiceMeter(loaded.model, items) for name, items in self._tasks.items()
        }

    def answers(self, cut: Any) -> Mapping[str, Answers]:
        """What a cut model answers, by task."""
        return {
            name: Answers.of(self._meters[name].log_likelihoods(cut), [item.gold for item in items])
            for name, items in self._tasks.items()
        }


def choice_items(tokenizer: Any, items: Sequence[Item]) -> list[ChoiceItem]:
    """Items as tokens; what a choice adds to its text's tokens is the answer."""
    return [
        ChoiceItem(tuple(_row(tokenizer, *pair) for pair in item.pairs), item.gold)
        for item in items
    ]


def _row(tokenizer: Any, context: str, continuation: str) -> ChoiceRow:
    before = tuple(tokenizer(context).input_ids)
    whole = tuple(tokenizer(context + continuation).input_ids)
    return ChoiceRow(before, whole[len(before) :])
