"""One comparison of two encoder-decoders, from two folders to a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import (
    Arms,
    CalibrationRef,
    ComparisonReport,
    ParityCheck,
    PlannedDeletion,
    PlanParts,
)
from exporter.compare.encoder_decoder.answers import Judged, judge_answers
from exporter.compare.encoder_decoder.arms import StackFolder, open_stack_store, time_stacks
from exporter.compare.kept import decided_on, refuse_noted
from exporter.compare.kinds import ArmName
from exporter.compare.options import CompareOptions
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.base import tell_notes
from exporter.engines.runners.registry import ONNX
from exporter.errors import ComparisonError
from exporter.models.loading.model_class import hub_off, quiet_transformers
from exporter.models.model_folder import holds_stacks
from exporter.models.texts.paired import OWN_TOKENS, PAIRS, PairReader, paired_text, within
from exporter.models.texts.pairs import RANDOM, Pairs, read_pairs
from exporter.models.texts.sources import PYDOC, TextSource, refuse_same_text
from exporter.optional import require
from exporter.options import Rule, is_given
from exporter.progress import QUIET, Progress

OF_ONE_GRAPH = (
    "other_text",
    "eval_sequence_length",
    *(f"quality.{name}" for name in ("tasks", "task_data", "task_limit", "prompts")),
    *(f"quality.{name}" for name in ("answer_tokens", "chat")),
    *(f"quality.agreement_{name}" for name in ("prompts", "tokens")),
)
"""Options of comparing that have no effect on an encoder-decoder."""


def refuse_beside_stacks(arms: Sequence[ArmName], *others: object) -> None:
    """Refuses what isn't compared with an encoder-decoder's folder."""
    for arm in arms:
        if not holds_stacks(arm.path):
            raise ComparisonError(
                f"{arm} is no encoder-decoder's folder, and the other arm is one.",
                "Compare two folders that depthcut export has written.",
                code="different-kinds",
            )
    if any(others) or any(arm.kind != ONNX for arm in arms):
        raise ComparisonError(
            "An encoder-decoder is compared with its cut alone, on ONNX Runtime.",
            "Name both folders alone, and leave references, further forms and engines out.",
            code="pair-alone",
        )


def refuse_of_one_graph(options: CompareOptions) -> None:
    """Refuses options that an encoder-decoder isn't judged by."""
    for name in OF_ONE_GRAPH:
        Rule(
            (name,),
            partial(is_given, name=name),
            "{0} is for models of one graph; an encoder-decoder is judged on pairs alone.",
            "Leave {0} out.",
            code="one-graph-option",
        ).check(options)


def refuse_of_other_source(options: CompareOptions, *, hears: bool) -> None:
    """Refuses lengths of sources where these are recordings, which have one length."""
    if not hears:
        return
    hint = "Leave {0} out."
    broken: dict[str, tuple[Callable[[CompareOptions], bool], str]] = {
        "prefill_lengths": (partial(is_given, name="prefill_lengths"), hint),
        "timing.generate": (
            lambda compare_options: any(
                source != 1 for source, _ in compare_options.timing.generate
            ),
            "Say 1 for a recording: {0} 1x32.",
        ),
    }
    for name, (is_broken, help_) in broken.items():
        Rule(
            (name,),
            is_broken,
            "{0} names lengths of texts, and the model reads recordings, which have one length.",
            help_,
            code="no-source-length",
        ).check(options)


def as_text(pairs: Pairs) -> TextSource:
    """Pairs as what tells them from other texts."""
    return TextSource(pairs.source, (), pairs.sha256)


def refuse_deciding(judged: Pairs, calibration: CalibrationRef | None, parts: PlanParts) -> None:
    """Refuses to judge on what anything was decided by, as the caller tells."""
    text = as_text(judged)
    scored = [] if calibration is None else calibration.texts
    for what, refs in {"what importance was measured on": scored, **decided_on(parts)}.items():
        refuse_same_text(text, refs, what)


_NOISE = 8
"""Sources of noise that both are judged on."""
_TOKENIZERS = ("tokenizer*", "vocab.*", "*.spm", "spiece.model")


def compare_stacks(
    baseline: Path,
    candidate: Path,
    options: CompareOptions | None = None,
    *,
    parity: list[ParityCheck] | None = None,
    dropped: list[PlannedDeletion] | None = None,
    parts: PlanParts | None = None,
    calibration: CalibrationRef | None = None,
    resume: Path | None = None,
    progress: Progress = QUIET,
) -> ComparisonReport:
    """Measures a cut encoder-decoder against the whole one, on ONNX Runtime.

    The encoder, the decoder's first step and its further steps are timed apart, whole generations
    where they are asked for. Both are judged on the pairs of the evaluation text.
    """
    options, parts = options or CompareOptions(), parts or PlanParts()
    refuse_of_one_graph(options)
    folders = {"baseline": StackFolder(baseline), "candidate": StackFolder(candidate)}
    reader = reader_of(folders["baseline"])
    refuse_of_other_source(options, hears=reader.hears)
    pairs = _pairs(reader, options, progress)
    refuse_deciding(pairs, calibration, parts)
    for facts in folders["candidate"].facts.values():
        refuse_noted(as_text(pairs), facts.metadata)
    threads = options.threads or default_threads()
    runners = {
        name: EncoderDecoderRunner(folder.path, provider=options.provider, threads=threads)
        for name, folder in folders.items()
    }
    first = reader.sources(pairs, 1, part="evaluation").arrays
    store = open_stack_store(folders, first, options, resume, progress)
    machine = environment(threads=runners["baseline"].threads, gpu=options.provider == "cuda")
    with ExitStack() as stack:
        for runner in runners.values():
            stack.enter_context(runner)
        tell_notes(
            (capability for arm in runners.values() for capability in arm.capabilities), progress
        )
        judged = _judged(runners["baseline"], reader, pairs, options.eval_tokens, progress)
        accuracy = judge_answers(runners, judged, progress)
        timed = time_stacks(folders, runners, first, options, store, progress)
        arms = Arms(**{name: folder.record(runners[name]) for name, folder in folders.items()})  # type: ignore[arg-type]
    parents = {"baseline": arms.baseline.sha256, "candidate": arms.candidate.sha256}
    return ComparisonReport(
        made_from={**parents, "evaluation_text": accuracy.text_sha256},
        environment=timed.seen_on(machine),
        arms=arms,
        plan=dropped or _dropped(folders),
        calibration=calibration,
        parts=parts,
        parity=parity or [],
        latency=timed.rows,
        accuracy=accuracy,
    )


def _dropped(folders: Mapping[str, StackFolder]) -> list[PlannedDeletion]:
    """What the candidate's graphs note that was cut, and the baseline's don't."""
    already = folders["baseline"].dropped()
    return [deletion for deletion in folders["candidate"].dropped() if deletion not in already]


def reader_of(folder: StackFolder) -> PairReader:
    """What turns pairs into the inputs of an exported model."""
    tokenizer = None
    if any(next(folder.path.glob(pattern), None) for pattern in _TOKENIZERS):
        auto = require("transformers", extra="torch").AutoTokenizer
        with quiet_transformers(), hub_off():
            tokenizer = auto.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=False
            )
    return PairReader(str(folder.path), folder.path, folder.config, folder.rules, tokenizer)


def _pairs(reader: PairReader, options: CompareOptions, progress: Progress) -> Pairs:
    """What both are judged on: the evaluation text, or noise where there is none for the model."""
    named = options.eval_text
    if named == PYDOC and (reader.hears or reader.tokenizer is None):
        progress.say("accuracy: on noise, since --eval-text names nothing that the model reads")
        named = RANDOM
    return read_pairs(named, part="evaluation", sound=reader.hears)


def _judged(
    baseline: EncoderDecoderRunner,
    reader: PairReader,
    pairs: Pairs,
    tokens: int,
    progress: Progress,
) -> Judged:
    """The pairs as inputs; the baseline's own answers stand where no targets are known."""
    number = _NOISE if pairs.is_random else PAIRS
    if pairs.has_targets:
        number = reader.within(pairs, tokens)
        if number < len(pairs.pairs):
            result = f"on {number:,} of {len(pairs.pairs):,} pairs, whose targets"
            progress.say(f"accuracy: {result} have the {tokens:,} tokens of --eval-tokens")

    def generate(sources: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return baseline.generate(sources, reader.rules, reader.new_tokens(OWN_TOKENS))

    text = paired_text(reader, pairs, generate, number=number, part="evaluation", progress=progress)
    if not pairs.has_targets:
        text = text.rows(slice(0, within(text.mask.sum(axis=1), tokens)))
    return Judged(reader, pairs, text)
