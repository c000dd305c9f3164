"""Holds what an arm computes against another library on the same model.

An engine is held against ONNX Runtime on the ONNX file that it was built from, and a reference of
another library against that one of the two arms which it is nearer to. A check that doesn't hold is
told in the report: the arm is then another model, or one of the two computes it wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import ParityCheck
from exporter.artifacts.latency import Shape
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.quality.agreement import LOGITS
from exporter.engines.inputs import make_inputs, random_tokens, whole_phase
from exporter.engines.runners.base import Runner
from exporter.engines.tensors import TOLERANCE

_TOKENS = 16


def witness_checks(pair: Pair) -> list[ParityCheck]:
    """Runs every arm that has a witness, and the witness, on the same tokens.

    Raises:
        BackendError: A run fails.
    """
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
