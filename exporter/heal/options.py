"""How a plan is to be healed. Needs no PyTorch."""

from __future__ import annotations

from exporter.artifacts import HealKind
from exporter.option_types import Count, PositiveNumber, Seed, Several
from exporter.options import Options, Rule, dataclass, option
from exporter.score.options import SCORING

HEALING = "How the plan is healed"


@dataclass(frozen=True)
class HealOptions(Options):
    """What takes the branches' places, and on which texts it is fitted and judged.

    Attributes:
        kind: ``best``: for each branch what helps most on held-out text.
        ridge: None: chosen for each branch.
        calibration: Alike much of each; empty: the default of scoring.
        samples: None: about 10,000 tokens of each text.
        check_text: None: ``pydoc``, or ``self`` for a model that is calibrated on that.
    """

    kind: HealKind = option(
        "linear",
        "What is fitted: the mean of a branch's output, a linear map of what it reads, or for each "
        "branch what helps most.",
        "--heal",
        brief="What replaces the dropped: bias, linear or best",
        section=HEALING,
    )
    rank: Count | None = option(
        None, "Rank of linear maps, kept as two factors.", usual="full", section=HEALING
    )
    ridge: PositiveNumber | None = option(
        None,
        "Ridge of the linear maps, relative to the mean eigenvalue of what a branch reads.",
        usual="chosen for each branch on held-out tokens",
        section=HEALING,
        config_only=True,
    )
    sequential: bool = option(
        False,
        "Fit each replacement on the already healed model below it, not each alone on the whole "
        "model.",
        section=HEALING,
        rare=True,
    )
    calibration: tuple[str, ...] = option(
        (),
        "Text to fit on: a text or JSONL file, hf:DATASET, pydoc, or self (text that the model "
        "samples; the default for decoders). Several make a mixture.",
        "--heal-calibration",
        metavar="SOURCE",
        section=SCORING,
    )
    samples: Count | None = option(
        None,
        "Samples to fit on, of each text; a quarter as many more, four at least, are held out.",
        usual="about 10,000 tokens",
        section=SCORING,
    )
    sequence_length: Several = option(512, "Tokens in a sample.", section=SCORING)
    check_text: str | None = option(
        None,
        "Text of another domain, on which the gain is measured too.",
        metavar="SOURCE",
        usual="pydoc, or self when calibrated on pydoc",
        section=HEALING,
    )
    batch_size: Count = option(4, "Samples in one forward pass.", section=SCORING, config_only=True)
    seed: Seed = option(0, "For sampled text.", section=SCORING, config_only=True)
    rules = (
        Rule(
            ("rank", "kind"),
            lambda told: told.kind == "bias" and told.rank is not None,
            "A bias has no rank: {0} is for linear maps.",
            "Leave it away, or take {1} linear or best.",
        ),
        Rule(
            ("ridge", "kind"),
            lambda told: told.kind == "bias" and told.ridge is not None,
            "A bias has no ridge: {0} is for linear maps.",
            "Leave it away, or take {1} linear or best.",
        ),
        Rule(
            ("calibration",),
            lambda told: len(set(told.calibration)) != len(told.calibration),
            "{0} names a text twice.",
            "Name each text once.",
        ),
        Rule(
            ("check_text", "calibration"),
            lambda told: told.check_text is not None and told.check_text in told.calibration,
            "{0} names a text that is fitted on, too.",
            "Give it a text that the fit does not see.",
        ),
    )
