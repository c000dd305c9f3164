"""Two ONNX models, measured under the same conditions: latency, accuracy, size.

Both arms live in one process, on the same device, with the same threads. The report keeps the raw
times and says on what text the models were judged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import (
    Accuracy,
    Arm,
    Arms,
    CalibrationRef,
    ComparisonReport,
    LatencyRow,
    ParityCheck,
    Phase,
    PlannedDeletion,
)
from exporter.errors import ComparisonError, UsageError
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.backends.base import Runner
    from exporter.measure.evaluation import EvaluationTokens
    from exporter.measure.graph_facts import GraphFacts
    from exporter.measure.inputs import Shape
    from exporter.measure.model_folder import ModelFolder
    from exporter.texts import TextSource


@dataclass(frozen=True)
class CompareOptions:
    """How two models are measured.

    Attributes:
        provider: Where ONNX Runtime runs both: ``cpu`` or ``cuda``.
        threads: CPU threads; None takes the physical cores that this process may use.
        prefill_lengths: Prompt lengths; for a graph without a KV cache, lengths of its input.
        decode_past_lengths: Cache lengths at which one token is decoded. One of the two may be
            empty, not both.
        batch: Sequences in each timed call.
        rounds: Interleaved rounds of a row at least, from 2 on; below 6 there is no verdict. Where
            calls are short there are more, until the row has taken 20 seconds or has 60 rounds.
        eval_text: What the models are judged on; see :func:`exporter.texts.read_texts`.
        eval_tokens: How much of it, rounded down to whole samples.
        eval_sequence_length: Tokens in a sample.
    """

    provider: str = "cpu"
    threads: int | None = None
    prefill_lengths: tuple[int, ...] = (128, 512)
    decode_past_lengths: tuple[int, ...] = (512,)
    batch: int = 1
    rounds: int = 6
    eval_text: str = "pydoc"
    eval_tokens: int = 8192
    eval_sequence_length: int = 512

    def __post_init__(self) -> None:
        lengths = (*self.prefill_lengths, *self.decode_past_lengths, self.batch)
        if min(lengths) < 1 or (self.threads is not None and self.threads < 1):
            raise UsageError("Lengths, batch and threads begin at 1.")
        if not (self.prefill_lengths or self.decode_past_lengths):
            raise UsageError(
                "There is nothing to time: no prompt length and no cache length is given.",
                "Give --prefill or --decode-past at least one length.",
            )
        if self.rounds < 2:
            raise UsageError("An interval needs at least 2 rounds.")
        if min(self.eval_tokens, self.eval_sequence_length) < 2:
            raise UsageError("An evaluation needs at least 2 tokens.")


def compare(
    baseline: Path,
    candidate: Path,
    options: CompareOptions | None = None,
    *,
    parity: Sequence[ParityCheck] = (),
    plan: Sequence[PlannedDeletion] = (),
    calibration: CalibrationRef | None = None,
    progress: Progress = QUIET,
) -> ComparisonReport:
    """Measures a candidate against a baseline.

    Args:
        baseline: The unpruned model: an ONNX file, or a folder with ``model.onnx`` and, for a
            perplexity, ``tokenizer.json``; ``config.json`` beside it tells the longest sequence.
        candidate: The pruned model, likewise. Its inputs are among the baseline's.
        options: How to measure.
        parity: Checks that were made elsewhere, for the report.
        plan: What was dropped; by default what the candidate's metadata say, without what the
            baseline's say.
        calibration: The text that the plan rests on; the evaluation text must be another.
        progress: Hears what goes on.

    Without a tokenizer the arms are compared on seeded random tokens: KL divergence and agreement
    then say little about text, and there is no perplexity; the report names the tokens so. A
    model without an output ``logits`` gets no accuracy at all.

    Raises:
        ComparisonError: For arms that can't be compared, an evaluation text that is the
            calibration text or too short, and logits that aren't finite.
        OnnxFileError: For a file that is no complete ONNX model.
        BackendError: When ONNX Runtime can't load or run a model where it was asked to.
        TextSourceError: When the evaluation text can't be read.
    """
    from exporter.backends.onnxruntime import OnnxRuntimeRunner
    from exporter.measure.environment import default_threads
    from exporter.measure.graph_facts import read_facts
    from exporter.measure.model_folder import find_model

    options = options or CompareOptions()
    texts = evaluation_text(options, calibration)
    folders = find_model(baseline), find_model(candidate)
    facts = read_facts(folders[0].onnx), read_facts(folders[1].onnx)
    if facts[0].sha256 == facts[1].sha256:
        progress.say("compare: both arms are the same file; what differs below is noise")
    threads = options.threads or default_threads()
    runners = [
        OnnxRuntimeRunner(folder.onnx, provider=options.provider, threads=threads)
        for folder in folders
    ]
    with runners[0], runners[1]:
        pair = _Pair(options, runners[0], runners[1], folders, facts, progress)
        return pair.report(texts, list(parity), list(plan), calibration)


def evaluation_text(options: CompareOptions, calibration: CalibrationRef | None) -> TextSource:
    """Reads the evaluation text.

    Raises:
        ComparisonError: When it is the text that importance was measured on.
        TextSourceError: When it can't be read.
    """
    from exporter.texts import read_texts

    texts = read_texts(options.eval_text, part="evaluation")
    if calibration is not None and (
        texts.sha256 == calibration.sha256 or texts.source == calibration.source
    ):
        raise ComparisonError(
            f"The evaluation text {texts.source} is the calibration text: "
            "what was dropped was chosen to do well on it.",
            "Name another text with --eval-text.",
        )
    return texts


@dataclass(frozen=True)
class _Pair:
    """Two loaded arms; the parts of their comparison."""

    options: CompareOptions
    baseline: Runner
    candidate: Runner
    folders: tuple[ModelFolder, ModelFolder]
    facts: tuple[GraphFacts, GraphFacts]
    progress: Progress

    def report(
        self,
        texts: TextSource,
        parity: list[ParityCheck],
        plan: list[PlannedDeletion],
        calibration: CalibrationRef | None,
    ) -> ComparisonReport:
        from exporter.measure.cpu_use import cpu_times, other_cpu_share
        from exporter.measure.environment import environment

        _refuse_other_interface(self.baseline, self.candidate)
        machine = environment(
            threads=self.baseline.threads, gpu=self.baseline.provider.startswith("CUDA")
        )
        accuracy = self._accuracy(texts)
        before = cpu_times()
        latency = self._latency()
        others = other_cpu_share(before, cpu_times())
        made_from = {"baseline": self.facts[0].sha256, "candidate": self.facts[1].sha256}
        if accuracy is not None:
            made_from["evaluation_text"] = accuracy.text_sha256
        return ComparisonReport(
            made_from=made_from,
            environment=machine.model_copy(update={"other_cpu_share": others}),
            arms=self._arms(),
            plan=plan or self._dropped(),
            calibration=calibration,
            parity=parity,
            latency=latency,
            accuracy=accuracy,
        )

    def _dropped(self) -> list[PlannedDeletion]:
        """What the candidate's record says and the baseline's doesn't."""
        already, recorded = (
            _recorded_plan(facts, folder.onnx)
            for facts, folder in zip(self.facts, self.folders, strict=True)
        )
        return [deletion for deletion in recorded if deletion not in already]

    def _latency(self) -> list[LatencyRow]:
        from exporter.measure.latency import Sampling, measure_row

        sampling = Sampling(rounds=self.options.rounds)
        return [
            measure_row(
                self.baseline,
                self.candidate,
                shape,
                self._vocabulary(),
                sampling,
                progress=self.progress,
            )
            for shape in self._shapes()
        ]

    def _shapes(self) -> list[Shape]:
        from exporter.measure.inputs import Shape, has_cache

        options, cached = self.options, has_cache(self.baseline.inputs)
        phase: Phase = "prefill" if cached else "encode"
        shapes = [Shape(phase, options.batch, length) for length in options.prefill_lengths]
        if cached:
            shapes += [Shape("decode", options.batch, 1, n) for n in options.decode_past_lengths]
        if not shapes:
            raise ComparisonError(
                f"{self.folders[0].onnx} has no KV cache, so there is no decode step to time.",
                "Give input lengths with --prefill.",
            )
        longest = self.folders[0].longest_sequence
        fitting = [s for s in shapes if longest is None or s.total_length <= longest]
        for shape in shapes:
            if shape not in fitting:
                self.progress.say(f"{shape}: left out, the model ends at {longest} positions")
        if not fitting:
            raise ComparisonError(
                f"The model ends at {longest} positions: no shape is left to time.",
                "Ask for shorter prompts and caches.",
            )
        return fitting

    def _accuracy(self, texts: TextSource) -> Accuracy | None:
        from exporter.measure.accuracy import LOGITS, check_tokens, compare_predictions
        from exporter.measure.inputs import has_cache

        if LOGITS not in {spec.name for spec in self.baseline.outputs}:
            self.progress.say("accuracy: left out, the models have no output called logits")
            return None
        tokens = self._tokens(texts)
        check_tokens(int(tokens.token_ids.max()), self._vocabulary())
        self.progress.say(f"accuracy: on {tokens.source}, {tokens.token_ids.size} tokens")
        causal = has_cache(self.baseline.inputs) or self.folders[0].predicts_next_token
        found = compare_predictions(
            self.baseline,
            self.candidate,
            tokens.token_ids,
            causal=causal and tokens.is_text,
            progress=self.progress,
        )
        return Accuracy(
            text_source=tokens.source,
            text_sha256=tokens.sha256,
            tokens=found.tokens,
            perplexity=found.perplexity,
            kl_divergence=found.kl_divergence,
            top1_agreement=found.top1_agreement,
        )

    def _tokens(self, texts: TextSource) -> EvaluationTokens:
        from exporter.measure.evaluation import random_ids, tokenize

        tokens = self.options.eval_tokens
        longest = self.folders[0].longest_sequence or self.options.eval_sequence_length
        length = min(self.options.eval_sequence_length, tokens, longest)
        tokenizer = self.folders[0].tokenizer or self.folders[1].tokenizer
        if tokenizer is None:
            return random_ids(self._vocabulary(), sequence_length=length, tokens=tokens)
        return tokenize(
            texts,
            tokenizer,
            sequence_length=length,
            tokens=tokens,
            separator_id=self.folders[0].end_of_text,
        )

    def _vocabulary(self) -> int:
        told = self.facts[0].vocabulary or self.folders[0].config.get("vocab_size")
        if not isinstance(told, int):
            raise ComparisonError(
                f"{self.folders[0].onnx} doesn't tell how many tokens it knows.",
                "Put the model's config.json beside it.",
            )
        return told

    def _arms(self) -> Arms:
        runners = (self.baseline, self.candidate)
        sides = [
            _arm(runner, folder.onnx, facts)
            for runner, folder, facts in zip(runners, self.folders, self.facts, strict=True)
        ]
        return Arms(baseline=sides[0], candidate=sides[1])


def _arm(runner: Runner, path: Path, facts: GraphFacts) -> Arm:
    return Arm(
        backend=runner.backend,
        provider=runner.provider,
        precision=facts.precision,
        path=str(path),
        sha256=facts.sha256,
        file_bytes=facts.file_bytes,
        parameters=facts.parameters,
        nodes=facts.nodes,
        kv_cache_bytes_per_token=facts.kv_cache_bytes_per_token,
        cpu_nodes=dict(runner.cpu_nodes),
    )


def _refuse_other_interface(baseline: Runner, candidate: Runner) -> None:
    known = {spec.name for spec in baseline.inputs}
    foreign = [spec.name for spec in candidate.inputs if spec.name not in known]
    if foreign:
        raise ComparisonError(
            f"The candidate has an input {foreign[0]!r} that the baseline doesn't have.",
            "Compare a model with its own pruned form.",
        )
    results = [
        {spec.name for spec in runner.outputs if not spec.name.startswith("present")}
        for runner in (baseline, candidate)
    ]
    if results[0] != results[1]:
        raise ComparisonError(
            f"The arms have other outputs: {sorted(results[0])} and {sorted(results[1])}.",
            "Compare a model with its own pruned form.",
        )


def _recorded_plan(facts: GraphFacts, path: Path) -> list[PlannedDeletion]:
    """What the candidate's own metadata say was cut out of it."""
    from graph_passes.plan_record import PLAN_KEY

    text = facts.metadata.get(PLAN_KEY)
    if text is None:
        return []
    try:
        return TypeAdapter(list[PlannedDeletion]).validate_python(json.loads(text))
    except (ValueError, ValidationError) as error:
        raise ComparisonError(
            f"{path}: the metadata entry {PLAN_KEY} is not a list of deletions."
        ) from error
