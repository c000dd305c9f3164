"""How likely a model finds continuations, with as few computed tokens as it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Shape
from exporter.compare.agreement import all_logits, check_tokens
from exporter.engines.decoding.decoder import runner_caches
from exporter.engines.decoding.generate import open_model
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.base import Array, Runner
from exporter.engines.tensors import make_inputs, whole_phase
from exporter.errors import ComparisonError, TaskError
from exporter.models.ablation.damage import to_log_probabilities
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress

UNLIMITED = 2**20
"""Positions of a model whose config tells no limit."""

BATCH_SIZE = 32
"""Sequences in one run, where nothing else is asked for."""

_BATCH_TOKENS = 1024  # of one run; 200 MB of logits for a vocabulary of 50,000
_LEAST_SAVING = 0.25  # of a row's tokens; below that a run of its own costs less
_MOST_CUT = 4  # tokens that a group's shared part may lose for the company of others


class ContinuationRequest(NamedTuple):
    """Token ids of a text, and of what may follow it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def of(cls, texts: TextModel, context: str, continuation: str) -> ContinuationRequest:
        """Tokens of a text and what follows; spaces between the two go with the latter."""
        if not context:
            assert texts.prefix_id is not None
            ids = texts.encode(continuation, special=False)
            begins = ids[:1] == [texts.prefix_id]
            return cls((texts.prefix_id,), tuple(ids[1:] if begins else ids))
        whole = texts.encode(context + continuation)
        before = texts.encode(context.rstrip())
        return cls(tuple(before), tuple(whole[len(before) :]))


class Likelihood(NamedTuple):
    """The sum of the log probabilities in nats, and whether each token is the likeliest."""

    log_likelihood: float
    greedy: bool


class TokenRow(NamedTuple):
    """Tokens to run, and those that its last positions are asked about."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def free(self) -> int:
        """Tokens at the start whose predictions nobody asks for."""
        return len(self.tokens) - len(self.targets)


class Group(NamedTuple):
    """Rows, by number, whose first ``shared`` tokens are the same and are not asked about."""

    members: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class _Begun:
    """The KV cache of what was run already, by input, and how many tokens that were."""

    length: int
    cache: Mapping[str, Array]

    def repeated(self, times: int | list[int]) -> _Begun:
        """Each row so many times."""
        more = {name: values.repeat(times, axis=0) for name, values in self.cache.items()}
        return _Begun(self.length, more)


_NOTHING = _Begun(0, {})


@dataclass(frozen=True)
class LikelihoodScorer:
    """Scores continuations on a runner."""

    runner: Runner
    longest: int
    vocabulary: int | None  # tokens that it knows; None where nobody tells
    batch_size: int = BATCH_SIZE  # sequences in one run at most
    shares: bool = True  # whether requests that begin alike share a KV cache

    @classmethod
    def of(
        cls,
        runner: Runner,
        folder: ModelFolder,
        *,
        vocabulary: int | None = None,
        rows: int | None = None,  # sequences in one run; None for what suits the backend
        longest: int | None = None,
    ) -> LikelihoodScorer:
        """A scorer with what the model's config says."""
        result = vocabulary or folder.config.get("vocab_size")
        return cls(
            runner,
            longest=longest or folder.longest_sequence or UNLIMITED,
            vocabulary=result if isinstance(result, int) else None,
            batch_size=rows or runner.capabilities.batch_size or BATCH_SIZE,
            shares=runner.capabilities.batch_size is None,
        )

    def score(
        self, requests: Sequence[ContinuationRequest], *, progress: Progress = QUIET
    ) -> list[Likelihood]:
        """One likelihood for each request, in their order."""
        if self.vocabulary is not None:
            check_tokens(_largest(requests), self.vocabulary)
        wanted = [_row(request, self.longest) for request in requests]
        rows = distinct(wanted)
        likelihoods: dict[TokenRow, Likelihood] = {}
        targets = defaultdict(set)
        for row in wanted:
            targets[row.tokens].add(row.targets)
        with progress.task("likelihoods", total=len(rows), unit="answers") as task:
            for tokens, logits in self._answers(rows):
                for numbers in targets[tokens]:
                    likelihoods[TokenRow(tokens, numbers)] = _likelihood(logits, numbers)
                task.advance()
        return [likelihoods[row] for row in wanted]

    def _answers(self, rows: list[TokenRow]) -> Iterator[tuple[tuple[int, ...], Array]]:
        """Each row's tokens, and the logits of its last positions, ``[targets, vocabulary]``."""
        cached = self.shares and bool(runner_caches(self.runner))
        opening = opening_of(rows) if cached else ()
        begun = self._begun(_NOTHING, np.array([opening], np.int64)) if opening else _NOTHING
        rests = [row._replace(tokens=row.tokens[len(opening) :]) for row in rows]
        for batch in batches(
            groups(rests, share=cached),
            rests,
            most_rows=self.batch_size,
            most_tokens=_BATCH_TOKENS,
        ):
            for number, logits in self._run(batch, rests, begun):
                yield rows[number].tokens, logits

    def _run(
        self, batch: list[Group], rows: list[TokenRow], begun: _Begun
    ) -> Iterator[tuple[int, Array]]:
        shared = batch[0].shared
        numbers = [number for group in batch for number in group.members]
        if shared:
            first = [rows[group.members[0]].tokens[:shared] for group in batch]
            begun = self._begun(begun, np.array(first, np.int64))
            begun = begun.repeated([len(group.members) for group in batch])
        else:
            begun = begun.repeated(len(numbers))
        rests = [rows[number].tokens[shared:] for number in numbers]
        width = max(map(len, rests))
        ids = np.array([[*rest, *[rest[-1]] * (width - len(rest))] for rest in rests], np.int64)
        shape = Shape(whole_phase(self.runner.inputs), len(ids), width, begun.length)
        inputs = make_inputs(self.runner.inputs, shape, ids, cache=begun.cache)
        logits = all_logits(self.runner, inputs, shape)
        for answer, number in zip(logits, numbers, strict=True):
            end = len(rows[number].tokens) - shared
            yield number, answer[end - len(rows[number].targets) : end]

    def _begun(self, before: _Begun, ids: NDArray[np.int64]) -> _Begun:
        """The KV cache after more tokens, ``[rows, tokens]``, which all go on from the same."""
        caches = runner_caches(self.runner)
        cache = before.repeated(len(ids)).cache
        shape = Shape("prefill", len(ids), ids.shape[1], before.length)
        inputs = make_inputs(self.runner.inputs, shape, ids, cache=cache)
        arrays = self.runner.run(inputs, list(caches.values()), phase="prefill")
        after = {past: arrays[present] for past, present in caches.items()}
        return _Begun(before.length + ids.shape[1], after)


def _largest(requests: Sequence[ContinuationRequest]) -> int:
    return max((max(ids, default=0) for request in requests for ids in request), default=0)


def _row(request: ContinuationRequest, longest: int) -> TokenRow:
    if not request.context or not request.continuation:
        raise ComparisonError(
            "A continuation without tokens, or after none, has no likelihood.", code="no-tokens"
        )
    if len(request.continuation) > longest:
        raise ComparisonError(
            f"A continuation of {len(request.continuation)} tokens is longer than the model's "
            f"{longest} positions.",
            code="context-too-long",
        )
    whole = (*request.context, *request.continuation)[-(longest + 1) :]
    return TokenRow(whole[:-1], request.continuation)


def _likelihood(logits: Array, targets: Sequence[int]) -> Likelihood:
    """Of targets, from the logits of as many or more positions, the last of which are theirs."""
    wanted: NDArray[np.int64] = np.asarray(targets)
    log_probabilities = logits[-len(wanted) :].astype(np.float64)
    to_log_probabilities(log_probabilities, "The logits after a task's text")
    chosen = log_probabilities[np.arange(len(wanted)), wanted]
    return Likelihood(float(chosen.sum()), bool((log_probabilities.argmax(1) == wanted).all()))


def distinct(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows of which no two have the same tokens: of those that do, the one with most targets."""
    token_rows: dict[tuple[int, ...], TokenRow] = {}
    for row in rows:
        known = token_rows.get(row.tokens)
        if known is None or len(known.targets) < len(row.targets):
            token_rows[row.tokens] = row
    return list(token_rows.values())


def opening_of(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """The tokens that all rows begin with and nobody asks about, where that is worth a run."""
    if len(rows) < 2:
        return ()
    first, last = min(row.tokens for row in rows), max(row.tokens for row in rows)
    length = min(_common(first, last), *(row.free for row in rows))
    widest = max(len(row.tokens) for row in rows)
    return first[:length] if length >= _LEAST_SAVING * widest else ()


def groups(rows: Sequence[TokenRow], *, share: bool) -> list[Group]:
    """Joins neighbours in dictionary order where that saves enough tokens."""
    results: list[Group] = []
    for number in sorted(range(len(rows)), key=lambda number: rows[number].tokens):
        joined = _joined(results[-1], number, rows) if share and results else None
        if joined is None:
            results.append(Group((number,), 0))
        else:
            results[-1] = joined
    return results


def _joined(group: Group, number: int, rows: Sequence[TokenRow]) -> Group | None:
    own, last = rows[number], rows[group.members[-1]]
    before = group.shared if len(group.members) > 1 else last.free
    shared = min(_common(last.tokens, own.tokens), own.free, before)
    saved = shared - (len(group.members) - 1) * (before - shared)
    if shared == 0 or saved < _LEAST_SAVING * len(own.tokens):
        return None
    return Group((*group.members, number), shared)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def batches(
    found: Sequence[Group], rows: Sequence[TokenRow], *, most_rows: int, most_tokens: int
) -> Iterator[list[Group]]:
    """Puts groups of like lengths together; what they share is cut to the least of them."""
    pieces = [piece for group in found for piece in _split(group, most_rows)]
    batch: list[Group] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.shared, -_widest([piece], rows))):
        if batch and not _fits([*batch, piece], rows, most_rows, most_tokens):
            yield _cut(batch)
            batch = []
        batch.append(piece)
    if batch:
        yield _cut(batch)


def _split(group: Group, most_rows: int) -> Iterator[Group]:
    for start in range(0, len(group.members), most_rows):
        yield Group(group.members[start : start + most_rows], group.shared)


def _fits(batch: list[Group], rows: Sequence[TokenRow], most_rows: int, most_tokens: int) -> bool:
    least = batch[-1].shared
    if batch[0].shared - least > (_MOST_CUT if least else 0):
        return False
    count = sum(len(group.members) for group in batch)
    return count <= most_rows and count * _widest(_cut(batch), rows) <= most_tokens


def _widest(batch: list[Group], rows: Sequence[TokenRow]) -> int:
    """Columns of a run: the longest row without what is shared."""
    return max(
        len(rows[number].tokens) - group.shared for group in batch for number in group.members
    )


def _cut(batch: list[Group]) -> list[Group]:
    least = min(group.shared for group in batch)
    return [Group(group.members, least) for group in batch]


def saved_folder(loaded: LoadedModel, place: Path) -> ModelFolder:
    """A loaded model's config and tokenizer as files, which a GGUF file doesn't have beside it."""
    save_pretrained_files(loaded, place)
    return ModelFolder.beside(place / "model", place)


def task_texts(folder: ModelFolder) -> TextModel:
    """The tokenizer beside a model, for tasks: the begin token, else the end token, as prefix."""
    if folder.tokenizer is None:
        raise TaskError(
            f"There is no tokenizer.json next to {folder.onnx}, and tasks need one.",
            "Copy the model's tokenizer there.",
            code="no-tokenizer",
        )
    begin = folder.config.get("bos_token_id")
    first = begin if isinstance(begin, int) else folder.end_of_text
    if first is None:
        raise TaskError(
            f"The config next to {folder.onnx} has neither a begin nor an end token.",
            "Copy the model's config.json there.",
            code="config-missing",
        )
    return replace(TextModel.of(folder.onnx, folder.tokenizer), prefix_id=first)


def open_scorer(
    model: Path | str,
    stack: ExitStack,
    *,
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads; None for all physical cores
    batch_size: int | None = None,  # sequences in one run; None for what suits the backend
    longest: int | None = None,
) -> tuple[LikelihoodScorer, TextModel]:
    """Loads a model and its tokenizer."""
    folder, runner = open_model(model, provider=provider, threads=threads)
    text_model = task_texts(folder)
    stack.enter_context(runner)
    return LikelihoodScorer.of(runner, folder, rows=batch_size, longest=longest), text_model
