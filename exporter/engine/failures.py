"""Why a builder made no engine, in words: from the errors that it logs."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.errors import EngineError

# What a builder says (TensorRT-RTX 1.7.1), what that means, and what to do.
_KNOWN = (
    (
        "within workspace limit",
        "some layer's kernels all need more scratch memory than the workspace that it was given",
        "Give it more, or leave --workspace out.",
    ),
    (
        "Attention operation was not supported by a dedicated kernel",
        "it has no kernel for the graph's Attention operators in this precision and these shapes, "
        "and does not write them out in basic ones",
        "Export at opset 20, which writes attention in basic operators, or in float16.",
    ),
    (
        "out of memory",
        "memory ran out",
        "Narrower ranges, a lower --optimization-level or a smaller --workspace need less.",
    ),
)


def no_engine(errors: Sequence[str]) -> EngineError:
    """The error for a build that gave no engine.

    Args:
        errors: What the builder logged as errors, in order.
    """
    for said, meaning, hint in _KNOWN:
        if any(said.lower() in error.lower() for error in errors):
            return EngineError(f"The builder made no engine: {meaning}.", hint)
    reason = errors[0] if errors else "it gives no reason"
    return EngineError(
        f"The builder made no engine: {reason}",
        "Other profiles or another precision may help; -v shows all that it said.",
    )
