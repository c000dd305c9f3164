"""A model in PyTorch, and variants of it in which branches are left out or replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from exporter.choose.costs.cost_runners import CostRunner, random_replacement
from exporter.choose.costs.graph_sizes import CacheSize
from exporter.choose.costs.table import Variant
from exporter.choose.costs.weighing import module_sizes
from exporter.compare.kinds import torch_arm
from exporter.engines.runners.base import Runner
from exporter.engines.runners.pytorch import TorchRunner
from exporter.errors import CostError
from exporter.models.ablation.branch_replacements import BranchReplacement, first_input
from exporter.models.architectures import SublayerModules, sublayers
from exporter.models.model_folder import PIXELS, image_patches, longest_sequence
from exporter.models.onnx_interface import OnnxInterface, interface_of
from exporter.models.residual_stream import probe_inputs
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


def torch_runner(loaded: LoadedModel, device: str = "cpu") -> CostRunner:
    """A loaded model on PyTorch; a variant shares its weights."""
    model: Any = loaded.model
    interface, config = interface_of(model), model.config.get_text_config().to_dict()
    heads = (slot.heads * size for slot in interface.cache for _, size in slot.parts)
    weighed = replace(
        module_sizes(loaded),
        rest_caches=tuple(CacheSize(per_token=n * interface.dtype.itemsize) for n in heads),
        longest=longest_sequence(config) if interface.image is None else image_patches(config),
    )

    def running(model: Any, interface: OnnxInterface) -> TorchRunner:
        how: Any = {"compiled": False, "provider": device, "threads": 1}
        return TorchRunner(model, interface=interface, **how)

    @contextmanager
    def cut(variant: Variant) -> Iterator[Runner]:
        gone = {*variant.names}
        own = tuple(slot for slot in interface.cache if (slot.layer, "attention") not in gone)
        put_in = random_stand_in(weighed.hidden or 0, variant.replacement, model.dtype, device)
        yield running(variant_model(model, gone, put_in), replace(interface, cache=own))

    whole = torch_arm(loaded, loaded.path, running(model, interface), "torch:")
    engine = whole.runner.backend, whole.runner.provider
    on_gpu = whole.runner.capabilities.device == "gpu"
    return CostRunner(weighed, whole.facts.sha256, *engine, on_gpu, lambda: whole, cut)


def random_stand_in(
    hidden: int, replacement: Replacement, dtype: Any, device: str = "cpu"
) -> BranchReplacement:
    """What takes a branch's place: random numbers."""
    if replacement == "none":
        return BranchReplacement()
    result = random_replacement(hidden, replacement)
    given = [item for item in (result.bias, result.weight) if item is not None]
    return BranchReplacement(*(torch.tensor(item).to(device, dtype) for item in given))


def variant_model(model: Any, gone: Set[SublayerRef], stand_in: BranchReplacement) -> Any:
    """The model with some branches cut; it shares its weights."""
    result = sharing_copy(model)
    for part in sublayers(result):
        if part.ref in gone:
            leave_out(result, part, stand_in)
    return result


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
