"""One comparison of two encoder-decoders, from two folders to a report."""

from __future__ import annotations

from collections.abc import Mapping
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
from exporter.compare.encoder_decoder.arms import StackFolder
from exporter.compare.encoder_decoder.refusals import (
    as_text,
    refuse_deciding,
    refuse_of_one_graph,
    refuse_of_other_source,
)
from exporter.compare.encoder_decoder.timing import StackTiming, open_stack_store
from exporter.compare.judged_texts import refuse_noted
from exporter.compare.options import CompareOptions
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.base import tell_notes
from exporter.models.loading.model_class import hub_off, quiet_transformers
from exporter.models.texts.paired import OWN_TOKENS, PAIRS, PairReader, paired_text, within
from exporter.models.texts.pairs import RANDOM, Pairs, read_pairs
from exporter.models.texts.sources import PYDOC
from exporter.optional import require
from exporter.progress import QUIET, Progress

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

    Args:
        baseline: The folder of the whole model's graphs.
        candidate: The folder of the cut one's.
        options: How to measure.
        parity: Checks that were made elsewhere, for the report.
        dropped: By default what the candidate's metadata say.
        parts: The texts that the plan was made by; the evaluation text must be another. What the
            candidate's metadata say of them is heeded, too.
        calibration: What the scores rest on; the evaluation text must be another.
        resume: A folder where times are kept as they come; see
            :func:`exporter.compare.session.compare`.
        progress: Hears what goes on.

    Raises:
        OptionError: An option is for other models.
        ComparisonError: The evaluation text is that of the scores or of the plan, or logits
            aren't finite.
        DepthcutError: A file can't be read, or a run fails.
    """
    options, parts = options or CompareOptions(), parts or PlanParts()
    refuse_of_one_graph(options)
    options.gpu.use()
    folders = {"baseline": StackFolder(baseline), "candidate": StackFolder(candidate)}
    reader = reader_of(folders["baseline"])
    refuse_of_other_source(options, hears=reader.hears)
    pairs = _pairs(reader, options, progress)
    refuse_deciding(pairs, calibration, parts)
    for facts in folders["candidate"].facts.values():
        refuse_noted(as_text(pairs), facts.metadata)
    timing = _timing(folders, reader, pairs, options, resume, progress)
    found = _run(timing, reader, pairs)
    told = {"plan": dropped or _dropped(folders), "calibration": calibration, "parts": parts}
    return found.model_copy(update={**told, "parity": parity or []})


def _run(timing: StackTiming, reader: PairReader, pairs: Pairs) -> ComparisonReport:
    """The report of what was measured, without what the caller knows."""
    folders, options, progress = timing.folders, timing.options, timing.progress
    threads = timing.runners["baseline"].threads
    machine = environment(threads=threads, gpu=options.provider == "cuda")
    with timing.running() as runners:
        tell_notes((each for arm in runners.values() for each in arm.capabilities), progress)
        judged = _judged(runners["baseline"], reader, pairs, options.eval_tokens, progress)
        accuracy = judge_answers(runners, judged, progress)
        machine, rows = timing.timed(machine)
        arms = Arms(**{name: each.record(runners[name]) for name, each in folders.items()})  # type: ignore[arg-type]
    parents = {"baseline": arms.baseline.sha256, "candidate": arms.candidate.sha256}
    return ComparisonReport(
        made_from={**parents, "evaluation_text": accuracy.text_sha256},
        environment=machine,
        arms=arms,
        parity=[],
        latency=rows,
        accuracy=accuracy,
    )


def _dropped(folders: Mapping[str, StackFolder]) -> list[PlannedDeletion]:
    """What the candidate's graphs note that was cut, and the baseline's don't."""
    already = folders["baseline"].dropped()
    return [each for each in folders["candidate"].dropped() if each not in already]


def _timing(
    folders: Mapping[str, StackFolder],
    reader: PairReader,
    pairs: Pairs,
    options: CompareOptions,
    resume: Path | None,
    progress: Progress,
) -> StackTiming:
    """What is timed, on the first of the sources."""
    threads = options.threads or default_threads()
    first = reader.sources(pairs, 1, part="evaluation")
    return StackTiming(
        folders,
        {
            name: EncoderDecoderRunner(each.path, provider=options.provider, threads=threads)
            for name, each in folders.items()
        },
        first.arrays,
        options,
        open_stack_store(folders, first.arrays, options, resume, progress),
        progress,
    )


def reader_of(folder: StackFolder) -> PairReader:
    """What turns pairs into the inputs of an exported model.

    Raises:
        ComparisonError: It has no config.
        ModelSourceError: That doesn't say how a target begins.
    """
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
            told = f"on {number:,} of {len(pairs.pairs):,} pairs, whose targets"
            progress.say(f"accuracy: {told} have the {tokens:,} tokens of --eval-tokens")

    def generate(sources: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return baseline.generate(sources, reader.rules, reader.new_tokens(OWN_TOKENS))

    text = paired_text(reader, pairs, generate, number=number, part="evaluation", progress=progress)
    if not pairs.has_targets:
        text = text.rows(slice(0, within(text.mask.sum(axis=1), tokens)))
    return Judged(reader, pairs, text)
