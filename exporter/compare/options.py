"""How two models are compared: where they run, which shapes are timed, on what they are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from exporter.errors import UsageError


@dataclass(frozen=True)
class QualityOptions:
    """What is measured of the answers, beside the distributions on the evaluation text.

    Attributes:
        stride: Tokens from the start of a sample to the start of the next, so that each token is
            predicted once from at least ``eval_sequence_length - stride`` others; None for samples
            that don't overlap.
        tasks: Tasks with right answers, by name.
        task_data: A folder of ``NAME.jsonl`` files; None takes lm-eval's tasks, whose items come
            from the Hugging Face hub.
        task_limit: The first that many items of each task; None for all.
        agreement_prompts: Beginnings of the evaluation text that both arms continue greedily; 0
            for none.
        agreement_tokens: How many tokens they generate.
        long_context: Lengths at which needles are looked for and the end of a text is predicted.
    """

    stride: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    task_limit: int | None = None
    agreement_prompts: int = 8
    agreement_tokens: int = 64
    long_context: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride < 1:
            raise UsageError("A stride begins at 1.")
        if self.task_limit is not None and self.task_limit < 1:
            raise UsageError("A task needs at least one item.")
        if self.agreement_prompts < 0 or self.agreement_tokens < 1:
            raise UsageError("Agreement takes 0 or more prompts and 1 or more tokens.")
        if min(self.long_context, default=1) < 1:
            raise UsageError("A context's length begins at 1.")
        if self.task_data is not None and not self.tasks:
            raise UsageError("--task-data is for --tasks, and no task is named.")


@dataclass(frozen=True)
class TimingOptions:
    """How long, and what besides single runs of the graph is timed.

    Attributes:
        time_budget_s: What the rounds of one row may take. A row ends before where its verdict is
            clear. Loading and warming up come on top.
        threshold: Below it a difference counts as none; 0.01 is one percent.
        generate: Whole generations, each by its prompt's length and its number of new tokens.
        reload: Whether arms are loaded anew again and again, where that isn't too slow.
    """

    time_budget_s: float = 60.0
    threshold: float = 0.01
    generate: tuple[tuple[int, int], ...] = ()
    reload: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.time_budget_s < float("inf"):
            raise UsageError(f"A time budget of {self.time_budget_s} s is none.")
        if not 0 < self.threshold < 1:
            raise UsageError(
                f"A threshold of {self.threshold} is none.", "It lies between 0 and 1: 0.01 is 1 %."
            )
        if any(prompt < 1 or new < 2 for prompt, new in self.generate):
            raise UsageError("A generation has 1 token of prompt and 2 new ones at least.")


@dataclass(frozen=True)
class CompareOptions:
    """How two models are measured.

    Attributes:
        provider: Where ONNX Runtime runs both: ``cpu`` or ``cuda``.
        threads: CPU threads; None finds what makes the baseline's step fastest, in a short probe.
        prefill_lengths: Prompt lengths; for a graph without a KV cache, lengths of its input.
        decode_past_lengths: Cache lengths at which one token is decoded. One of the two may be
            empty, not both.
        batches: Sequences in each timed call; every length is timed with each.
        rounds: Interleaved rounds of a row, from 2 on, whatever they take; below 6 there is no
            verdict. None goes by the time budget.
        eval_text: What the models are judged on; see :func:`exporter.models.texts.read_texts`.
        eval_tokens: How much of it, rounded down to whole samples.
        eval_sequence_length: Tokens in a sample.
        quality: What else is measured of the answers.
        timing: How long is timed, and what besides.
    """

    provider: str = "cpu"
    threads: int | None = None
    prefill_lengths: tuple[int, ...] = (128, 512)
    decode_past_lengths: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    rounds: int | None = None
    eval_text: str = "pydoc"
    eval_tokens: int = 8192
    eval_sequence_length: int = 512
    quality: QualityOptions = field(default_factory=QualityOptions)
    timing: TimingOptions = field(default_factory=TimingOptions)

    def __post_init__(self) -> None:
        lengths = (*self.prefill_lengths, *self.decode_past_lengths, *self.batches)
        if (
            min(lengths, default=1) < 1
            or not self.batches
            or (self.threads is not None and self.threads < 1)
        ):
            raise UsageError("Lengths, batch and threads begin at 1.")
        if not (self.prefill_lengths or self.decode_past_lengths or self.timing.generate):
            raise UsageError(
                "There is nothing to time: no prompt length and no cache length is given.",
                "Give --prefill or --decode-past at least one length.",
            )
        if self.rounds is not None and self.rounds < 2:
            raise UsageError("An interval needs at least 2 rounds.")
        if min(self.eval_tokens, self.eval_sequence_length) < 2:
            raise UsageError("An evaluation needs at least 2 tokens.")

    @property
    def longest(self) -> int:
        """Positions that the longest measured text has, as far as that is asked for in tokens."""
        decoded = [length + 1 for length in self.decode_past_lengths]
        generated = [prompt + new - 1 for prompt, new in self.timing.generate]
        texts = (self.eval_sequence_length, *self.quality.long_context)
        return max(*texts, *self.prefill_lengths, *decoded, *generated)
