"""One comparison of two encoder-decoders, from two folders to a report."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import (
    Arms,
    CalibrationRef,
    ComparisonReport,
    Environment,
    LatencyRow,
    ParityCheck,
    PlannedDeletion,
    PlanParts,
)
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.compare.encoder_decoder.answers import Judged, judge_answers
from exporter.compare.encoder_decoder.arms import StackArm, StackFolder
from exporter.compare.generating import GenerationCell
from exporter.compare.judged_texts import decided_on, refuse_noted
from exporter.compare.kept import store_of
from exporter.compare.kinds import ArmName
from exporter.compare.options import CompareOptions
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.subjects import TimedCell
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.registry import ONNX
from exporter.errors import ComparisonError
from exporter.models.encoder_decoder_folder import holds_stacks
from exporter.models.loading.transformers_calls import hub_off, quiet_transformers
from exporter.models.texts.paired import OWN_TOKENS, PAIRS, PairReader, paired_text
from exporter.models.texts.pairs import RANDOM, Pairs, read_pairs
from exporter.models.texts.sources import PYDOC, TextSource, refuse_same_text
from exporter.optional import require
from exporter.options import Rule, is_given
from exporter.progress import QUIET, Progress

_NOISE = 8
"""Sources of noise that both are judged on."""
_OF_ONE_GRAPH = (
    "other_text",
    *(f"quality.{name}" for name in ("tasks", "prompts", "long_context", "stride")),
    *(f"quality.agreement_{name}" for name in ("prompts", "tokens")),
)
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
    options = options or CompareOptions()
    refuse_of_one_graph(options)
    folders = {"baseline": StackFolder(baseline), "candidate": StackFolder(candidate)}
    reader = reader_of(folders["baseline"])
    pairs = _pairs(reader, options, progress)
    _refuse_deciding(pairs, folders["candidate"], calibration, parts or PlanParts())
    session = _Session(folders, options, resume, progress)
    with session.running() as runners:
        judged = _judged(runners["baseline"], reader, pairs, options.eval_tokens, progress)
        accuracy = judge_answers(runners, judged, progress)
        machine, rows = session.timed(judged)
        arms = Arms(**{name: each.record(runners[name]) for name, each in folders.items()})  # type: ignore[arg-type]
    parents = {"baseline": arms.baseline.sha256, "candidate": arms.candidate.sha256}
    return ComparisonReport(
        made_from={**parents, "evaluation_text": accuracy.text_sha256},
        environment=machine,
        arms=arms,
        plan=dropped or folders["candidate"].dropped(),
        calibration=calibration,
        parts=parts or PlanParts(),
        parity=parity or [],
        latency=rows,
        accuracy=accuracy,
    )


def refuse_beside_stacks(arms: Sequence[ArmName], *others: object) -> None:
    """Refuses what isn't compared with an encoder-decoder's folder.

    Args:
        arms: Both must be such folders, for ONNX Runtime.
        others: What else was asked for.

    Raises:
        ComparisonError: One isn't, or something is.
    """
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
    """Refuses options that an encoder-decoder isn't judged by.

    Raises:
        OptionError: With the option.
    """
    for name in _OF_ONE_GRAPH:
        Rule(
            (name,),
            partial(is_given, name=name),
            "{0} is for models of one graph; an encoder-decoder is judged on pairs alone.",
            "Leave {0} out.",
            code="one-graph-option",
        ).check(options)


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


def _refuse_deciding(
    pairs: Pairs, candidate: StackFolder, calibration: CalibrationRef | None, parts: PlanParts
) -> None:
    """Refuses to judge on what anything was decided by, as the caller or the graphs tell."""
    text = TextSource(pairs.source, (), pairs.sha256)
    scored = [] if calibration is None else calibration.texts
    for what, refs in {"what importance was measured on": scored, **decided_on(parts)}.items():
        refuse_same_text(text, refs, what)
    for facts in candidate.facts.values():
        refuse_noted(text, facts.metadata)


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
    return Judged(reader, pairs, text)


class _Session:
    """Both arms, how they are measured, and where what is measured is kept."""

    def __init__(
        self,
        folders: Mapping[str, StackFolder],
        options: CompareOptions,
        resume: Path | None,
        progress: Progress,
    ) -> None:
        self._folders, self._options, self._progress = folders, options, progress
        self._threads = options.threads or default_threads()
        self._on_gpu = options.provider == "cuda"
        self._resume = resume
        self._runners = {
            name: EncoderDecoderRunner(each.path, provider=options.provider, threads=self._threads)
            for name, each in folders.items()
        }

    @contextmanager
    def running(self) -> Iterator[Mapping[str, EncoderDecoderRunner]]:
        """Enters both runners."""
        with ExitStack() as stack:
            for runner in self._runners.values():
                stack.enter_context(runner)
            yield self._runners

    def timed(self, judged: Judged) -> tuple[Environment, list[LatencyRow]]:
        """The machine, and a row for each graph and shape; the runners are entered."""
        whole, options, seed = self._folders["baseline"], self._options, secrets.randbits(32)
        vocabulary, source = int(whole.config["vocab_size"]), judged.source(0)
        arms = {
            name: StackArm(runner, whole.rules, source, vocabulary)
            for name, runner in self._runners.items()
        }
        budget = TimingBudget(
            seconds=options.timing.time_budget_s,
            rounds=options.rounds,
            threshold=options.timing.threshold,
            reload=options.timing.reload,
            seed=seed,
            power=options.timing.goal,
        )
        cells = cells_of(whole, judged, options)
        rows = measure_rows(arms, cells, budget, store=self._store(), progress=self._progress)
        machine = environment(threads=self._threads, gpu=self._on_gpu)
        return machine.model_copy(update={"order_seed": seed}), rows

    def _store(self) -> Store:
        provider, told = self._options.provider, self._folders.items()
        arms = {name: [provider, each.sha256] for name, each in told}
        return store_of(
            arms, self._options, self._resume, gpu=self._on_gpu, progress=self._progress
        )


def cells_of(folder: StackFolder, judged: Judged, options: CompareOptions) -> list[TimedCell]:
    """What is timed: each graph at each batch, and whole generations.

    A cache is never longer than the decoder reaches.

    Raises:
        ComparisonError: Nothing is left to time.
    """
    longest, prompt = folder.longest_target, len(folder.rules.prompt)
    positions = judged.source(0)
    frames = positions["input_features"].shape[-1] if judged.reader.hears else None
    lengths = (frames,) if frames is not None else options.prefill_lengths
    most = None if longest is None else longest - 1
    pasts = {past if most is None else min(past, most) for past in options.decode_past_lengths}
    cells: list[TimedCell] = []
    for batch in options.batches:
        cells += [Shape("encode", batch, length) for length in _within(lengths, frames, folder)]
        cells.append(Shape("prefill", batch, prompt))
        cells += [Shape("decode", batch, 1, past) for past in sorted(pasts)]
        cells += [
            GenerationCell(batch, prompt, new)
            for _, new in options.timing.generate
            if longest is None or prompt + new <= longest
        ]
    if not cells:
        raise ComparisonError("There is nothing to time.", code="no-shape-left")
    return cells


def _within(lengths: tuple[int, ...], frames: int | None, folder: StackFolder) -> list[int]:
    """Lengths of sources that the encoder takes; a text's are limited like a target's."""
    longest = None if frames is not None else folder.longest_target
    return sorted({length if longest is None else min(length, longest) for length in lengths})
