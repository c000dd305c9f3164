"""By what and on which text importance is measured."""

from __future__ import annotations

from exporter.option_types import Count, Seed, Several, one_of
from exporter.options import Options, Rule, dataclass, option
from exporter.score.registry import DEFAULT, METRICS

KL_POSITIONS = 2
"""The model's answers are compared at every so many positions unless asked otherwise."""
SCORING = "How importance is scored"
MetricName = one_of(METRICS)
NAMED_ONCE = Rule(
    ("calibration",),
    lambda told: len(set(told.calibration)) != len(told.calibration),
    "{0} names a text twice.",
    "Name each text once.",
)


@dataclass(frozen=True)
class ScoreOptions(Options):
    """By what and on which text importance is measured.

    Attributes:
        metrics: The first is the report's own and decides what goes first, the others stand in its
            ``further``.
        calibration: Alike much of each; empty: ``self`` for a model that generates text and is in
            memory, else ``pydoc``.
        batch_size: On a cluster each batch is a piece of work.
        seed: For sampled text and the metric ``random``.
    """

    metrics: tuple[MetricName, ...] = option(  # type: ignore[valid-type]
        (DEFAULT,),
        f"What to score by: {', '.join(METRICS)}. Repeatable; the first decides.",
        "--metric",
        brief="What to score by: cosine, kl and others",
        metavar="NAME",
        section=SCORING,
    )
    calibration: tuple[str, ...] = option(
        (),
        "Text to look at: a text or JSONL file, hf:DATASET, pydoc, or self (text that the model "
        "samples; the default for decoders). Several make a mixture.",
        brief="Text to look at: a file, hf:DATASET, pydoc or self",
        metavar="SOURCE",
        section=SCORING,
    )
    samples: Count | None = option(
        None, "Samples of each text.", usual="about 10,000 tokens", section=SCORING
    )
    sequence_length: Several = option(512, "Tokens in a sample.", section=SCORING)
    batch_size: Count = option(4, "Samples in one forward pass.", section=SCORING)
    seed: Seed = option(0, "For sampled text.", section=SCORING, config_only=True)
    kl_positions: Count = option(
        KL_POSITIONS,
        "Of kl and perplexity: look at the answers at every N-th token.",
        section=SCORING,
        config_only=True,
    )
    blocks: bool = option(
        False,
        "Of kl and perplexity: score whole blocks as well; half as much work again.",
        section=SCORING,
        rare=True,
    )
    rules = (NAMED_ONCE,)
