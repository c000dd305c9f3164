"""How a plan is to be healed. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from exporter.artifacts import HealKind, Train
from exporter.artifacts.servers import SERVERS, Server
from exporter.option_types import Count, Duration, PositiveNumber, Seed, Several, Tokens
from exporter.options import Options, Rule, dataclass, idle, option
from exporter.score.options import NAMED_ONCE

if TYPE_CHECKING:
    from exporter.models.tasks import Task

HEALING = "How the plan is healed"
HealChoice = Literal["auto", HealKind]
"""``auto``: training where memory and time allow it, else ``fold``, else ``best``."""
NO_TEXT = "none"
"""The ``check_text`` that measures in no other domain."""


TRAINED = (
    "tokens", "time_s", "train", "rank", "learning_rate", "step_tokens",
)  # fmt: skip
"""The options of a training alone."""


@dataclass(frozen=True)
class HealOptions(Options):
    """What takes the branches' places or makes up for them, fitted and judged on which texts."""

    section = HEALING
    switch, off = "kind", "none"
    kind: HealChoice = option(
        "linear",
        "How to recover quality: replace a dropped branch by the mean of its output (bias), "
        "by a linear map of its input (linear), or by the better of these or nothing (best); "
        "refit kept weights by least squares (fold); or train kept weights on the whole "
        "model's answers (distill). auto distils if memory and time suffice (10 minutes "
        "unless a time is given), otherwise it folds.",
        "--heal",
    )
    calibration: tuple[str, ...] = option(
        (),
        "Text to fit on: a file or folder of text, hf:DATASET, pydoc, docstrings, or "
        "self (text that the model samples; the default for decoders). Several sources make a "
        "mixture.",
        "--heal-calibration",
        metavar="SOURCE",
    )
    samples: Count | None = option(
        None,
        "Samples to fit on, from each text; a quarter as many more (at least four) are held out. "
        "A training takes as many as heal_tokens asks for.",
        usual="about 10,000 tokens",
    )
    sequence_length: Several = option(512, "Tokens in a sample.")
    check_text: str | None = option(
        None,
        "Text of another domain, to measure the gain there too; none: measure in one domain.",
        metavar="SOURCE",
        usual="pydoc, or self when calibrated on pydoc",
    )
    batch_size: Count = option(4, "Samples in one forward pass.", config_only=True)
    seed: Seed = option(0, "Seed for sampled text.", config_only=True)
    tokens: Tokens | None = option(
        None,
        "Maximum number of training tokens.",
        "--heal-tokens",
        usual="200,000; for encoders 600,000",
        config_only=True,
    )
    time_s: Duration | None = option(
        None,
        "Time for training, or for all with --at-most. The learning rate decays to zero by then; "
        "with a limit on quality it is the time for choosing, healing and checking together.",
        "--time",
        usual="no limit",
    )
    train: Train = option(
        "adapters",
        "What is trained: adapters, merged into the weights at the end, or all weights.",
        config_only=True,
    )
    rank: Count = option(16, "Rank of the adapters.", config_only=True)
    learning_rate: PositiveNumber | None = option(
        None,
        "The highest learning rate.",
        usual="0.001 for adapters, 0.0002 for all weights; for encoders up to twice as much",
        config_only=True,
    )
    step_tokens: Tokens = option(512, "Tokens in one training step.", config_only=True)
    replacements: Literal["none", "bias", "linear"] = option(
        "none",
        "What takes the dropped branches' places in a training, is fitted before it and trained "
        "in it. With --heal fold: what takes the places of those that no kept weight can make up "
        "for.",
        config_only=True,
    )
    server: Server | None = option(
        None,
        "The runtime that the plan is for: only replacements that it can hold are fitted, without "
        "intercept where it has no place for one.",
        "--for",
        usual="any",
    )
    rules = (
        *(
            idle(
                (name, "kind"),
                lambda item: not item.trains,
                "{0} is for {1} distill.",
                "Leave it out, or give {1} distill.",
            )
            for name in TRAINED
        ),
        Rule(
            ("replacements", "kind"),
            lambda item: not (item.changes_weights or item.replacements == "none"),
            "{0} is for {1} distill and {1} fold.",
            "Leave it out: with {1} linear, bias and best replacements are fitted everywhere.",
        ),
        NAMED_ONCE,
        Rule(
            ("replacements", "server"),
            lambda item: item.trains and item.replacements != "none" and not item.intercept,
            "{0} trains an intercept, for which the runtime of {1} has no place.",
            "Leave {0} out, or fit maps with {1} alone.",
        ),
        Rule(
            ("check_text", "calibration"),
            lambda item: item.check_text is not None and item.check_text in item.calibration,
            "{0} names a text that replacements are fitted on.",
            "Give it a text that is not used for fitting.",
        ),
    )

    @property
    def used_rank(self) -> int | None:
        """Of adapters; None where there are none."""
        return self.rank if self.trains and self.train == "adapters" else None

    @property
    def trained_tokens(self) -> int:
        """How many tokens a training reads at most."""
        return self.tokens or 200_000

    def for_task(self, task: Task[Any]) -> HealOptions:
        """The same with the number of tokens that models of a kind are trained on."""
        if self.tokens is not None or not self.trains:
            return self
        return replace(self, tokens=task.trained_tokens)

    @property
    def decided(self) -> HealKind:
        """The kind, where ``auto`` trains."""
        return "distill" if self.kind == "auto" else self.kind

    @property
    def intercept(self) -> bool:
        """Whether linear maps may have one."""
        return self.server is None or SERVERS[self.server].intercept

    @property
    def trains(self) -> bool:
        """Whether the kept weights are trained."""
        return self.kind in ("auto", "distill")

    @property
    def begins_folded(self) -> bool:
        """Whether a training begins with folded weights."""
        return self.trains and self.train == "adapters" and self.replacements == "none"

    @property
    def changes_weights(self) -> bool:
        """Whether the kept weights change."""
        return self.kind == "fold" or self.trains
