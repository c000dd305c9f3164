"""One comparison, from two paths to a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np

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
from exporter.artifacts.latency import Shape
from exporter.compare.accuracy import (
    AccuracyResult,
    measure_accuracy,
    quantization_grid,
    refuse_no_grid,
)
from exporter.compare.agreement import LOGITS
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.kept import (
    decided_on,
    evaluation_texts,
    noted_by,
    open_store,
    refuse_deciding,
)
from exporter.compare.kinds import ArmName, open_arms, reads_images, same_kind
from exporter.compare.latency import time_all
from exporter.compare.options import CompareOptions
from exporter.compare.sequences import pairs_to_judge
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.base import Runner, tell_notes
from exporter.engines.tensors import tolerance_of, whole_phase
from exporter.models.sentence_folder import longest_text
from exporter.models.texts.sources import TextSource
from exporter.progress import QUIET, Progress

_TOKENS = 16


def witness_checks(comparison: Comparison) -> list[ParityCheck]:
    """Runs each reference that should answer as an arm does, and that arm, on the same tokens."""
    checks = list(_checks(comparison))
    for check in checks:
        if not check.passed:
            comparison.progress.say(
                f"{check.name}: off by {check.max_abs_error:.2e}, more than {check.tolerance:.2e}: "
                "they compute different results"
            )
    return checks


def _checks(comparison: Comparison) -> Iterator[ParityCheck]:
    sides = {name: comparison.arms[name] for name in comparison.pair}
    for name, arm in comparison.arms.items():
        alike = name not in sides and arm.facts.precision == comparison.whole.facts.precision
        if alike and arm.runner.backend != comparison.whole.runner.backend:
            checks = (
                _check(comparison, arm, other.runner, f"reference {name} against the {side}")
                for side, other in sides.items()
            )
            yield min(checks, key=lambda check: check.max_abs_error)


def _check(comparison: Comparison, arm: ComparedArm, witness: Runner, what: str) -> ParityCheck:
    length = min(_TOKENS, comparison.whole.folder.longest_sequence or _TOKENS)
    shape, vocabulary = Shape(whole_phase(witness.inputs), 1, length), comparison.vocabulary()
    output = next(s.name for s in witness.outputs if not s.name.startswith("present"))
    got, want = (
        runner.run(runner.inputs_of(shape, vocabulary), [output], phase=shape.phase)[output].astype(
            np.float64
        )
        for runner in (arm.runner, witness)
    )
    if output == LOGITS:  # an engine may give those of a prompt's last token alone
        want = want[:, -got.shape[1] :]
    error = float(np.abs(got - want).max()) if got.shape == want.shape else float("inf")
    tolerance = tolerance_of(arm.facts.precision) * max(1.0, float(np.abs(want).max()))
    return ParityCheck(
        name=f"{output} of the {what}",
        phase=shape.phase,
        max_abs_error=error if np.isfinite(error) else float("inf"),
        tolerance=tolerance,
        passed=bool(error <= tolerance),
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
        OnnxFileError: There is no such model, or it can't be read.
        ComparisonError: The two can't be compared, or one gives no finite numbers.
        BackendError: A runtime is missing, or can't run a model.
    """
    names = same_kind(baseline, candidate, [*also, *references, *(floats or ())])
    options, parts = options or CompareOptions(), parts or PlanParts()
    scored = {} if calibration is None else {"what importance was measured on": calibration.texts}
    texts = _texts(names, options, scored | decided_on(parts), progress)
    arms = open_arms(
        names,
        options,
        threads=options.threads or default_threads(),
        onnx=onnx,
        floats=floats,
        further=[*also, *references],
        judged_on=texts,
        progress=progress,
    )
    comparison = _opened(arms, options, {*[*arms][len(arms) - len(references) :]}, progress)
    refuse_deciding(texts, noted_by(comparison.judged))
    measure = _measured if comparison.runs else _described
    measured = measure(comparison, texts, resume)
    result = {
        "plan": list(plan) or comparison.dropped(),
        "calibration": calibration,
        "parts": parts,
        "parity": [*parity, *measured.parity],
    }
    return measured.model_copy(update=result)


def _texts(
    names: Sequence[ArmName],
    options: CompareOptions,
    decided: Mapping[str, Iterable[TextSource | CalibrationRef]],
    progress: Progress,
) -> list[TextSource]:
    """What the arms are judged on, which is nothing that anything was decided by."""
    if not names[0].in_stacks:
        return evaluation_texts(options, decided, images=any(map(reads_images, names)))
    texts: list[TextSource] = [pairs_to_judge(names[0].path, options, progress)]
    refuse_deciding(texts, decided)
    return texts


def _opened(
    arms: Mapping[str, ComparedArm],
    options: CompareOptions,
    timed_alone: AbstractSet[str],
    progress: Progress,
) -> Comparison:
    """Arms that can be compared; none of them runs yet."""
    reference = FLOAT_BASELINE if FLOAT_BASELINE in arms else "baseline"
    options = _for_texts(options, arms["baseline"], progress)
    comparison = Comparison(arms, reference, options, progress, timed_alone)
    if arms["baseline"].facts.sha256 == arms["candidate"].facts.sha256:
        progress.say("compare: both arms are the same file; what differs below is noise")
    refuse_no_grid(comparison)
    comparison.refuse_other_models(running=False)
    return comparison


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


def _described(comparison: Comparison, *_: object) -> ComparisonReport:
    """The report of arms that can't run here."""
    reasons = (arm.not_run for arm in comparison.arms.values())
    comparison.progress.say(f"compare: {next(filter(None, reasons), None)}")
    machine = environment(threads=comparison.options.threads or default_threads(), gpu=False)
    return _report(comparison, machine, [], [], AccuracyResult())


def _measured(
    comparison: Comparison, texts: Sequence[TextSource], resume: Path | None
) -> ComparisonReport:
    """The report of arms that run here, and are checked against their witnesses."""
    store = open_store(comparison, resume)
    machine = environment(threads=comparison.whole.runner.threads, gpu=comparison.on_gpu)
    with comparison.running():
        comparison.refuse_other_models(running=True)
        sides = (comparison.arms[name].runner for name in comparison.pair)
        tell_notes((runner.capabilities for runner in sides), comparison.progress)
        checks = witness_checks(comparison)
        with comparison.judging() as judges:
            answers = measure_accuracy(judges, *texts, store=store)
        timed = time_all(comparison, store)
        return _report(comparison, timed.seen_on(machine), checks, timed.rows, answers)


def _report(
    comparison: Comparison,
    machine: Environment,
    checks: Sequence[ParityCheck],
    rows: Sequence[LatencyRow],
    answers: AccuracyResult,
) -> ComparisonReport:
    parents = {name: arm.facts.sha256 for name, arm in comparison.arms.items()}
    if answers.accuracy is not None:
        parents["evaluation_text"] = answers.accuracy.text_sha256
    return ComparisonReport(
        made_from=parents,
        environment=machine,
        arms=comparison.records(),
        parity=list(checks),
        latency=list(rows),
        left_out=list(comparison.left_out),
        accuracy=answers.accuracy,
        corners=quantization_grid(comparison, rows, answers.grid),
    )
