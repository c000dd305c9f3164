"""Measures what cuts do to the choice among given answers: the damage to the right one's odds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.files import sha256_bytes
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import Damage, Reference
from exporter.models.ablation.meter import CutMeter, refuse_headless
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch

_RUN_TOKENS = 2048
"""Of one forward pass, padding included; a single item may have more."""


@dataclass(frozen=True)
class ChoiceRow:
    """One answer with what stands before it, as token ids; neither is empty."""

    context: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which it is only asked about."""
        return (*self.context, *self.answer)[:-1]


@dataclass(frozen=True)
class ChoiceItem:
    """A question: its answers, two or more, and the right one's number."""

    rows: tuple[ChoiceRow, ...]
    gold: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in self.rows)


@dataclass(frozen=True)
class ChoiceItems:
    """Items of one task, as a part of a plan is made on them."""

    source: str
    sha256: str
    items: tuple[ChoiceItem, ...]

    @property
    def part(self) -> CalibrationRef:
        """What is said of just these items, by which they are known again."""
        result = [
            [choice_item.gold, *((row.context, row.answer) for row in choice_item.rows)]
            for choice_item in self.items
        ]
        return CalibrationRef(
            source=self.source,
            samples=len(self.items),
            sequence_length=max(item.longest for item in self.items),
            tokens=sum(len(row.tokens) for item in self.items for row in item.rows),
            sha256=self.sha256,
            ids_sha256=sha256_bytes(repr(result).encode()),
            unit="item",
        )


class ChoiceMeter(CutMeter[Damage]):
    """Holds cut models' choices against the whole one's.

    In the damage that it tells, an item is a sample with one position: ``kl`` is that of the
    distributions over the choices, ``log_perplexity_increase`` the loss of the right answer's mean
    log-probability against the others, ``top1_agreement`` the share of items that both answer
    alike.
    """

    def __init__(self, model: Any, items: Sequence[ChoiceItem]) -> None:
        refuse_headless(model)
        self._runs = _runs(items)
        super().__init__(model, self._runs)

    def log_likelihoods(
        self, cut: BranchReplacements, progress: Progress = QUIET
    ) -> list[list[float]]:
        """A cut model's log-likelihoods of each item's answers, in nats."""
        values: list[list[float]] = []
        with progress.task("answer items", total=len(self._runs), unit="batches") as task:
            for run in self._runs:
                answers = self._record(run, cut)[1]
                rows = answers[:, 0].double().cpu().tolist()
                values += [row[: len(one.rows)] for row, one in zip(rows, run.items, strict=True)]
                task.advance()
        return values


def _runs(items: Sequence[ChoiceItem]) -> list[_Choices]:
    """As many items in one run as its tokens allow, in their order."""
    runs: list[list[ChoiceItem]] = []
    for item in items:
        last = [*runs[-1], item] if runs else []
        if last and _padded_tokens(last) <= _RUN_TOKENS:
            runs[-1] = last
        else:
            runs.append([item])
    starts = np.cumsum([0, *map(len, runs)])
    return [_Choices(int(start), tuple(run)) for start, run in zip(starts, runs, strict=False)]


def _padded_tokens(items: Sequence[ChoiceItem]) -> int:
    rows = sum(len(_distinct_tokens(item.rows)) for item in items)
    return max(item.longest for item in items) * rows


def _distinct_tokens(rows: Sequence[ChoiceRow]) -> list[tuple[int, ...]]:
    """What a model reads for several answers: those of one token may share all before them."""
    return list(dict.fromkeys(row.tokens for row in rows))


@dataclass(frozen=True)
class _Choices:
    """Some items in one run: a row for each answer, padded at the end; equal rows run once."""

    first_sample: int
    items: tuple[ChoiceItem, ...]

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        import torch

        tokens = _distinct_tokens(self._rows)
        width = max(map(len, tokens))
        ids = [[*token, *[token[-1]] * (width - len(token))] for token in tokens]
        mask = [[1] * len(token) + [0] * (width - len(token)) for token in tokens]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def places(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states that the rows' answers are predicted from, ``[1, answer tokens, hidden]``."""
        return hidden[self._asked[0], self._asked[1]][None]

    def answers(self, logits: torch.Tensor) -> torch.Tensor:
        """``[items, 1, most choices]``, log-likelihoods; -inf where an item has fewer."""
        import torch

        wide = logits[0].float()
        targets = torch.tensor([token for row in self._rows for token in row.answer])
        chosen = wide.gather(-1, targets.to(wide.device)[:, None])[:, 0] - wide.logsumexp(-1)
        sums = chosen.new_zeros(len(self._rows))
        answered = np.repeat(np.arange(len(self._rows)), [len(row.answer) for row in self._rows])
        sums.index_add_(0, torch.from_numpy(answered).to(wide.device), chosen)
        owners = np.repeat(np.arange(len(self.items)), [len(item.rows) for item in self.items])
        numbers = np.concatenate([np.arange(len(item.rows)) for item in self.items])
        table = sums.new_full((len(self.items), 1, int(numbers.max()) + 1), -torch.inf)
        table[owners, 0, numbers] = sums
        return table

    def reference(self, answers: torch.Tensor) -> Reference:
        """The whole model's choices."""
        import torch

        gold = torch.tensor([[item.gold] for item in self.items], device=answers.device)
        return Reference(answers, gold, torch.ones_like(gold, dtype=torch.bool))

    @cached_property
    def _rows(self) -> list[ChoiceRow]:
        return [row for item in self.items for row in item.rows]

    @cached_property
    def _asked(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row that runs and the position of each state that is asked, ``[all]`` both."""
        numbers = {tokens: n for n, tokens in enumerate(_distinct_tokens(self._rows))}
        runs = [numbers[row.tokens] for row in self._rows]
        rows = np.repeat(runs, [len(row.answer) for row in self._rows])
        ends = [np.arange(len(r.tokens) - len(r.answer), len(r.tokens)) for r in self._rows]
        return rows, np.concatenate(ends)
