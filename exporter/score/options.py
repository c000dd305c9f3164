"""By what and on which text importance is measured."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from exporter.option_types import Count, Seed, Several, one_of
from exporter.options import Options, Rule, dataclass, is_given, option, refusal
from exporter.score.registry import DEFAULT, METRICS

KL_POSITIONS = 2
"""The model's answers are compared at every so many positions unless asked otherwise."""
SCORING = "How importance is scored"
MetricName = one_of(METRICS)
NAMED_ONCE = Rule(
    ("calibration",),
    lambda item: len(set(item.calibration)) != len(item.calibration),
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

    section = SCORING
    metrics: tuple[MetricName, ...] = option(  # type: ignore[valid-type]
        (DEFAULT,),
        f"Metric to score with: {', '.join(METRICS)}. Repeatable; plans use the first.",
        "--metric",
        metavar="NAME",
    )
    calibration: tuple[str, ...] = option(
        (),
        "Calibration text: a file or folder of text, hf:DATASET, pydoc, docstrings, or "
        "self (text that the model samples; the default for decoders). For classifiers of images a "
        "folder of them. Several sources make a mixture.",
        metavar="SOURCE",
    )
    samples: Count | None = option(None, "Samples of each text.", usual="about 10,000 tokens")
    sequence_length: Several = option(512, "Tokens in a sample.")
    batch_size: Count = option(4, "Samples in one forward pass.")
    seed: Seed = option(0, "Seed for sampled text.", config_only=True)
    kl_positions: Count = option(
        KL_POSITIONS,
        "For kl and perplexity: compare the answers at every N-th token.",
        config_only=True,
    )
    blocks: bool = option(
        False,
        "For kl and perplexity: also score whole blocks, which takes half as long again.",
        rare=True,
    )
    rules = (NAMED_ONCE,)


def refuse_idle_of_pairs(options: ScoreOptions, *names: str) -> None:
    """Refuses options that have no effect on the pairs of an encoder-decoder."""
    for name in names:
        if is_given(options, name):
            words = "Pairs are as long as they are, and none are sampled: {0} has no effect on an "
            words += "encoder-decoder."
            raise refusal(options, [name], words, "Leave {0} out.", code="one-graph-option")


LOCAL = "local"
"""The address of a cluster on this machine that ends with the call."""

CLUSTER = "On a cluster"
_ADDRESS = re.compile(r"local|auto|[^/\s]+:\d+")


def _address(text: str) -> str:
    if _ADDRESS.fullmatch(text) is None:
        raise ValueError(
            "this is no host:port, auto or local. For a cluster on this machine put --ray last, or "
            "write --ray=local. With ray://… depthcut has to run on a machine of the cluster: give "
            "its host:port"
        )
    return text


@dataclass(frozen=True)
class ClusterOptions(Options):
    """Where work is spread over a Ray cluster."""

    section = CLUSTER
    switch = "address"
    address: Annotated[str, AfterValidator(_address)] = option(
        LOCAL,
        "Distribute the work over the Ray cluster at host:port; auto: the one that runs here. "
        "Without a value: one that is started on this machine and ends with the command.",
        "--ray",
        metavar="[ADDRESS]",
        bare=LOCAL,
        usual="not at all",
        rare=True,
    )
    workers: Count | None = option(
        None,
        "Processes, each with a copy of the model.",
        "--ray-workers",
        usual="one on each machine; two on this one",
        rare=True,
    )
