"""What isn't compared with an encoder-decoder, and what it isn't judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from exporter.artifacts import CalibrationRef, PlanParts
from exporter.compare.judged_texts import decided_on
from exporter.compare.kinds import ArmName
from exporter.compare.options import CompareOptions
from exporter.engines.runners.registry import ONNX
from exporter.errors import ComparisonError
from exporter.models.encoder_decoder_folder import holds_stacks
from exporter.models.texts.pairs import Pairs
from exporter.models.texts.sources import TextSource, refuse_same_text
from exporter.options import Rule, is_given

OF_ONE_GRAPH = (
    "other_text",
    "eval_sequence_length",
    *(f"quality.{name}" for name in ("tasks", "task_data", "task_limit", "probes", "prompts")),
    *(f"quality.{name}" for name in ("answer_tokens", "chat", "long_context", "stride")),
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
            lambda told: any(source != 1 for source, _ in told.timing.generate),
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
