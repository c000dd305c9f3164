"""Opens two encoder-decoders to be compared, and refuses what is for models of one graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.compare.arms import Comparison
from exporter.compare.encoder_decoder.answers import JudgedPairs
from exporter.compare.encoder_decoder.arms import open_stack_arm
from exporter.compare.kinds import ArmName
from exporter.compare.options import CompareOptions
from exporter.engines.environment import default_threads
from exporter.engines.runners.registry import ONNX
from exporter.errors import ComparisonError
from exporter.models.model_folder import holds_stacks
from exporter.models.texts.paired import PairReader
from exporter.models.texts.pairs import RANDOM, read_pairs
from exporter.models.texts.sources import PYDOC
from exporter.options import is_given, refusal
from exporter.progress import Progress

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
    words = "{0} is for models of one graph; an encoder-decoder is judged on pairs alone."
    for name in OF_ONE_GRAPH:
        if is_given(options, name):
            raise refusal(options, [name], words, "Leave {0} out.", code="one-graph-option")


def refuse_of_other_source(options: CompareOptions, *, hears: bool) -> None:
    """Refuses lengths of sources where these are recordings, which have one length."""
    broken = {
        "prefill_lengths": is_given(options, "prefill_lengths"),
        "timing.generate": any(source != 1 for source, _ in options.timing.generate),
    }
    words = "{0} names lengths of texts, and the model reads recordings, which have one length."
    for name, is_broken in broken.items():
        if hears and is_broken:
            hint = "Leave {0} out; a recording's is 1, such as 1x32."
            raise refusal(options, [name], words, hint, code="no-source-length")


def open_stacks(
    folders: Sequence[Path], options: CompareOptions, progress: Progress
) -> tuple[JudgedPairs, Comparison]:
    """Both arms, and what they are judged on: the evaluation text, or noise where there is none.

    The encoder, the decoder's first step and its further steps are timed apart.
    """
    refuse_of_one_graph(options)
    reader, named = PairReader.beside(folders[0]), options.eval_text
    refuse_of_other_source(options, hears=reader.hears)
    if named == PYDOC and (reader.hears or reader.tokenizer is None):
        progress.say("accuracy: on noise, since --eval-text names nothing that the model reads")
        named = RANDOM
    pairs = read_pairs(named, part="evaluation", sound=reader.hears)
    example = reader.sources(pairs, 1, part="evaluation").arrays
    threads = options.threads or default_threads()
    arms = {
        name: open_stack_arm(folder, options, threads=threads, example=example)
        for name, folder in zip(("baseline", "candidate"), folders, strict=True)
    }
    comparison = Comparison(arms, options=options, progress=progress)
    return JudgedPairs.of(pairs, reader), comparison
