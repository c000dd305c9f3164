"""How two models are compared: where they run, which shapes are timed, on what they are judged."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from exporter.option_types import (
    Count,
    Duration,
    InputFile,
    InputFolder,
    Lengths,
    Names,
    OpenShare,
    Provider,
    Several,
    Threads,
    Whole,
    WholeOrNone,
    Written,
)
from exporter.options import Options, Rule, dataclass, only_with, option, part

SPEED = "Speed"
ACCURACY = "Accuracy"
_USUAL_LENGTHS = (128, 512)
TASKS = "Tasks"
_GENERATION = re.compile(r" *(\d+) *[xX] *(\d+) *")


def _generations(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    matches = [_GENERATION.fullmatch(item) for item in text.split(",")]
    if None in matches:
        raise ValueError("write a prompt and new tokens as 128x64")
    return tuple((int(match[1]), int(match[2])) for match in matches if match is not None)


Generations = Annotated[
    tuple[tuple[Count, Annotated[int, Field(ge=2)]], ...],
    BeforeValidator(_generations),
    Written("PROMPTxNEW", True),
]
"""Whole generations, by their prompts' lengths and their new tokens: ``128x64,512x32``."""


@dataclass(frozen=True)
class RunOptions(Options):
    """Where a graph runs."""

    section = SPEED
    provider: Provider = option("cpu", "Where ONNX Runtime runs the graphs.")
    threads: Threads = option(
        None,
        "CPU threads; auto: the physical cores that the process may use.",
        usual="auto",
    )


@dataclass(frozen=True)
class TaskOptions(Options):
    """Tasks with right answers."""

    section = TASKS
    tasks: Names = option(
        (),
        "Tasks with correct answers: names of lm-eval tasks (from the Hugging Face hub), or of "
        "tasks in --task-data.",
    )
    task_data: InputFolder | None = option(
        None,
        "Read the tasks from DIR/NAME.jsonl, without lm-eval or the network.",
    )
    task_limit: Count | None = option(None, "Use only the first N items of each task.")
    rules = (
        only_with("task_data", "tasks"),
        only_with("task_limit", "tasks"),
    )


@dataclass(frozen=True)
class QualityOptions(TaskOptions):
    """What is measured of the answers, beside the distributions on the evaluation text."""

    section = ACCURACY
    agreement_prompts: Whole = option(
        8,
        "Number of prompts from the evaluation text that both models continue greedily.",
        config_only=True,
    )
    agreement_tokens: Count = option(
        64, "Tokens that both models generate for each prompt.", config_only=True
    )
    prompts: InputFile | None = option(
        None,
        "Show both models' answers to these prompts: a text file with a prompt a line, or JSONL "
        "with the field prompt.",
        usual="built-in ones",
    )
    answer_tokens: WholeOrNone = option(
        40,
        "Maximum number of tokens of each answer that the report shows; none: no answers.",
        config_only=True,
    )
    chat: bool | None = option(
        None,
        "Ask the prompts in the tokenizer's chat template.",
        config_only=True,
        usual="where there is one that works",
    )


@dataclass(frozen=True)
class TimingOptions(Options):
    """How long, and what besides single runs of the graph is timed."""

    section = SPEED
    time_budget_s: Duration = option(
        60.0,
        "Maximum time to measure one row, in seconds; it ends earlier if the verdict is clear.",
        "--time-budget",
    )
    threshold: OpenShare = option(0.01, "Differences below this count as none.", config_only=True)
    generate: Generations = option(
        (),
        "Time whole generations: time to the first token, per token, and in total.",
        config_only=True,
    )
    on_disturbance: Literal["stop", "warn"] = option(
        "stop",
        "What to do if a CPU quota or other virtual machines take much of the CPU time.",
        config_only=True,
    )
    reload: bool = option(
        True,
        "Reload both models several times during the measurement; otherwise their place in "
        "memory influences the result.",
        config_only=True,
    )

    @property
    def kept(self) -> dict[str, Any]:
        """What decides whether an earlier run's times can be gone on with."""
        return {name: value for name, value in vars(self).items() if name != "on_disturbance"}


@dataclass(frozen=True)
class CompareOptions(RunOptions):
    """How two models are measured."""

    section = SPEED
    prefill_lengths: Lengths | None = option(
        None,
        "Prompt lengths.",
        "--prefill",
        usual="128,512, of sentence encoders no more than their texts have",
    )
    decode_past_lengths: Lengths = option(
        (512,), "Numbers of tokens in the cache for a decode step.", "--decode-past"
    )
    batches: Lengths = option((1,), "Sequences in a timed call.", "--batch")
    rounds: Several | None = option(
        None,
        "Run this many interleaved rounds for each row, instead of using the time budget.",
    )
    eval_text: str = option(
        "pydoc",
        "Evaluation text: a file or folder of text, hf:DATASET or pydoc. For classifiers of "
        "images: a folder of images, or of a folder of images for each class.",
        metavar="SOURCE",
        section=ACCURACY,
    )
    other_text: str | None = option(
        None,
        "Evaluation text of another domain, of which the perplexity is measured too.",
        metavar="SOURCE",
        section=ACCURACY,
    )
    eval_tokens: Several = option(
        8192, "Tokens for perplexity, KL divergence and agreement.", section=ACCURACY
    )
    eval_sequence_length: Several = option(
        512, "Tokens in a sample of the evaluation text.", section=ACCURACY, config_only=True
    )
    quality: QualityOptions = part(QualityOptions())
    timing: TimingOptions = part(TimingOptions())
    rules = (
        Rule(
            ("prefill_lengths", "decode_past_lengths"),
            lambda told: (
                not (told.prompt_lengths or told.decode_past_lengths or told.timing.generate)
            ),
            "There is nothing to time: neither a prompt length nor a cache length is given.",
            "Give {0} or {1} at least one length.",
        ),
        Rule(("batches",), lambda told: not told.batches, "{0} names no number.", "1 is usual."),
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """What the arms are judged on, a text of another domain last."""
        return (self.eval_text, *([] if self.other_text is None else [self.other_text]))

    def for_texts(self, longest: int | None) -> Self:
        """The same with usual input lengths that the model's users run; those asked for stay."""
        if longest is None or self.prefill_lengths is not None:
            return self
        lengths = sorted({min(length, longest) for length in self.prompt_lengths})
        return replace(self, prefill_lengths=tuple(lengths))

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The lengths of prompts, or of a graph's input: those asked for, or the usual ones."""
        return _USUAL_LENGTHS if self.prefill_lengths is None else self.prefill_lengths

    @property
    def longest(self) -> int:
        """Positions that the longest measured text has, as far as that is asked for in tokens."""
        decoded = [length + 1 for length in self.decode_past_lengths]
        generated = [prompt + new - 1 for prompt, new in self.timing.generate]
        return max(self.eval_sequence_length, *self.prompt_lengths, *decoded, *generated)
