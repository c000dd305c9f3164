"""Which of a model's modules a pruned one does without, found by looking at one run of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion
from exporter.models.ablation.branch_replacements import BranchReplacements, first_input
from exporter.models.architectures import SublayerModules, layer_modules, sublayers
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import hooked
from graph_passes.types import BLOCK_KINDS, SublayerRef

if TYPE_CHECKING:
    import torch

    from exporter.models.branch_modules import PrunedStructure


def structure_for(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    cut: BranchReplacements,
    inputs: dict[str, torch.Tensor],
) -> PrunedStructure:
    """Which modules of a model go, and what stands in their places; nothing is changed."""
    import torch

    from exporter.models.branch_modules import BranchRecord, PrunedStructure

    model: Any = loaded.model
    paths = {module: path for path, module in model.named_modules()}
    parts = [part for part in sublayers(model) if part.ref in cut]
    places = {part.ref: _ReplacedPlace(model, part, paths) for part in parts}
    trace = _Trace(model, {part.layer for part in parts}, [p.module for p in places.values()])
    with hooked(trace.hooks()), torch.inference_mode():
        model(**inputs)
    keepers = _length_layers(model)
    branches, passing = [], [paths[norm] for norm in _lonely_norms(model, cut, trace)]
    for part in parts:
        place, replacement = places[part.ref], cut[part.ref]
        weight, bias = replacement.weight, replacement.bias
        branches.append(
            BranchRecord(
                path=paths[place.module],
                layer=part.layer,
                kind=part.kind,
                bias=None if bias is None else len(bias),
                maps=[] if weight is None else [(len(weight), weight.shape[1])],
                multiplier=part.multiplier,
                returns=trace.returned[place.module],
                adds_residual=place.adds_residual,
                keeps_length=part.kind == "attention" and part.layer in keepers,
            )
        )
        passing += [paths[module] for module in place.passing]
    return PrunedStructure(
        base_sha256=loaded.ref.sha256,
        deletions=list(deletions),
        branches=branches,
        passing=sorted(set(passing)),
        empty=_emptied(model, [branch.path for branch in branches]),
    )


def _emptied(model: Any, paths: Sequence[str]) -> list[str]:
    """One weight of each module that goes, for :mod:`~exporter.models.branch_modules` to empty.

    None of experts': those are put together or taken apart when a model is loaded or saved.
    """
    names = [name for name, _ in model.named_parameters() if "expert" not in name]
    result = (next((n for n in names if n.startswith(f"{path}.")), None) for path in paths)
    return [name for name in result if name is not None]


class _ReplacedPlace:
    """Where in a branch its replacement stands, and which of its modules then only pass on."""

    def __init__(self, model: Any, part: SublayerModules, paths: dict[Any, str]) -> None:
        self.module, self.passing, self.adds_residual = part.reads, [], False
        reads, ends = part.reads, part.contribution
        if reads is ends:
            return
        if not paths[ends].startswith(f"{paths[reads]}."):
            self.passing = [ends, *_between(model, paths[ends])]
        elif (
            inner := getattr(reads, "self", None) or getattr(reads, "attention", None)
        ) is not None:
            # BERT's kind: a projection, a sum and a norm follow inside the same module.
            self.module, self.passing = inner, [ends]
        else:
            self.adds_residual = True


def _between(model: Any, path: str) -> list[torch.nn.Module]:
    """The activation between a layer's ``fc1`` and ``fc2``, which is the layer's own module."""
    import torch

    if not path.endswith(".fc2"):
        return []
    value = getattr(model.get_submodule(path.rpartition(".")[0]), "activation_fn", None)
    return [value] if isinstance(value, torch.nn.Module) else []


def _lonely_norms(model: Any, cut: BranchReplacements, trace: _Trace) -> Iterator[torch.nn.Module]:
    """The norms whose results only branches read that are gone and have no map.

    A norm is a module of the layer whose output is the very tensor that a branch reads. In
    post-norm layers the norm belongs to the sum before, and stays.
    """
    gone = {name for name, what in cut.items() if what.weight is None}
    numbers = {layer for layer, _ in gone}
    for modules in layer_modules(model):
        if modules.number not in numbers or modules.form == "post_norm":
            continue
        readers: dict[int, set[SublayerRef]] = {}
        for kind in BLOCK_KINDS:
            ref = SublayerRef(modules.number, kind)
            readers.setdefault(trace.read[ref], set()).add(ref)
        for tensor, names in readers.items():
            norm = trace.made[modules.number].get(tensor)
            if norm is not None and names <= gone:
                yield norm


class _Trace:
    """What of some layers one run shows.

    Which module made which tensor, which tensor each branch read, and of some modules how many
    things each returns in a tuple; 0 for a bare tensor.
    """

    def __init__(self, model: Any, numbers: set[int], replaced: Sequence[torch.nn.Module]) -> None:
        self._model, self._numbers, self._replaced = model, numbers, replaced
        self.made: dict[int, dict[int, torch.nn.Module]] = {number: {} for number in numbers}
        self.read: dict[SublayerRef, int] = {}
        self.returned: dict[torch.nn.Module, int] = {}
        self._alive: list[Any] = []  # so that no tensor gets the address of an earlier one

    def hooks(self) -> Iterator[Any]:
        """Registers what listens to the run."""
        for modules in layer_modules(self._model):
            inside = {*modules.attention.modules(), *modules.mlp.modules()}
            for child in modules.layer.children() if modules.number in self._numbers else ():
                if child not in inside and not list(child.children()):
                    yield child.register_forward_hook(self._making(modules.number))
        for part in sublayers(self._model):
            if part.layer in self._numbers:
                look = self._reading(part.ref)
                yield part.reads.register_forward_pre_hook(look, with_kwargs=True)
        for module in self._replaced:
            yield module.register_forward_hook(self._count)

    def _count(self, module: Any, _inputs: Any, output: Any) -> None:
        self.returned[module] = len(output) if isinstance(output, tuple) else 0

    def _making(self, number: int) -> Callable[..., None]:
        def keep(module: Any, _inputs: Any, output: Any) -> None:
            self._alive.append(output)
            self.made[number][id(output)] = module

        return keep

    def _reading(self, name: SublayerRef) -> Callable[..., None]:
        def look(_module: Any, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs)
            self._alive.append(x)
            self.read[name] = id(x)

        return look


def _length_layers(model: Any) -> set[int]:
    """The layers whose cache tells how long the past is: the first one of each type."""
    if not model.can_generate():
        return set()
    types = getattr(model.config.get_text_config(), "layer_types", None) or ["all"]
    return {types.index(item) for item in set(types)} | {0}
