"""Encoder-decoders compared: three graphs as one arm, judged on pairs of sources and targets."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy, TaskResult
from exporter.artifacts.base import RECORDINGS
from exporter.artifacts.latency import Shape
from exporter.artifacts.stacks import Stacks
from exporter.compare.answers import Distributed, Pair
from exporter.compare.arms import ComparedArm, Comparison, LeaveOut, noted_plan
from exporter.compare.intervals import difference_interval
from exporter.compare.options import CompareOptions
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.errors import ComparisonError
from exporter.files import sha256_bytes
from exporter.models.ablation.damage import Floats
from exporter.models.decoding_rules import target_positions
from exporter.models.graph_facts import GraphFacts, read_facts
from exporter.models.model_folder import (
    ENCODER,
    FIRST_STEP,
    GRAPHS,
    NEXT_STEP,
    ModelFolder,
    graph_file,
    read_config,
)
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.pairs import (
    OWN_TOKENS,
    PAIRS,
    PairReader,
    Pairs,
    paired_text,
    read_pairs,
    within,
)
from exporter.models.texts.sources import PYDOC, RANDOM, TextSource
from exporter.optional import require
from exporter.options import is_given, refusal
from exporter.progress import Progress
from graph_passes.files.storage import load_model
from graph_passes.plan_record import PLAN_KEY

_NOISE = 8
"""Sources of noise that all are judged on."""


@dataclass(frozen=True, kw_only=True)
class JudgedPairs(TextSource):
    """Pairs where a model of one graph has documents, and what makes its inputs of them."""

    asked: Pairs
    reader: PairReader

    @classmethod
    def of(cls, asked: Pairs, reader: PairReader) -> JudgedPairs:
        """Known by their sources, as texts are."""
        return cls(asked.source, (), asked.sha256, asked=asked, reader=reader)

    def example(self) -> Mapping[str, Array]:
        """What an encoder reads of the first."""
        return self.reader.sources(self.asked, 1, part="evaluation").arrays

    @property
    def content_sha256(self) -> str:
        """Of targets and order, too: two reports with this hash asked the same."""
        return self.asked.content_sha256


class Sequences(Distributed):
    """What an encoder-decoder answers to pairs: teacher-forced, and generated.

    Teacher-forced: all decoders read the same target, and their distributions of each next token
    are compared; there is a perplexity where the right targets are known. Generated: each answers
    by itself. Of recordings with transcripts there is a word error rate.
    """

    at_once = False
    unit = "samples"

    def __init__(self, pairs: JudgedPairs, text: CalibrationText) -> None:
        self._pairs, self._text, self._reader = pairs.asked, text, pairs.reader
        asked, samples = pairs.asked, len(text.input_ids)
        words = f"answers to {samples:,} sources of"
        super().__init__(words, asked.source, asked.content_sha256, samples)
        self._said: dict[str, list[list[int]]] = {}

    @classmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        """As many of the first pairs as have the tokens of --eval-tokens in their targets.

        The whole model's own answers stand where no targets are known.
        """
        if not isinstance(texts, JudgedPairs):
            return None
        asked, reader, tokens = texts.asked, texts.reader, comparison.options.eval_tokens
        number, whole, say = _NOISE, comparison.whole.runner, comparison.progress.say
        assert isinstance(whole, EncoderDecoderRunner)
        if not asked.is_random:
            number = reader.within(asked, tokens) if asked.has_targets else PAIRS
        if asked.has_targets and number < len(asked.pairs):
            result = f"on {number:,} of {len(asked.pairs):,} pairs, whose targets"
            say(f"accuracy: {result} have the {tokens:,} tokens of --eval-tokens")

        def generate(sources: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
            return whole.generate(sources, reader.rules, reader.new_tokens(OWN_TOKENS))

        text = paired_text(
            reader,
            asked,
            generate,
            number=number,
            part="evaluation",
            progress=comparison.progress,
        )
        if not asked.has_targets:
            text = text.rows(slice(0, within(text.mask.sum(axis=1), tokens)))
        return cls(texts, text)

    def answer(self, name: str, runner: Any, sample: int) -> Array:
        """Logits behind the prompt, ``[tokens, vocabulary]``; what it generates is kept."""
        rules, encoded = self._reader.rules, runner.encode(self._read(sample))
        row = runner.answer(encoded, rules, self._reader.answer_tokens)[0][len(rules.prompt) :]
        self._said.setdefault(name, []).append([int(token) for token in row])
        logits: Array = runner.step(encoded, self._target(sample)[None])[0][0]
        return logits[len(rules.prompt) - 1 : -1]

    def targets(self, sample: int) -> NDArray[np.int64]:
        """The tokens behind the prompt, of right targets."""
        target = self._target(sample)[len(self._reader.rules.prompt) :]
        return target if self._pairs.has_targets else target[:0]

    def _read(self, sample: int) -> dict[str, Array]:
        """What the encoder reads, ``[1, ...]``, without padding where it takes any length."""
        assert self._text.sources is not None
        row = self._text.sources[sample : sample + 1]
        if "input_ids" not in row.arrays:
            return dict(row.arrays)
        return {name: array[:, row.mask[0]] for name, array in row.arrays.items()}

    def _target(self, sample: int) -> NDArray[np.int64]:
        target: NDArray[np.int64] = self._text.input_ids[sample, self._text.mask[sample]]
        return target

    def accuracy(self, pair: Pair) -> Accuracy:
        """With the share of answers that are the same."""
        same = [one == other for one, other in zip(*(self._said[n] for n in pair), strict=True)]
        more = {"prompts": len(same), "figures": {"exact_match": float(np.mean(same))}}
        return super().accuracy(pair).model_copy(update=more)

    def tasks(self, comparison: Comparison) -> list[TaskResult]:
        """The word error rate of recordings whose words are known."""
        if not (self._reader.hears and self._pairs.has_targets):
            return []
        right = [pair.target or "" for pair in self._pairs.pairs[: self.samples]]
        first, second = (map(self._reader.text, self._said[n]) for n in comparison.pair)
        by = normalizer_of(self._reader)
        return [word_errors(right, [*first], [*second], self.source, by)]


_UNSPACED = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Languages without spaces between words: each letter counts as one, as Whisper's paper has it."""


@dataclass(frozen=True)
class Normalizer:
    """Makes texts alike that say the same, as published word error rates have it."""

    name: str
    apply: Callable[[str], str]


def normalizer_of(reader: PairReader) -> Normalizer:
    """Whisper's English normaliser for English answers, its basic one for all others.

    British spellings count as American ones where the model's folder has Whisper's list of them,
    ``normalizer.json``.
    """
    known = require("transformers.models.whisper.english_normalizer", extra="speech")
    languages = require(
        "transformers.models.whisper.tokenization_whisper", extra="speech"
    ).LANGUAGES
    tokens = reader.tokenizer.convert_ids_to_tokens(list(reader.rules.prompt))
    marks = [token[2:-2] for token in tokens if token]
    language = next((mark for mark in marks if mark in languages), "")
    if not language and reader.config.get("model_type") == "whisper":
        language = "en"  # only Whisper's English models name none
    if language == "en" or "translate" in marks:
        spellings = getattr(reader.tokenizer, "english_spelling_normalizer", None)
        return Normalizer(
            "Whisper's English normaliser", known.EnglishTextNormalizer(spellings or {})
        )
    basic = known.BasicTextNormalizer(split_letters=language in _UNSPACED)
    return Normalizer("Whisper's basic normaliser", basic)


def word_errors(
    right: Sequence[str],
    baseline: Sequence[str],
    candidate: Sequence[str],
    source: str,
    normalizer: Normalizer,
) -> TaskResult:
    """Both arms' word error rates: edits of all texts over words of all texts.

    The difference's interval is from a paired bootstrap over texts.
    """
    words, edits = _edits(right, baseline, normalizer)
    others = _edits(right, candidate, normalizer)[1]
    if not words.sum():
        raise ComparisonError(
            f"The transcripts of {source} hold no words.",
            "Give what is said in the recordings.",
            code="no-words",
        )
    return TaskResult(
        task="transcripts",
        metric="wer",
        items=len(right),
        baseline=float(edits.sum() / words.sum()),
        candidate=float(others.sum() / words.sum()),
        difference=difference_interval(edits, others, words),
        source=f"{source}, by {normalizer.name}",
        higher_is_better=False,
    )


def _edits(
    right: Sequence[str], heard: Sequence[str], normalizer: Normalizer
) -> tuple[Floats, Floats]:
    """The words of each text, and the edits that make it of what was heard."""
    jiwer = require("jiwer", extra="speech")
    words, edits = np.zeros(len(right)), np.zeros(len(right))
    for number, texts in enumerate(zip(right, heard, strict=True)):
        wanted, had = (normalizer.apply(text).strip() for text in texts)
        words[number] = len(wanted.split())
        if not wanted:  # jiwer takes no empty reference: all that was heard is too much
            edits[number] = len(had.split())
            continue
        result = jiwer.process_words(wanted, had)
        edits[number] = result.substitutions + result.deletions + result.insertions
    return words, edits


def stack_cells(
    options: CompareOptions,
    prompt: int,  # tokens that begin a target
    longest: int | None,  # positions that the decoder knows; None where there is no limit
    frames: int | None,  # of a recording, which all have one length; None of a text
    leave_out: LeaveOut,
) -> tuple[list[Shape], list[Shape]]:
    """What is timed: each graph at each batch, and whole generations.

    A cache is never longer than the decoder reaches, nor a text than its encoder does.
    """

    def reached(lengths: Sequence[int], most: int, words: str) -> list[int]:
        for length in (length for length in lengths if length > most):
            leave_out(words.format(most, length))
        return sorted({min(length, most) for length in lengths})

    most, runs, generations = longest or sys.maxsize, list[Shape](), list[Shape]()
    pasts = reached(
        options.decode_past_lengths, most - 1,
        "decode: a cache of {} for {}, the decoder ends there",
    )  # fmt: skip
    wanted = () if frames is not None else options.prompt_lengths
    texts = reached(wanted, most, "encode: {} tokens for {}, the encoder ends there")
    for batch in options.batches:
        if frames is not None:
            runs.append(Shape("encode", batch, frames, counts=RECORDINGS.parts))
        runs += [Shape("encode", batch, length) for length in texts]
        runs.append(Shape("prefill", batch, prompt))
        runs += [Shape("decode", batch, 1, past) for past in pasts]
        for source, new in options.timing.generate:
            read = source if frames is None else prompt
            cell = Shape("prefill", batch, read, new_tokens=new)
            if max(read, prompt + new) <= most:
                generations.append(cell)
            elif batch == options.batches[0]:
                leave_out(f"{cell}: left out, the decoder ends at {longest} positions")
    return runs, generations


def open_stack_arm(
    path: Path, options: CompareOptions, *, threads: int, example: Mapping[str, Array]
) -> ComparedArm:
    """The folder of an exported encoder-decoder; what its encoder reads is an example."""
    runner = EncoderDecoderRunner(path, provider=options.provider, threads=threads, example=example)
    config = read_config(path)
    stacks = Stacks.of(SimpleNamespace(**config))
    folder = ModelFolder.beside(path, path, {**config, "num_hidden_layers": stacks.layers})

    def cells(asked: CompareOptions, leave_out: LeaveOut) -> tuple[list[Shape], list[Shape]]:
        features, prompt = example.get("input_features"), len(runner.rules.prompt)
        frames = None if features is None else features.shape[-1]
        return stack_cells(asked, prompt, target_positions(folder.config), frames, leave_out)

    return ComparedArm(
        (runner,),
        folder,
        _facts(path, stacks),
        cells=cells,
        timed_on=hash_of(example),
        encoder_layers=stacks.encoder,
    )


def hash_of(example: Mapping[str, Array]) -> str:
    """What tells examples apart."""
    read = [
        f"{name} {array.dtype} {array.shape} {sha256_bytes(array.tobytes())}"
        for name, array in sorted(example.items())
    ]
    return sha256_bytes("\n".join(read).encode())


def _facts(path: Path, stacks: Stacks) -> GraphFacts:
    """Of all three graphs; parameters count the decoder once, a plan numbers both stacks."""
    facts = {graph: read_facts(graph_file(path, graph)) for graph in GRAPHS}
    every = facts.values()
    plan = [
        {**deletion.model_dump(), "layer": deletion.layer + offset}
        for graph, offset in ((ENCODER, 0), (NEXT_STEP, stacks.encoder))
        for deletion in noted_plan(facts[graph], str(graph_file(path, graph)))
    ]
    notes = {**facts[NEXT_STEP].metadata, **facts[ENCODER].metadata}
    return GraphFacts(
        file_bytes=sum(fact.file_bytes for fact in every),
        sha256=sha256_bytes("\n".join(fact.sha256 for fact in every).encode()),
        parameters=facts[ENCODER].parameters + facts[FIRST_STEP].parameters,
        nodes=sum(fact.nodes for fact in every),
        precision=facts[FIRST_STEP].precision,
        kv_cache_bytes_per_token=_bytes_per_token(graph_file(path, NEXT_STEP)),
        vocabulary=None,
        metadata={**notes, PLAN_KEY: json.dumps(plan)},
    )


def _bytes_per_token(graph: Path) -> int:
    """What one token of a target adds to the caches; those of cross-attention don't grow."""
    return sum(
        math.prod(size for size in value.shape if isinstance(size, int)) * int(value.dtype.itemsize)
        for value in load_model(graph).graph.inputs
        if value.shape is not None and value.dtype and ".decoder." in (value.name or "")
    )


OF_ONE_GRAPH = (
    "other_text",
    "eval_sequence_length",
    *(f"quality.{name}" for name in ("tasks", "task_data", "task_limit", "prompts")),
    *(f"quality.{name}" for name in ("answer_tokens", "chat")),
    *(f"quality.agreement_{name}" for name in ("prompts", "tokens")),
)
"""Options of comparing that have no effect on an encoder-decoder."""


def refuse_unread(options: CompareOptions, *, hears: bool = False) -> None:
    """Refuses options without effect on an encoder-decoder, or on one that hears."""
    unread = {name: is_given(options, name) for name in OF_ONE_GRAPH}
    if hears:
        unread["prefill_lengths"] = is_given(options, "prefill_lengths")
        unread["timing.generate"] = any(source != 1 for source, _ in options.timing.generate)
    for name in (name for name, given in unread.items() if given):
        words = "{0} has no effect here: an encoder-decoder is judged on pairs alone, and the "
        words += "recordings that it may read have one length, 1."
        raise refusal(options, [name], words, "Leave {0} out.", code="one-graph-option")


def pairs_to_judge(folder: Path, options: CompareOptions, progress: Progress) -> JudgedPairs:
    """The evaluation text as pairs, or noise where none is named that the model reads."""
    reader, named = PairReader.beside(folder), options.eval_text
    refuse_unread(options, hears=reader.hears)
    if named == PYDOC and (reader.hears or reader.tokenizer is None):
        progress.say("accuracy: on noise, since --eval-text names nothing that the model reads")
        named = RANDOM
    return JudgedPairs.of(read_pairs(named, part="evaluation", sound=reader.hears), reader)
