"""Teacher and student in one copy of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from exporter.artifacts import Train
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.errors import HealingError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.streams import CutBranches
from exporter.models.architectures import layer_modules, sublayers_of
from exporter.models.changed_weights import (
    OwnValue,
    changes_of,
    is_transposed,
    products_in,
    refuse_quantized,
    swapped,
)
from exporter.models.residual_stream import LayerModules, first_tensor, hooked, probe_inputs
from exporter.models.tasks import task_of
from exporter.optional import require
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Answer:
    """What a pass gives."""

    given: torch.Tensor
    states: list[torch.Tensor]  # what each layer gives, `[batch, tokens, hidden]`


class Student:
    """A model that can be the whole one or its healed cut.

    Outside of :meth:`healed` it is the whole model, with the weights that it was loaded with.
    """

    def __init__(
        self,
        model: Any,
        cut: BranchReplacements,
        train: Train,
        rank: int | None,  # of the adapters; None for `all`
        folded: Sequence[OwnValue] = (),
    ) -> None:
        refuse_quantized(model)
        if train == "all" and model.dtype.itemsize < 4:  # steps would be lost in the rounding
            raise HealingError(
                f"Weights in {model.dtype} can't be trained themselves.",
                "Load the model with --dtype float32, or say train: adapters.",
                code="nothing-to-train",
            )
        self.model, self.task = model, task_of(model)
        self.cut = {
            name: what.turned(lambda tensor: tensor.detach().float().clone().requires_grad_(True))
            for name, what in cut.items()
        }
        self._answers_with: BranchReplacements = self.cut
        self._own: list[OwnValue] = []
        self._folded = list(folded)
        self._adapters: dict[str, Any] = {}
        self._trained_before = [(item, item.requires_grad) for item in model.parameters()]
        try:
            self._build(train, rank)
        except BaseException:
            self.close()
            raise

    def _build(self, train: Train, rank: int | None) -> None:
        """Puts in what is trained, and tells what the branches return."""
        import torch

        model = self.model
        layers = layer_modules(model)
        dropped = {  # the ids of the modules that don't run in the cut model
            id(module)
            for part in sublayers_of(layers)
            if part.ref in self.cut and part.reads is part.contribution
            for module in part.contribution.modules()
        }
        # A step is lost in the rounding of 16 bits beside a norm's weight of 1.
        if train == "all" or model.dtype.itemsize > 2:
            self._own = [
                OwnValue(name, item, item.detach().clone())
                for name, item in _own_parameters(model, dropped, train)
            ]
        if train == "adapters" and rank is not None:
            self._adapters = _with_adapters(model, layers, dropped, rank)
        self._layers = layer_modules(model)  # with the adapters in them
        self._branches = CutBranches(self._layers)
        for own in self._own:
            own.parameter.requires_grad_(True)
        if not self._adapters and not self._own:
            raise HealingError(
                f"The kept layers of {type(model).__name__} hold no weight that can be trained.",
                "Heal with --heal linear.",
                code="nothing-to-train",
            )
        # A pass tells what the branches return, so that they needn't run.
        with self._branches.counted(), torch.inference_mode():
            self.model(**probe_inputs(self.model))
        self._switch_adapters(on=False)

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """What is trained, by name: leaves that hold the student's values within :meth:`healed`."""
        tensors: dict[str, torch.Tensor] = {f"value:{own.name}": own.parameter for own in self._own}
        for name, adapter in self._adapters.items():
            tensors[f"down:{name}"] = adapter.lora_A["default"].weight
            tensors[f"up:{name}"] = adapter.lora_B["default"].weight
        return tensors | self.replacing

    @property
    def replacing(self) -> dict[str, torch.Tensor]:
        """Those of :attr:`trained` that are in the branches' places."""
        tensors: dict[str, torch.Tensor] = {}
        for ref, replacement in self.cut.items():
            numbers = enumerate(replacement.numbers)
            tensors |= {f"branch:{ref}.{place}": tensor for place, tensor in numbers}
        return tensors

    @contextlib.contextmanager
    def healed(self) -> Iterator[None]:
        """The student's weights while the block runs; :meth:`answer` drops its branches."""
        self._switch_adapters(on=True)
        try:
            with swapped([*self._own, *self._folded]):
                yield
        finally:
            self._switch_adapters(on=False)

    @property
    def is_fitted(self) -> bool:
        """Whether the student begins with folded weights, or with fitted replacements."""
        return bool(self._folded) or any(item.numbers for item in self.cut.values())

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """The student without folded weights and replacements while the block runs."""
        folded, self._folded = self._folded, []
        self._answers_with = dict.fromkeys(self.cut, NOTHING)
        try:
            yield
        finally:
            self._folded, self._answers_with = folded, self.cut

    def begin_bare(self, *, empties: bool) -> None:
        """Lets the student begin with the model's own weights."""
        import torch

        self._folded = []
        with torch.no_grad():
            for replacement in self.cut.values() if empties else ():
                for tensor in replacement.numbers:
                    tensor.zero_()

    def teach(self, inputs: dict[str, torch.Tensor], *, states: bool = False) -> Answer:
        """What the whole model answers; without gradients."""
        import torch

        with torch.no_grad():
            return self._run(inputs, states)

    def answer(self, inputs: dict[str, torch.Tensor], *, states: bool = False) -> Answer:
        """What the cut answers, with gradients; within :meth:`healed` the healed one."""
        with self._branches.cut(self._answers_with):
            return self._run(inputs, states)

    def changes(self) -> dict[str, ChangedWeight]:
        """The student's weights, as changes of the whole model's."""
        weights = changes_of([*self._own, *self._folded])
        for name, adapter in self._adapters.items():
            down = adapter.lora_A["default"].weight.detach().clone()
            up = adapter.lora_B["default"].weight.detach() * adapter.scaling["default"]
            if is_transposed(adapter.get_base_layer()):
                down, up = up.T, down.T
            if bool(up.any()) and bool(down.any()):
                weights[f"{name}.weight"] = _added(weights.get(f"{name}.weight"), down, up)
        return weights

    def branch_replacements(self) -> dict[SublayerRef, BranchReplacement]:
        """What is in the branches' places, as it was trained."""
        return {
            name: replacement.turned(lambda tensor: tensor.detach())
            for name, replacement in self.cut.items()
        }

    def close(self) -> None:
        """Takes the adapters out of the model again; its weights are those that it came with."""
        if hasattr(self.model, "peft_config"):
            from peft.tuners.tuners_utils import BaseTunerLayer

            for name, module in list(self.model.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    put_module(self.model, name, module.get_base_layer())
            del self.model.peft_config
        for parameter, trained in self._trained_before:
            parameter.requires_grad_(trained)
            parameter.grad = None
        self._adapters, self._own = {}, []

    def _run(self, inputs: dict[str, torch.Tensor], states: bool) -> Answer:
        tensors: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            tensors.append(first_tensor(output))

        layers = self._layers if states else []
        with hooked(layer.layer.register_forward_hook(keep) for layer in layers):
            return Answer(self.task.given(inputs), tensors)

    def _switch_adapters(self, *, on: bool) -> None:
        for adapter in self._adapters.values():
            adapter.enable_adapters(on)


def adapter_library() -> ModuleType:
    """The library that makes adapters."""
    return require("peft", extra="torch", oldest="0.18")


def _added(folded: ChangedWeight | None, down: torch.Tensor, up: torch.Tensor) -> ChangedWeight:
    """An adapter's product, with the folded value that it was trained beside, if there is one."""
    if folded is None:
        return ChangedWeight((down, up))
    value = folded.numbers[0]
    return ChangedWeight(((value.float() + up.float() @ down.float()).to(value.dtype),))


def put_module(model: Any, name: str, module: Any) -> None:
    """Puts a module in another's place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _with_adapters(
    model: Any, layers: list[LayerModules], dropped: set[int], rank: int
) -> dict[str, Any]:
    """Puts adapters beside the products of the kept branches; by the products' names."""
    peft = adapter_library()
    inside = (module for item in layers for module in item.layer.modules())
    names = [*products_in(model, (module for module in inside if id(module) not in dropped))]
    if not names:
        return {}
    transposed = any(is_transposed(model.get_submodule(name)) for name in names)
    wanted = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=names, fan_in_fan_out=transposed
    )
    peft.inject_adapter_in_model(wanted, model)
    return _kept_adapters(model, set(names))


def _kept_adapters(model: Any, wanted: set[str]) -> dict[str, Any]:
    """The adapters of products, in float32; peft's own for experts are taken out again."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    linears = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name in wanted:
            linears[name] = module
            module.lora_A.float()
            module.lora_B.float()
        elif isinstance(module, BaseTunerLayer):
            put_module(model, name, module.get_base_layer())
    return linears


def _own_parameters(
    model: Any, dropped: set[int], train: Train
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of which the student has its own: norms and biases, or all."""
    embeddings = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    seen = {id(item) for module in embeddings for item in module.parameters()}
    for path, module in model.named_modules():
        if id(module) in dropped:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            small = parameter.ndim == 1 and "norm" in type(module).__name__.lower()
            if (small or train == "all") and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter
