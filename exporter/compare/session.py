"""One comparison, from two paths to a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import (
    FLOAT_BASELINE,
    CalibrationRef,
    ComparisonReport,
    Environment,
    ParityCheck,
    PlannedDeletion,
    PlanParts,
)
from exporter.artifacts.latency import Shape
from exporter.compare.accuracy import (
    AccuracyResult,
    measure_accuracy,
    quantization_grid,
    refuse_no_grid,
)
from exporter.compare.agreement import LOGITS
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.encoder_decoder.session import compare_stacks, refuse_beside_stacks
from exporter.compare.kept import decided_on, evaluation_texts, open_store, refuse_noted
from exporter.compare.kinds import (
    open_floats,
    open_pair,
    open_references,
    reads_images,
    same_kind,
)
from exporter.compare.latency import Timed, time_all
from exporter.compare.options import CompareOptions
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.base import Runner, tell_notes
from exporter.engines.tensors import TOLERANCE, make_inputs, random_tokens, whole_phase
from exporter.models.model_folder import holds_stacks
from exporter.models.sentence_folder import longest_text
from exporter.models.texts.sources import TextSource
from exporter.progress import QUIET, Progress

_TOKENS = 16


def witness_checks(pair: Pair) -> list[ParityCheck]:
    """Runs every arm that has a witness, and the witness, on the same tokens."""
    checks = list(_checks(pair))
    for check in checks:
        _tell(pair, check)
    return checks


def _checks(pair: Pair) -> Iterator[ParityCheck]:
    for name, arm in _two(pair):
        if arm.witness is not None:
            with arm.witness as witness:
                yield _check(pair, arm, witness, f"engine against ONNX Runtime ({name})")
    for name, arm in pair.references.items():
        alike = arm.facts.precision == pair.baseline.facts.precision
        if alike and arm.runner.backend != pair.baseline.runner.backend:
            yield min(
                (
                    _check(pair, arm, other.runner, f"reference {name} against the {side}")
                    for side, other in _two(pair)
                ),
                key=lambda check: check.max_abs_error,
            )


def _two(pair: Pair) -> tuple[tuple[str, ComparedArm], tuple[str, ComparedArm]]:
    return ("baseline", pair.baseline), ("candidate", pair.candidate)


def _check(pair: Pair, arm: ComparedArm, witness: Runner, what: str) -> ParityCheck:
    shape = Shape(whole_phase(witness.inputs), 1, _tokens(pair))
    tokens = random_tokens(shape, pair.vocabulary())
    output = next(s.name for s in witness.outputs if not s.name.startswith("present"))
    got, want = (_output(runner, shape, tokens, output) for runner in (arm.runner, witness))
    if output == LOGITS:  # an engine may give those of a prompt's last token alone
        want = want[:, -got.shape[1] :]
    error = float(np.abs(got - want).max()) if got.shape == want.shape else float("inf")
    tolerance = TOLERANCE.get(arm.facts.precision, 1e-1) * max(1.0, float(np.abs(want).max()))
    return ParityCheck(
        name=f"{output} of the {what}",
        phase=shape.phase,
        max_abs_error=error if np.isfinite(error) else float("inf"),
        tolerance=tolerance,
        passed=bool(error <= tolerance),
    )


def _output(
    runner: Runner, shape: Shape, tokens: NDArray[np.int64], output: str
) -> NDArray[np.float64]:
    inputs = make_inputs(runner.inputs, shape, tokens)
    return runner.run(inputs, [output], phase=shape.phase)[output].astype(np.float64)


def _tokens(pair: Pair) -> int:
    return min(_TOKENS, pair.baseline.folder.longest_sequence or _TOKENS)


def _tell(pair: Pair, check: ParityCheck) -> None:
    if not check.passed:
        pair.progress.say(
            f"{check.name}: off by {check.max_abs_error:.2e}, more than {check.tolerance:.2e}: "
            "they compute different results; depthcut verify-engine compares "
            "differs"
        )


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

    Calls take turns, and times are compared within a round. Without a tokenizer the arms read
    seeded random tokens, and there is no perplexity.

    Args:
        baseline: A folder or file of ONNX or an engine, or what another runtime runs:
            ``torch:DIR``, ``openvino:DIR``, ``llama.cpp:FILE``.
        candidate: The same, of the cut.
        options: Lengths, rounds, threads, provider, texts and tasks; None: the usual ones.
        references: Other models, timed in the same rounds without a verdict.
        also: Other forms, timed and judged in one table with both.
        floats: The float versions of both, if these are quantised.
        onnx: The graphs that two engines were built from.
        parity: What was compared with PyTorch, for the report.
        plan: What was cut, if the candidate doesn't say so itself.
        calibration: The text of the scores, for the report.
        parts: Texts that the plan rests on, which can't judge it.
        resume: A folder where what is measured is kept, and found by the next call.
        progress: Hears of each step.

    Returns:
        Times in ms with the speedup's interval of 95 %, accuracy, sizes in bytes, the machine.

    Raises:
        ComparisonError: The two can't be compared, or one gives no finite numbers.
        BackendError: A runtime is missing, or can't run a model.
    """
    names = same_kind(baseline, candidate)
    if any(holds_stacks(name.path) for name in names):
        refuse_beside_stacks(names, references, also, floats, onnx)
        return compare_stacks(
            names[0].path, names[1].path, options, parity=list(parity), dropped=list(plan),
            parts=parts, calibration=calibration, resume=resume, progress=progress,
        )  # fmt: skip
    options = options or CompareOptions()
    parts = parts or PlanParts()
    scored = {} if calibration is None else {"what importance was measured on": calibration.texts}
    images = any(map(reads_images, names))
    texts = evaluation_texts(options, scored | decided_on(parts), images=images)
    pair = _open(
        (baseline, candidate), options, (also, references), floats, onnx=onnx, progress=progress
    )
    for text in texts:
        for name, arm in pair.judged.items():
            refuse_noted(text, arm.facts.metadata, name)
    measured, checks = _measured(pair, texts, resume) if pair.runs else (_described(pair), [])
    result = {
        "plan": list(plan) or pair.dropped(),
        "calibration": calibration,
        "parts": parts,
        "parity": [*parity, *checks],
    }
    return measured.model_copy(update=result)


def _open(
    arms: tuple[Path | str, Path | str],
    options: CompareOptions,
    further: tuple[Sequence[Path | str], Sequence[Path | str]],  # judged, too; timed alone
    floats: tuple[Path | str, Path | str] | None,
    *,
    onnx: tuple[Path, Path] | None,
    progress: Progress,
) -> Pair:
    """The arms, and what stands beside them; none of them runs yet."""
    threads = options.threads or default_threads()
    first, second = open_pair(*arms, options, threads=threads, onnx=onnx)
    options = _for_texts(options, first, progress)
    beside = open_floats(floats, (first, second), options, threads=threads) if floats else {}
    whole = beside.get(FLOAT_BASELINE, first)
    named = open_references((*further[0], *further[1]), whole, options, threads=threads)
    also = tuple(named)[: len(further[0])]
    if first.facts.sha256 == second.facts.sha256:
        progress.say("compare: both arms are the same file; what differs below is noise")
    pair = Pair(options, first, second, progress, beside | named, bool(beside), also)
    refuse_no_grid(pair)
    pair.refuse_foreign_inputs()
    return pair


def _for_texts(
    options: CompareOptions, baseline: ComparedArm, progress: Progress
) -> CompareOptions:
    """Texts of no more tokens than the model's users give it, unless others are asked for."""
    longest = longest_text(baseline.folder.home)
    compare_options = options.for_texts(longest)
    if compare_options.prompt_lengths != options.prompt_lengths:
        lengths = " and ".join(map(str, compare_options.prompt_lengths))
        progress.say(
            f"compare: {lengths} tokens are timed: sentence_bert_config.json cuts texts at "
            f"{longest} (--prefill for others)"
        )
    return compare_options


def _described(pair: Pair) -> ComparisonReport:
    """The report of arms that can't run here."""
    pair.progress.say(f"compare: {pair.baseline.not_run or pair.candidate.not_run}")
    threads = pair.options.threads or default_threads()
    return _report(pair, environment(threads=threads, gpu=False), Timed(), AccuracyResult())


def _measured(
    pair: Pair, texts: Sequence[TextSource], resume: Path | None
) -> tuple[ComparisonReport, list[ParityCheck]]:
    """The report of arms that run here, and the checks against their witnesses."""
    store = open_store(pair, resume)
    machine = environment(threads=pair.baseline.runner.threads, gpu=pair.on_gpu)
    with pair.running():
        pair.refuse_other_interface()
        tell_notes((runner.capabilities for runner in pair.runners), pair.progress)
        checks = witness_checks(pair)
        with pair.judging() as judges:
            answers = measure_accuracy(judges, *texts, store=store)
        timed = time_all(pair, store)
        return _report(pair, timed.seen_on(machine), timed, answers), checks


def _report(
    pair: Pair, machine: Environment, timed: Timed, answers: AccuracyResult
) -> ComparisonReport:
    parents = {name: arm.facts.sha256 for name, arm in pair.arms.items()}
    if answers.accuracy is not None:
        parents["evaluation_text"] = answers.accuracy.text_sha256
    return ComparisonReport(
        made_from=parents,
        environment=machine,
        arms=pair.records(),
        parity=[],
        latency=timed.rows,
        accuracy=answers.accuracy,
        corners=quantization_grid(pair, timed.rows, answers.grid),
    )
