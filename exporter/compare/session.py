"""One comparison, from two paths to a report.

Both arms live in one process, on the same device, with the same threads. The report keeps the raw
times and says on what text the models were judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.artifacts import (
    FLOAT_BASELINE,
    CalibrationRef,
    ComparisonReport,
    Environment,
    LatencyRow,
    ParityCheck,
    PlannedDeletion,
    PlanParts,
)
from exporter.artifacts.store import Store
from exporter.compare.accuracy import AccuracyResult, measure_accuracy
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.encoder_decoder.refusals import refuse_beside_stacks
from exporter.compare.encoder_decoder.session import compare_stacks
from exporter.compare.judged_texts import decided_on, evaluation_texts, refuse_noted
from exporter.compare.kept import open_store
from exporter.compare.kinds import (
    open_floats,
    open_pair,
    open_references,
    reads_images,
    same_kind,
)
from exporter.compare.latency import time_all
from exporter.compare.options import CompareOptions
from exporter.compare.quantization_grid import quantization_grid, refuse_no_grid
from exporter.compare.witness import witness_checks
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.base import tell_notes
from exporter.models.encoder_decoder_folder import holds_stacks
from exporter.models.sentence_folder import longest_text
from exporter.models.texts.sources import TextSource
from exporter.progress import QUIET, Progress


def compare(
    baseline: Path | str,
    candidate: Path | str,
    options: CompareOptions | None = None,
    *,
    references: Sequence[Path | str] = (),
    also: Sequence[Path | str] = (),
    floats: tuple[Path | str, Path | str] | None = None,
    onnx: tuple[Path, Path] | None = None,
    parity: Sequence[ParityCheck] = (),
    plan: Sequence[PlannedDeletion] = (),
    calibration: CalibrationRef | None = None,
    parts: PlanParts | None = None,
    resume: Path | None = None,
    progress: Progress = QUIET,
) -> ComparisonReport:
    """Measures a candidate against a baseline.

    Args:
        baseline: The unpruned model, as ``kinds`` reads it: an ONNX file or a folder with one, or
            with the three of an encoder-decoder, and
            beside it ``tokenizer.json`` and ``config.json``; ``torch:DIR``; or an engine,
            which is described where no GPU runs it.
        candidate: The pruned model, of the same kind. Its inputs are among the baseline's.
        options: How to measure.
        references: Further arms of any kind, timed in the same rounds; they get no verdict.
        also: Further forms of the model, timed in the same rounds and on the same text; the report
            then has one table of all.
        floats: The whole and the cut model in float, where the two arms are their quantised forms:
            timed in the same rounds, on the same text; the report then has the grid of four.
        onnx: For engines, the ONNX files that both were built from; by default they are looked
            for beside them.
        parity: Checks that were made elsewhere, for the report.
        plan: What was dropped; by default what the candidate's metadata say, without what the
            baseline's say.
        calibration: The text that the scores rest on; the evaluation text must be another.
        parts: The texts that the plan was made by; the evaluation text must be another. What the
            candidate's metadata say of them is heeded, too.
        resume: A folder where times and results are kept as they come. What a run of the same
            comparison that was cut short has left there is not measured again; once the report is
            written, :func:`exporter.compare.kept.forget` removes it.
        progress: Hears what goes on.

    Without a tokenizer the arms read seeded random tokens, and there is no perplexity.

    Raises:
        ComparisonError: For arms that can't be compared, an evaluation text that is the
            text of the scores or of the plan, or too short, and logits that aren't finite.
        OnnxFileError: For a file that is no complete ONNX model.
        BackendError: When ONNX Runtime can't load or run a model where it was asked to.
        TextSourceError: When the evaluation text can't be read.
    """
    names = same_kind(baseline, candidate)
    if any(holds_stacks(name.path) for name in names):
        refuse_beside_stacks(names, references, also, floats, onnx)
        return compare_stacks(
            names[0].path, names[1].path, options, parity=list(parity), dropped=list(plan),
            parts=parts, calibration=calibration, resume=resume, progress=progress,
        )  # fmt: skip
    options = options or CompareOptions()
    options.gpu.use()
    parts = parts or PlanParts()
    scored = {} if calibration is None else {"what importance was measured on": calibration.texts}
    images = any(map(reads_images, names))
    texts = evaluation_texts(options, scored | decided_on(parts), images=images)
    further = _Further(references, also, floats, onnx)
    pair = _open((baseline, candidate), options, further, progress)
    for text in texts:
        for name, arm in pair.judged.items():
            refuse_noted(text, arm.facts.metadata, name)
    known = _Known(list(parity), list(plan) or pair.dropped(), calibration, parts)
    return _run(pair, texts, known, resume) if pair.runs else _described(pair, known)


@dataclass(frozen=True)
class _Further:
    """What stands beside the two arms; see :func:`compare`."""

    references: Sequence[Path | str]
    also: Sequence[Path | str]
    floats: tuple[Path | str, Path | str] | None
    onnx: tuple[Path, Path] | None


def _open(
    arms: tuple[Path | str, Path | str],
    options: CompareOptions,
    asked: _Further,
    progress: Progress,
) -> Pair:
    """The arms, and what stands beside them; none of them runs yet."""
    threads = options.threads or default_threads()
    floats = asked.floats
    first, second = open_pair(*arms, options, threads=threads, onnx=asked.onnx)
    options = _for_texts(options, first, progress)
    beside = open_floats(floats, (first, second), options, threads=threads) if floats else {}
    whole = beside.get(FLOAT_BASELINE, first)
    named = (*asked.also, *asked.references)
    further = open_references(named, whole, options, threads=threads)
    also = tuple(further)[: len(asked.also)]
    if first.facts.sha256 == second.facts.sha256:
        progress.say("compare: both arms are the same file; what differs below is noise")
    pair = Pair(options, first, second, progress, beside | further, bool(beside), also)
    refuse_no_grid(pair)
    pair.refuse_foreign_inputs()
    return pair


def _for_texts(
    options: CompareOptions, baseline: ComparedArm, progress: Progress
) -> CompareOptions:
    """Texts of no more tokens than the model's users give it, unless others are asked for."""
    longest = longest_text(baseline.folder.home)
    found = options.for_texts(longest)
    if found.prompt_lengths != options.prompt_lengths:
        lengths = " and ".join(map(str, found.prompt_lengths))
        progress.say(
            f"compare: {lengths} tokens are timed: sentence_bert_config.json cuts texts at "
            f"{longest} (--prefill for others)"
        )
    return found


@dataclass(frozen=True)
class _Known:
    """What the caller knows and the report repeats."""

    parity: list[ParityCheck]
    plan: list[PlannedDeletion]
    calibration: CalibrationRef | None
    parts: PlanParts


def _described(pair: Pair, known: _Known) -> ComparisonReport:
    """The report of arms that can't run here."""
    pair.progress.say(f"compare: {pair.baseline.not_run or pair.candidate.not_run}")
    threads = pair.options.threads or default_threads()
    return _report(pair, known, environment(threads=threads, gpu=False))


def _run(
    pair: Pair, texts: Sequence[TextSource], known: _Known, resume: Path | None
) -> ComparisonReport:
    """The report of arms that run here."""
    store = open_store(pair, resume)
    machine = environment(threads=pair.baseline.runner.threads, gpu=pair.on_gpu)
    with pair.running():
        return _measured(pair, texts, known, store, machine)


def _measured(
    pair: Pair,
    texts: Sequence[TextSource],
    known: _Known,
    store: Store,
    machine: Environment,
) -> ComparisonReport:
    pair.refuse_other_interface()
    tell_notes((each.capabilities for each in pair.runners), pair.progress)
    checks = witness_checks(pair)
    with pair.judging() as judges:
        answers = measure_accuracy(judges, *texts, store=store)
    timed = time_all(pair, store)
    seen = {
        "other_cpu_share": timed.other_cpu_share,
        "states": timed.states,
        "order_seed": timed.order_seed,
    }
    known = replace(known, parity=[*known.parity, *checks])
    return _report(pair, known, machine.model_copy(update=seen), timed.rows, answers)


def _report(
    pair: Pair,
    known: _Known,
    machine: Environment,
    latency: Sequence[LatencyRow] = (),
    answers: AccuracyResult | None = None,
) -> ComparisonReport:
    answers = answers or AccuracyResult()
    parents = {name: arm.facts.sha256 for name, arm in pair.arms.items()}
    if answers.accuracy is not None:
        parents["evaluation_text"] = answers.accuracy.text_sha256
    return ComparisonReport(
        made_from=parents,
        environment=machine,
        arms=pair.records(),
        plan=known.plan,
        calibration=known.calibration,
        parts=known.parts,
        parity=known.parity,
        latency=list(latency),
        accuracy=answers.accuracy,
        corners=quantization_grid(pair, latency, answers.grid),
        longest_text=longest_text(pair.baseline.folder.home),
    )
