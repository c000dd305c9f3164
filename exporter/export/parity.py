"""Holds an ONNX file against the PyTorch model that it came from, or that it is a cut of."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exporter.artifacts import ParityCheck, Phase, PlannedDeletion
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.cut.options import DEFAULT_LIMIT_BYTES
from exporter.cut.verify import thrifty_because
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.sessions import WidenedCopy
from exporter.engines.tensors import TensorSpec
from exporter.errors import ExportError
from exporter.export.onnx_output import pooling_for
from exporter.export.torch_export import interface_without_weights
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.encoder_decoder_interface import StackModule, Tensors, interface_of_stacks
from exporter.models.loading.meta_model import MetaModel, filled_while_running
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import ENCODER, FIRST_STEP, NEXT_STEP, Graph
from exporter.models.onnx_interface import InterfaceModule, OnnxInterface
from exporter.models.residual_stream import encoder_inputs
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import load_model
from graph_passes.fusing.pooling import EMBEDDING

if TYPE_CHECKING:
    from exporter.artifacts.loaded_plan import Replacements

_CACHE = re.compile(r"(past_key_values|present)\.([0-9]{1,4})\.(key|value)")


class RenumberedCaches:
    """A runner under a shallower model's numbers: the caches of its layers count from 0."""

    def __init__(self, runner: Runner, layers: Sequence[int]) -> None:
        self._runner = runner
        self._inner = dict(enumerate(layers))
        self._outer = {old: new for new, old in self._inner.items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's, renamed."""
        return tuple(map(self._outside, self._runner.inputs))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's, renamed."""
        return tuple(map(self._outside, self._runner.outputs))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph once and returns all outputs."""
        given = {_renamed(name, self._inner): value for name, value in inputs.items()}
        arrays = self._runner.run(given)
        return {_renamed(name, self._outer): value for name, value in arrays.items()}

    def _outside(self, spec: TensorSpec) -> TensorSpec:
        return replace(spec, name=_renamed(spec.name, self._outer))


def _renamed(name: str, numbers: Mapping[int, int]) -> str:
    match = _CACHE.fullmatch(name)
    if match is None:
        return name
    # A layer that should not be there must not be taken for one that has its number now.
    number = numbers.get(int(match[2]), f"cut{match[2]}")
    return f"{match[1]}.{number}.{match[3]}"


RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-3}
"""By dtype; times the largest value of the witness, or 1 when that is smaller.

float16 has a rounding step of 1e-3, and the two sides round after different operators; a graph of
thirty layers was off by 1e-3 of the largest logit. bfloat16, for which ONNX Runtime's CPU has no
kernels, is run in float32 by both; what is left of it are the graph's constants. At opset 20 the
scale of attention is one: a graph of thirty layers was off by 4e-4 there, at opset 23 by 5e-6.
"""

_BATCH, _TOKENS, _PADDED = 2, 16, 5
_TEXT = (
    "A river that runs through flat country bends, and every bend grows: the water is faster on "
    "the outer side, where it takes the bank away, and slower on the inner one, where it lets the "
    "sand fall."
)
_CACHES = "keys and values"
_WIDENED = ", bfloat16 as float32"


@dataclass(frozen=True)
class _Step:
    """One run of both sides."""

    phase: Phase
    tokens: dict[str, torch.Tensor]  # the int64 inputs `[batch, sequence]`
    real: torch.Tensor | None  # where `tokens` are no padding, `[batch, sequence]`


def check_export(
    loaded: LoadedModel,
    onnx_path: Path,
    *,
    deletions: Sequence[PlannedDeletion] = (),
    replacements: Replacements | None = None,
    layers: Sequence[int] | None = None,  # None for the same
    provider: str = "cpu",
    progress: Progress = QUIET,
) -> list[ParityCheck]:
    """Compares an ONNX file on ONNX Runtime with PyTorch.

    A model in bfloat16 is compared in float32, with the weights that it has: a wrong graph shows
    just as well, bfloat16's own rounding does not. The checks' names say so. Of an encoder-decoder
    all three graphs are compared, which lie in the folder of the path.
    """
    if loaded.ref.encoder_layers is not None:
        return check_stacks(
            loaded, onnx_path.parent, deletions=deletions, replacements=replacements,
            provider=provider, progress=progress,
        )  # fmt: skip
    with contextlib.ExitStack() as stack:
        # Before bfloat16 is widened: the graph holds numbers that were rounded to it. Without a
        # cut nothing needs to be known of the architecture.
        cut = branch_replacements_of(deletions, replacements, loaded.model) if deletions else {}
        file, widened = stack.enter_context(_runnable(loaded, onnx_path))
        interface = interface_without_weights(loaded.model)
        opened = stack.enter_context(_runner(loaded, file, provider, progress))
        runner = opened if layers is None else RenumberedCaches(opened, layers)
        if isinstance(loaded, MetaModel):
            stack.enter_context(filled_while_running(loaded))
        if cut:
            stack.enter_context(branches_replaced(loaded.model, cut))
        stack.enter_context(torch.inference_mode())
        kept = _kept_past(interface, deletions)
        _require_interface(runner, interface, kept, onnx_path)
        tolerance = RELATIVE_TOLERANCE[torch.bfloat16 if widened else interface.dtype]
        sides = _Sides(loaded, runner, interface, kept, tolerance)
        checks = _compared(sides, _steps(interface, loaded), progress, widened=widened)
    if not deletions:
        require_passed(checks, onnx_path)
    return checks


def _compared(
    sides: _Sides, steps: Sequence[_Step], progress: Progress, *, widened: bool
) -> list[ParityCheck]:
    checks: list[ParityCheck] = []
    with progress.task("compare with PyTorch", total=len(steps), unit="requests") as task:
        for step in steps:
            checks += sides.compare(step)
            task.advance()
    if widened:
        return [c.model_copy(update={"name": f"{c.name}{_WIDENED}"}) for c in checks]
    return checks


def _runner(
    loaded: LoadedModel, file: Path, provider: str, progress: Progress
) -> OnnxRuntimeRunner:
    """Runs the graph; that of a model whose weights don't come into memory with as little of it."""
    reason = ""
    if isinstance(loaded, MetaModel) and provider == "cpu":
        reason = thrifty_because(load_model(file), DEFAULT_LIMIT_BYTES)
        if reason:
            progress.say(f"comparing with PyTorch at a cheaper setting: {reason}")
    threads, thrifty = torch.get_num_threads(), bool(reason)
    return OnnxRuntimeRunner(file, provider=provider, threads=threads, thrifty=thrifty, brief=True)


@contextlib.contextmanager
def _runnable(loaded: LoadedModel, onnx_path: Path) -> Iterator[tuple[Path, bool]]:
    """The file to run, and whether model and file are in float32 meanwhile, for bfloat16."""
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    narrow = [tensor for tensor in tensors if tensor.dtype == torch.bfloat16]
    if not narrow:
        yield onnx_path, False
        return
    kept = [tensor.data for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        # Of a model that memory is too small for, a folder in memory would not hold it.
        with WidenedCopy(onnx_path, beside=isinstance(loaded, MetaModel)) as file:
            yield file, True
    finally:
        for tensor, data in zip(narrow, kept, strict=True):
            tensor.data = data


class _Sides:
    """The model and its graph, each with the cache that it has filled so far."""

    def __init__(
        self,
        loaded: LoadedModel,
        runner: Runner | RenumberedCaches,
        interface: OnnxInterface,
        kept: list[str],
        relative_tolerance: float,
    ) -> None:
        pools = EMBEDDING in {spec.name for spec in runner.outputs}
        self._pooling = pooling_for(loaded) if pools else None
        self._module = InterfaceModule(loaded.model, interface)
        self._runner = runner
        self._interface = interface
        self._kept = kept
        self._relative_tolerance = relative_tolerance
        self._torch_past = interface.random_past(_BATCH, 0)
        names = interface.past_names
        self._onnx_past: dict[str, Any] = {
            name: past.numpy() for name, past in zip(names, self._torch_past, strict=True)
        }

    def compare(self, step: _Step) -> list[ParityCheck]:
        """Runs both on the same tokens, remembers their caches, and compares all outputs."""
        main, *present = self._module(step.tokens, self._torch_past)
        want = dict(zip(self._interface.output_names, (main, *present), strict=True))
        tokens = {name: tensor.numpy() for name, tensor in step.tokens.items()}
        got = self._runner.run({**tokens, **self._onnx_past})
        self._torch_past = present
        self._onnx_past = {name: got[_present(name)] for name in self._kept}

        head = self._interface.main_output
        texts = torch.ones(len(main), dtype=torch.bool)
        everywhere = torch.ones(main.shape[:-1], dtype=torch.bool)
        real = everywhere if self._interface.per_text or step.real is None else step.real
        differences = [difference(head, got[head], want[head], real)]
        checks = [self._check(step, head, differences)]
        if self._pooling is not None and step.real is not None:
            vectors = self._pooling(main.float(), step.real)
            differences = [difference(EMBEDDING, got[EMBEDDING], vectors, texts)]
            checks.append(self._check(step, EMBEDDING, differences))
        caches = [_present(name) for name in self._kept]
        if caches:
            real = step.tokens["attention_mask"].bool()
            differences = [
                difference(name, np.swapaxes(got[name], 1, 2), want[name].transpose(1, 2), real)
                for name in caches
            ]
            checks.append(self._check(step, _CACHES, differences))
        return checks

    def _check(
        self, step: _Step, name: str, differences: Sequence[tuple[float, float]]
    ) -> ParityCheck:
        return check_of(name, step.phase, differences, self._relative_tolerance)


def check_of(
    name: str, phase: Phase, differences: Sequence[tuple[float, float]], relative: float
) -> ParityCheck:
    """One check of several tensors: by how much each differs, and its largest value."""
    error, scale = (max(numbers) for numbers in zip(*differences, strict=True))
    tolerance = relative * max(1.0, scale)
    return ParityCheck(
        name=f"{name} against PyTorch",
        phase=phase,
        max_abs_error=error,
        tolerance=tolerance,
        passed=error <= tolerance,
    )


def _token_ids(loaded: LoadedModel) -> torch.Tensor:
    """The same ids in every run: plain English where the model has a tokenizer, else random.

    A text that the model was made for: on random ids single tokens set off activations so large
    that float32 loses digits. In SmolLM2 with eight attentions cut PyTorch was then 1.7e-4 away
    from its own float64, four times as far as at other tokens, and the graph 4e-3; on plain text
    both stay near 1e-4.
    """
    if loaded.tokenizer is None:
        embeddings: Any = loaded.model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        return torch.randint(embeddings.weight.shape[0], (_BATCH, _TOKENS + 1), generator=generator)
    ids = loaded.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    needed = _BATCH * (_TOKENS + 1)
    return torch.tensor((ids * needed)[:needed]).reshape(_BATCH, _TOKENS + 1)


def _steps(interface: OnnxInterface, loaded: LoadedModel) -> list[_Step]:
    """The tokens of both steps; the second row is padded. Of a model of images, some noise."""
    if interface.image is not None:
        images = interface.random_images(_BATCH)
        return [_Step("encode", dict.fromkeys(interface.token_inputs, images), None)]
    ids = _token_ids(loaded)
    mask = torch.ones_like(ids)
    if not interface.cache:
        mask[1, -_PADDED:] = 0
        return [_step("encode", interface, ids, mask, slice(0, _TOKENS + 1))]
    mask[1, :_PADDED] = 0
    return [
        _step("prefill", interface, ids, mask, slice(0, _TOKENS)),
        _step("decode", interface, ids, mask, slice(_TOKENS, _TOKENS + 1)),
    ]


def _step(
    phase: Phase, interface: OnnxInterface, ids: torch.Tensor, mask: torch.Tensor, new: slice
) -> _Step:
    values = {
        "input_ids": ids[:, new],
        "attention_mask": mask[:, : new.stop],
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, new],
        "token_type_ids": torch.zeros_like(ids[:, new]),
    }
    tokens = {name: values[name].contiguous() for name in interface.token_inputs}
    return _Step(phase, tokens, mask[:, new].bool())


def difference(
    name: str, got: np.ndarray[Any, Any], want: torch.Tensor, real: torch.Tensor | None = None
) -> tuple[float, float]:
    """The largest absolute error and the witness's largest value, over the real positions.

    ``got`` and ``want`` are ``[batch, positions, ...]``, ``real`` is ``[batch, positions]``; None
    where all are.
    """
    if got.shape != tuple(want.shape):
        raise ExportError(
            f"{name} has the shape {got.shape}, PyTorch's is {tuple(want.shape)}.",
            code="other-outputs",
        )
    chosen: Any = ... if real is None else real.numpy()
    ours, theirs = got[chosen].astype(np.float64), want.double().numpy()[chosen]
    if theirs.size == 0:
        raise ExportError(f"{name} has no values to compare.")
    error = float(np.abs(ours - theirs).max())
    return error if np.isfinite(error) else float("inf"), float(np.abs(theirs).max())


def _kept_past(interface: OnnxInterface, deletions: Sequence[PlannedDeletion]) -> list[str]:
    """The cache inputs that a graph without the deleted attentions has."""
    cut = {d.layer for d in deletions if d.kind in ("attention", "block")}
    gone = {f"past_key_values.{layer}.{part}" for layer in cut for part in ("key", "value")}
    return [name for name in interface.past_names if name not in gone]


def _present(past_name: str) -> str:
    return past_name.replace("past_key_values", "present", 1)


def _require_interface(
    runner: Runner | RenumberedCaches, interface: OnnxInterface, kept: Sequence[str], path: Path
) -> None:
    """Every output must be there and no other, and every input one that we can fill."""
    outputs = {spec.name for spec in runner.outputs}
    wanted = {interface.main_output, *map(_present, kept)}
    if outputs - {EMBEDDING} != wanted:
        odd = sorted(outputs ^ wanted)
        raise ExportError(
            f"{path}: the outputs are not the model's; first {odd[0]}.", code="other-outputs"
        )
    caches = {spec.name for spec in runner.inputs} - set(interface.token_inputs)
    if caches != set(kept):
        odd = sorted(caches ^ set(kept))
        raise ExportError(f"{path}: the inputs are not the model's; first {odd[0]}.")


def require_passed(checks: Sequence[ParityCheck], path: Path) -> None:
    """Refuses an export that doesn't compute what PyTorch computes."""
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = failed[0]
        raise ExportError(
            f"{path} does not compute what PyTorch computes: in {worst.phase} {worst.name} is off "
            f"by {worst.max_abs_error:.2e}, more than {worst.tolerance:.2e}.",
            "Try another --opset.",
            code="wrong-results",
        )


_SOURCE, _SOURCE_PADDED = 9, 3
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
        checks = list(_compared_stacks(loaded, runner))
    if not deletions:
        require_passed(checks, folder)
    return checks


def _compared_stacks(loaded: LoadedModel, runner: EncoderDecoderRunner) -> Iterator[ParityCheck]:
    """The states that the encoder gives, and then what the decoder makes of them, step by step."""
    model, interface = loaded.model, interface_of_stacks(loaded.model)

    def pytorch(graph: Graph, inputs: Tensors) -> list[torch.Tensor]:
        wanted = {name: inputs[name] for name in interface.inputs(graph)}
        tensors: list[torch.Tensor] = StackModule(model, interface, graph)(wanted)
        return tensors

    def checks(
        graph: Graph,
        pairs: Mapping[str, tuple[Array, torch.Tensor]],
        real: torch.Tensor | None = None,
    ) -> Iterator[ParityCheck]:
        groups: dict[str, list[tuple[float, float]]] = {}
        for name, (got, want) in pairs.items():
            groups.setdefault(_group(name), []).append(difference(name, got, want, real))
        for group, items in groups.items():
            yield check_of(group, _PHASES[graph], items, RELATIVE_TOLERANCE[model.dtype])

    source, real = _source(model)
    (states,) = pytorch(ENCODER, source)
    encoded = runner.encode({name: value.numpy() for name, value in source.items()})
    got = encoded.given["encoder_hidden_states"]
    yield from checks(ENCODER, {"last_hidden_state": (got, states)}, real)
    given, past = {"encoder_hidden_states": states}, dict[str, torch.Tensor]()
    if "attention_mask" in source:
        given["encoder_attention_mask"] = source["attention_mask"]
    for number, tokens in enumerate(_ids(model)):
        graph = NEXT_STEP if number else FIRST_STEP
        made = pytorch(graph, {"input_ids": tokens, **given, **past})
        want = dict(zip(interface.outputs(graph), made, strict=True))
        logits, encoded = runner.step(encoded, tokens.numpy())
        caches = {_past(name): value for name, value in want.items() if name != "logits"}
        past |= caches
        pairs = {n: (value, past[n]) for n, value in encoded.caches.items() if n in caches}
        yield from checks(graph, {"logits": (logits, want["logits"]), **pairs})


def _past(name: str) -> str:
    return name.replace("present", "past_key_values", 1)


def _source(model: Any) -> tuple[Tensors, torch.Tensor | None]:
    """What the encoder reads, its second row padded, and where that is no padding."""
    (tokens,) = _ids(model, (_SOURCE,))
    source = encoder_inputs(model, tokens)
    if "attention_mask" not in source:
        return source, None
    source["attention_mask"][1, _SOURCE - _SOURCE_PADDED :] = 0
    return source, source["attention_mask"].bool()


def _group(name: str) -> str:
    for side, words in (("decoder", "self-attention"), ("encoder", "cross-attention")):
        if f".{side}." in name:
            return f"{words} keys and values"
    return name


def _ids(model: Any, lengths: Sequence[int] = _STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    return [
        torch.randint(min(6, vocabulary // 2), vocabulary, (_BATCH, length), generator=generator)
        for length in lengths
    ]
