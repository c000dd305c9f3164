"""Writes an encoder-decoder as the three graphs that optimum's runtime loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exporter.artifacts import FormRecord, ParityCheck, Phase, PlannedDeletion
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.engines.decoding.encoder_decoder import Encoded, EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.errors import ExportError
from exporter.export.forms.portable import (
    PORTABLE_OPSET,
    WrittenForm,
    form_in_words,
    note_form,
    version_of,
)
from exporter.export.parity import RELATIVE_TOLERANCE, require_passed
from exporter.export.torch_export import Traced, export_traced
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.encoder_decoder_interface import (
    EncoderDecoderInterface,
    Examples,
    StackModule,
    Tensors,
    interface_of_stacks,
)
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import ENCODER, FIRST_STEP, GRAPHS, NEXT_STEP, Graph, graph_file
from exporter.models.residual_stream import encoder_inputs
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.artifacts.loaded_plan import Replacements


def write_stacks(
    loaded: LoadedModel, folder: Path, *, opset: int | None = None, progress: Progress = QUIET
) -> FormRecord:
    """Exports an encoder-decoder with PyTorch's exporter.

    The two graphs of the decoder hold its weights each, as optimum's do.
    """
    interface, chosen = interface_of_stacks(loaded.model), opset or PORTABLE_OPSET
    examples = Examples(loaded.model, interface)
    written = WrittenForm(f"{version_of('torch')}, opset {chosen}")
    records = []
    for graph in GRAPHS:
        target = graph_file(folder, graph)
        export_traced(
            loaded,
            lambda graph=graph: _traced(loaded, interface, examples, graph),  # type: ignore[misc]
            target,
            opset=chosen,
            progress=progress,
        )
        records.append(note_form(folder, written, "portable", loaded.ref.sha256, name=target.name))
    progress.say(form_in_words(records[0]))
    return records[0]


def _traced(
    loaded: LoadedModel, interface: EncoderDecoderInterface, examples: Examples, graph: Graph
) -> Traced:
    names = interface.inputs(graph)
    example, axes = examples.of(graph), examples.dimensions(graph)
    return Traced(
        StackModule(loaded.model, interface, graph),
        {"inputs": {name: example[name] for name in names}},
        names,
        interface.outputs(graph),
        {"inputs": {name: axes[name] for name in names}},
    )


_BATCH, _SOURCE, _PADDED = 2, 9, 3
_STEPS = (4, 1, 2)  # tokens of each step
_PHASES: dict[Graph, Phase] = {ENCODER: "encode", FIRST_STEP: "prefill", NEXT_STEP: "decode"}


def check_stacks(
    loaded: LoadedModel,
    folder: Path,
    *,
    deletions: Sequence[PlannedDeletion] = (),
    replacements: Replacements | None = None,
    provider: str = "cpu",
    progress: Progress = QUIET,
) -> list[ParityCheck]:
    """Compares the graphs on ONNX Runtime with PyTorch."""
    cut = branch_replacements_of(deletions, replacements, loaded.model)
    runner = EncoderDecoderRunner(
        folder, provider=provider, threads=torch.get_num_threads(), brief=True
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if cut:
            stack.enter_context(branches_replaced(loaded.model, cut))
        stack.enter_context(runner)
        stack.enter_context(progress.task("compare with PyTorch"))
        checks = list(_Sides(loaded, runner).compared())
    if not deletions:
        require_passed(checks, folder)
    return checks


@dataclass(frozen=True)
class _Sides:
    """The model and its graphs."""

    loaded: LoadedModel
    runner: EncoderDecoderRunner

    def compared(self) -> Iterator[ParityCheck]:
        source, real = self._source()
        (states,) = self._pytorch(ENCODER, source)
        encoded = self.runner.encode({name: value.numpy() for name, value in source.items()})
        got = encoded.given["encoder_hidden_states"]
        yield from self._checks(ENCODER, {"last_hidden_state": (got, states)}, real)
        given = {"encoder_hidden_states": states}
        if "attention_mask" in source:
            given["encoder_attention_mask"] = source["attention_mask"]
        yield from self._steps(given, encoded)

    def _steps(self, given: Tensors, encoded: Encoded) -> Iterator[ParityCheck]:
        interface, past = interface_of_stacks(self.loaded.model), dict[str, torch.Tensor]()
        for number, tokens in enumerate(_ids(self.loaded.model)):
            graph = NEXT_STEP if number else FIRST_STEP
            made = self._pytorch(graph, {"input_ids": tokens, **given, **past})
            want = dict(zip(interface.outputs(graph), made, strict=True))
            logits, encoded = self.runner.step(encoded, tokens.numpy())
            past |= {
                name.replace("present", "past_key_values", 1): value
                for name, value in want.items()
                if name != "logits"
            }
            kept = {
                name: value
                for name, value in encoded.caches.items()
                if name.replace("past_key_values", "present", 1) in want
            }
            pairs = {name: (value, past[name]) for name, value in kept.items()}
            yield from self._checks(graph, {"logits": (logits, want["logits"]), **pairs})

    def _pytorch(self, graph: Graph, inputs: Tensors) -> list[torch.Tensor]:
        interface = interface_of_stacks(self.loaded.model)
        wanted = {name: inputs[name] for name in interface.inputs(graph)}
        tensors: list[torch.Tensor] = StackModule(self.loaded.model, interface, graph)(wanted)
        return tensors

    def _source(self) -> tuple[Tensors, torch.Tensor | None]:
        """What the encoder reads, its second row padded, and where that is no padding."""
        (tokens,) = _ids(self.loaded.model, (_SOURCE,))
        source = encoder_inputs(self.loaded.model, tokens)
        if "attention_mask" not in source:
            return source, None
        source["attention_mask"][1, _SOURCE - _PADDED :] = 0
        return source, source["attention_mask"].bool()

    def _checks(
        self,
        graph: Graph,
        pairs: Mapping[str, tuple[Array, torch.Tensor]],
        real: torch.Tensor | None = None,
    ) -> Iterator[ParityCheck]:
        groups: dict[str, list[tuple[float, float]]] = {}
        for name, (got, want) in pairs.items():
            if real is not None:
                got, want = got[real.numpy()], want[real]
            groups.setdefault(_group(name), []).append(_difference(name, got, want))
        relative = RELATIVE_TOLERANCE[self.loaded.model.dtype]
        for group, item in groups.items():
            error, scale = (max(pair) for pair in zip(*item, strict=True))
            limit = relative * max(1.0, scale)
            yield ParityCheck(
                name=f"{group} against PyTorch",
                phase=_PHASES[graph],
                max_abs_error=error,
                tolerance=limit,
                passed=error <= limit,
            )


def _group(name: str) -> str:
    for side, words in (("decoder", "self-attention"), ("encoder", "cross-attention")):
        if f".{side}." in name:
            return f"{words} keys and values"
    return name


def _difference(name: str, got: Array, want: torch.Tensor) -> tuple[float, float]:
    """The largest absolute error, and the witness's largest value."""
    if got.shape != tuple(want.shape):
        raise ExportError(
            f"{name} has the shape {got.shape}, PyTorch's is {tuple(want.shape)}.",
            code="other-outputs",
        )
    theirs = want.double().numpy()
    error = float(np.abs(got.astype(np.float64) - theirs).max())
    return error if np.isfinite(error) else float("inf"), float(np.abs(theirs).max())


def _ids(model: Any, lengths: Sequence[int] = _STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    return [
        torch.randint(min(6, vocabulary // 2), vocabulary, (_BATCH, length), generator=generator)
        for length in lengths
    ]
