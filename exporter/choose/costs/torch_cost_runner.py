"""A model in PyTorch, and variants of it in which branches are left out or replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from exporter.choose.costs.cost_runners import CostRunner, random_replacement
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.choose.costs.table import Variant
from exporter.compare.arms import ComparedArm
from exporter.compare.kinds import torch_arm
from exporter.engines.runners.base import Runner
from exporter.engines.runners.pytorch import TorchRunner
from exporter.errors import CostError
from exporter.files import sha256_bytes
from exporter.models.ablation.branch_replacements import BranchReplacement, first_input
from exporter.models.architectures import SublayerModules, sublayers
from exporter.models.model_folder import PIXELS, image_patches, longest_sequence
from exporter.models.onnx_interface import OnnxInterface, interface_of
from exporter.models.residual_stream import probe_inputs

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_LETTERS = 12


@dataclass
class TorchCostRunner(CostRunner):
    """A loaded model on PyTorch."""

    loaded: LoadedModel
    device: str = "cpu"

    @cached_property
    def sizes(self) -> GraphSizes:
        """What its branches hold, without their norms; caches aside."""
        model: Any = self.loaded.model
        config = model.config.get_text_config()
        windows = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        return GraphSizes(
            {p.ref: _sized(p, windows[p.layer]) for p in sublayers(model)},
            sum(weight.numel() for weight in model.parameters()),
            sum(weight.nbytes for weight in model.parameters()),
            caches(self._interface),
            hidden=config.hidden_size,
            number_bytes=model.dtype.itemsize,
            longest=self._longest,
            name=self.loaded.ref.source,
        )

    @property
    def _longest(self) -> int | None:
        config = self.loaded.model.config.get_text_config().to_dict()
        images = self._interface.image is not None
        return image_patches(config) if images else longest_sequence(config)

    @cached_property
    def _interface(self) -> OnnxInterface:
        return interface_of(self.loaded.model)

    @cached_property
    def whole(self) -> ComparedArm:
        """The model."""
        runner = self._runner(self.loaded.model, self._interface)
        return torch_arm(self.loaded, self.loaded.path, runner, "torch:")

    @contextmanager
    def cut(self, variant: Variant) -> Iterator[Runner]:
        """A model with some branches cut, which shares its weights."""
        cut = set(variant.names)
        own = tuple(s for s in self._interface.cache if (s.layer, "attention") not in cut)
        yield self._runner(self.variant_model(variant), replace(self._interface, cache=own))

    def variant_model(self, variant: Variant) -> Any:
        """The model with some branches cut; it shares its weights."""
        model = sharing_copy(self.loaded.model)
        branch_replacement, cut = self.branch_replacement(variant), set(variant.names)
        for part in sublayers(model):
            if part.ref in cut:
                leave_out(model, part, branch_replacement)
        return model

    def branch_replacement(self, variant: Variant) -> BranchReplacement:
        """What takes the branches' place: random numbers."""
        if variant.replacement == "none":
            return BranchReplacement()
        result = random_replacement(self.sizes.hidden or 0, variant.replacement)
        given = [item for item in (result.bias, result.weight) if item is not None]
        tensors = (torch.tensor(item).to(self.device, self.loaded.model.dtype) for item in given)
        return BranchReplacement(*tensors)

    def _runner(self, model: Any, interface: OnnxInterface) -> TorchRunner:
        return TorchRunner(
            model,
            compiled=False,
            provider=self.device,
            threads=self.threads,
            interface=interface,
        )


def caches(interface: OnnxInterface) -> tuple[Any, ...]:
    """What all caches take."""
    heads = (slot.heads * size for slot in interface.cache for _, size in slot.parts)
    return tuple(CacheSize(per_token=count * interface.dtype.itemsize) for count in heads)


def sharing_copy(model: Any) -> Any:
    """A copy of a model's modules, with the weights that the model has."""
    own = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in own})


def leave_out(model: Any, part: SublayerModules, branch_replacement: BranchReplacement) -> None:
    """Puts something else in a branch's place, so that the branch isn't computed any more."""
    first, last = part.reads, part.contribution
    if first is not last and (_holds(first, last) or _holds(last, first)):
        raise CostError(
            f"In PyTorch, {part.kind} {part.layer} of a {model.config.model_type} model can't be "
            "left out.",
            "Measure its ONNX graph.",
            code="branch-without-stand-in",
        )
    form = _output_form(model, last)
    read: list[torch.Tensor] = []

    def begin(*args: Any, **kwargs: Any) -> Any:
        read[:] = [first_input(args, kwargs)]
        return begun(read[0])

    def end(*args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs) if first is last else read.pop()
        tensor = branch_replacement.contribution(x)
        return form(torch.zeros_like(x) if tensor is None else tensor)

    if first is not last:
        begun = _output_form(model, first)
        first.forward = begin
    last.forward = end


def _holds(outer: torch.nn.Module, inner: torch.nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _output_form(model: Any, module: torch.nn.Module) -> Callable[[torch.Tensor], Any]:
    """What a module gives back, with another first tensor and nothing else in it."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            if model.main_input_name == PIXELS:
                model(**probe_inputs(model))
            else:
                model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    finally:
        handle.remove()
    if isinstance(seen[0], tuple):
        rest = (None,) * (len(seen[0]) - 1)
        return lambda tensor: (tensor, *rest)
    return lambda tensor: tensor


def _sized(part: SublayerModules, window: str) -> SublayerSize:
    weights = [*part.reads.parameters()]
    if part.contribution is not part.reads:
        own = {id(weight) for weight in weights}
        weights += [w for w in part.contribution.parameters() if id(w) not in own]
    shapes = sorted(str((tuple(w.shape), str(w.dtype))) for w in weights)
    data = repr((part.kind, shapes, window)).encode()
    count, held = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    signature = sha256_bytes(data)[:_LETTERS]
    return SublayerSize(count, count, held, held, signature=signature)
