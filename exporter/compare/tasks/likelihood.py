"""How likely a model finds continuations, with as few computed tokens as it takes.

The choices of a question share its text. That text runs once, and all its choices continue from
the KV cache that it leaves, side by side. Several questions run in one batch: their shared texts
are cut to the shortest of them, so that no cache needs padding, and the rest goes with the choices.
Padding stands at the end only, where a causal model doesn't see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Shape
from exporter.compare.quality.agreement import LOGITS, check_tokens
from exporter.compare.tasks.sharing import Group, TokenRow, batches, groups
from exporter.engines.decoding.decoder import runner_caches
from exporter.engines.inputs import make_inputs
from exporter.engines.runners.base import Array, Runner
from exporter.errors import ComparisonError
from exporter.models.ablation.divergences import to_log_probabilities
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress

UNLIMITED = 2**20
"""Positions of a model whose config tells no limit."""

BATCH_SIZE = 32
"""Sequences in one run, where nothing else is asked for."""

_BATCH_TOKENS = 1024  # of one run; 200 MB of logits for a vocabulary of 50,000


class ContinuationRequest(NamedTuple):
    """Token ids of a text, and of what may follow it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The sum of the log probabilities in nats, and whether each token is the likeliest."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class LikelihoodScorer:
    """Scores continuations on a runner.

    Attributes:
        runner: An entered runner with an output ``logits``.
        longest: Positions that the model knows; longer requests lose tokens at their start, as in
            lm-eval.
        vocabulary: Tokens that it knows; None where nobody tells.
        batch_size: Sequences in one run at most.
        shares: Whether requests that begin alike share a KV cache.
    """

    runner: Runner
    longest: int
    vocabulary: int | None
    batch_size: int = BATCH_SIZE
    shares: bool = True

    @classmethod
    def of(
        cls,
        runner: Runner,
        folder: ModelFolder,
        *,
        vocabulary: int | None = None,
        rows: int | None = None,
        longest: int | None = None,
    ) -> LikelihoodScorer:
        """A scorer with what the model's config says.

        Args:
            runner: An entered runner.
            folder: The model's config.
            vocabulary: Tokens that it knows; by default as the config says.
            rows: Sequences in one run; None for what suits the backend.
            longest: Positions, where the config tells none.
        """
        told = vocabulary or folder.config.get("vocab_size")
        return cls(
            runner,
            longest=longest or folder.longest_sequence or UNLIMITED,
            vocabulary=told if isinstance(told, int) else None,
            batch_size=rows or runner.capabilities.batch_size or BATCH_SIZE,
            shares=runner.capabilities.batch_size is None,
        )

    def score(
        self, requests: Sequence[ContinuationRequest], *, progress: Progress = QUIET
    ) -> list[Likelihood]:
        """One likelihood for each request, in their order.

        Raises:
            ComparisonError: A request has no context or no continuation, has tokens of another
                model, or is longer than the model; logits aren't finite.
            BackendError: A run fails.
        """
        if self.vocabulary is not None:
            check_tokens(_largest(requests), self.vocabulary)
        rows = [_row(request, self.longest) for request in requests]
        found: dict[int, Likelihood] = {}
        cached = self.shares and bool(runner_caches(self.runner))
        with progress.task("likelihoods", total=len(requests)) as task:
            for batch in batches(
                groups(rows, share=cached),
                rows,
                most_rows=self.batch_size,
                most_tokens=_BATCH_TOKENS,
            ):
                for number, likelihood in self._run(batch, rows):
                    found[number] = likelihood
                    task.advance()
        return [found[number] for number in range(len(requests))]

    def _run(self, batch: list[Group], rows: list[TokenRow]) -> Iterator[tuple[int, Likelihood]]:
        shared = batch[0].shared
        numbers = [number for group in batch for number in group.members]
        cache = self._prefix(batch, rows) if shared else None
        rests = [rows[number].tokens[shared:] for number in numbers]
        width = max(map(len, rests))
        ids = np.array([[*rest, *[rest[-1]] * (width - len(rest))] for rest in rests], np.int64)
        shape = Shape("prefill", len(ids), width, shared)
        inputs = make_inputs(self.runner.inputs, shape, ids, cache=cache)
        logits = self.runner.run(inputs, [LOGITS])[LOGITS]
        for answer, number in zip(logits, numbers, strict=True):
            row = rows[number]
            end = len(row.tokens) - shared
            yield number, _likelihood(answer[end - len(row.targets) : end], row.targets)

    def _prefix(self, batch: list[Group], rows: list[TokenRow]) -> dict[str, Array]:
        """The KV cache of what each group shares, once for each of its members."""
        shared = batch[0].shared
        ids = np.array([rows[group.members[0]].tokens[:shared] for group in batch], np.int64)
        caches = runner_caches(self.runner)
        inputs = make_inputs(self.runner.inputs, Shape("prefill", len(ids), shared), ids)
        found = self.runner.run(inputs, list(caches.values()))
        repeats = [len(group.members) for group in batch]
        return {past: found[present].repeat(repeats, axis=0) for past, present in caches.items()}


def _largest(requests: Sequence[ContinuationRequest]) -> int:
    return max((max(ids, default=0) for request in requests for ids in request), default=0)


def _row(request: ContinuationRequest, longest: int) -> TokenRow:
    if not request.context or not request.continuation:
        raise ComparisonError("A continuation without tokens, or after none, has no likelihood.")
    if len(request.continuation) > longest:
        raise ComparisonError(
            f"A continuation of {len(request.continuation)} tokens is longer than the model's "
            f"{longest} positions."
        )
    whole = (*request.context, *request.continuation)[-(longest + 1) :]
    return TokenRow(whole[:-1], request.continuation)


def _likelihood(logits: Array, targets: Sequence[int]) -> Likelihood:
    wanted: NDArray[np.int64] = np.asarray(targets)
    log_probabilities = logits.astype(np.float64)
    to_log_probabilities(log_probabilities, "The logits after a task's text")
    chosen = log_probabilities[np.arange(len(wanted)), wanted]
    return Likelihood(float(chosen.sum()), bool((log_probabilities.argmax(1) == wanted).all()))
