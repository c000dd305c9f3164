"""A pruned or healed model in PyTorch: without the dropped modules, and as a checkpoint.

The checkpoint is a Hugging Face folder whose safetensors lack what was dropped and hold what took
its place; ``config.json`` says so under ``depthcut``. :func:`load_pruned` needs no code from it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.ablation import Cut, Substitute, substituted
from exporter.ablation.substitutes import first_input
from exporter.architectures import SublayerModules, layer_modules, sublayers
from exporter.artifacts import PlannedDeletion
from exporter.errors import UnknownArchitectureError, UsageError
from exporter.files import staged_directory
from exporter.model_files import save_checkpoint
from exporter.model_source import LoadedModel, load_model

if TYPE_CHECKING:
    import torch

    from exporter.branch_modules import BranchRecord, PrunedStructure

_TOKENS = 8
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
_NARROW_TOLERANCE = 2e-2  # sums of half a dozen numbers, each rounded


def prune_model(loaded: LoadedModel, deletions: Sequence[PlannedDeletion], cut: Cut) -> None:
    """Puts modules that do a cut's work into a model, in place; no hook is left.

    A dropped branch becomes one module: nothing, a bias, or one or two products. The norm before it
    goes too, where nothing else reads it. A dropped attention keeps no keys and values; the one
    that the length of the past is read from keeps one number a token.

    Args:
        loaded: The model. It is changed.
        deletions: The plan's, for the config.
        cut: What takes which branch's place.

    Raises:
        PlanError: A sublayer does not exist.
        UnknownArchitectureError: The model's family can't be written so. The model is then broken:
            load it again.
    """
    import torch

    from exporter.branch_modules import BranchSubstitute, put_modules

    model: Any = loaded.model
    inputs = _probe_inputs(model)
    with substituted(model, cut), torch.inference_mode():
        wanted = _answer(model, inputs)
    structure = _structure(loaded, deletions, cut, inputs)
    put_modules(model, structure)
    for branch in structure.branches:
        module = model.get_submodule(branch.path)
        assert isinstance(module, BranchSubstitute)
        substitute = cut[branch.layer, branch.kind]
        module.fill(*_as_in(model, substitute))
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        found = _answer(model, inputs)
    _require_same(loaded, found, wanted)


def save_pruned(loaded: LoadedModel, folder: Path) -> None:
    """Writes a model that :func:`prune_model` changed, as a folder that is there whole or not.

    Raises:
        UsageError: The folder is there, and holds something else than such a checkpoint.
        OSError: It can't be written.
    """
    refuse_checkpoint_folder(folder)
    with staged_directory(folder) as stage:
        save_checkpoint(loaded, stage)


def refuse_checkpoint_folder(folder: Path, kept: Iterable[Path] = ()) -> None:
    """Keeps a checkpoint from taking the place of anything but an earlier one.

    Args:
        folder: Where it is to stand.
        kept: Files and folders that must stay as they are.

    Raises:
        UsageError: The folder holds something else, or one of those, or lies in one.
    """
    from exporter.branch_modules import SECTION

    place = folder.resolve()
    for each in kept:
        if each.resolve().is_relative_to(place) or (
            each.is_dir() and place.is_relative_to(each.resolve())
        ):
            raise UsageError(
                f"{folder} is to be the checkpoint, which leaves no place there for {each}.",
                "Give --save-checkpoint a folder of its own.",
            )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config: Any = None
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or SECTION not in config:
        raise UsageError(
            f"{folder} is there, and is no pruned checkpoint.", "Give a folder that is not there."
        )


def load_pruned(folder: Path, *, dtype: str = "float32") -> LoadedModel:
    """Loads a pruned checkpoint, for evaluation or fine-tuning. Runs no code of the folder's.

    Args:
        folder: The checkpoint.
        dtype: ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        ModelSourceError: It is no whole checkpoint of this kind.
    """
    return load_model(str(folder), dtype=dtype, pruned=True)


def _structure(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    cut: Cut,
    inputs: dict[str, torch.Tensor],
) -> PrunedStructure:
    from exporter.branch_modules import PrunedStructure

    model: Any = loaded.model
    paths = {module: path for path, module in model.named_modules()}
    parts = [part for part in sublayers(model) if (part.layer, part.kind) in cut]
    places = {(part.layer, part.kind): _Place(model, part, paths) for part in parts}
    returned = _returned(model, [place.module for place in places.values()], inputs)
    keepers = _length_layers(model)
    branches = []
    passing = [paths[norm] for norm in _lonely_norms(model, cut, inputs)]
    for part in parts:
        name = part.layer, part.kind
        place = places[name]
        record = _record(part, cut[name], paths[place.module], returned[place.module])
        keeps = part.kind == "attention" and part.layer in keepers
        changes = {"adds_residual": place.adds_residual, "keeps_length": keeps}
        branches.append(record.model_copy(update=changes))
        passing += [paths[module] for module in place.passing]
    return PrunedStructure(
        base_sha256=loaded.ref.sha256,
        deletions=list(deletions),
        branches=branches,
        passing=sorted(set(passing)),
    )


def _record(part: SublayerModules, substitute: Substitute, path: str, returns: int) -> BranchRecord:
    from exporter.branch_modules import BranchRecord

    return BranchRecord(
        path=path,
        layer=part.layer,
        kind=part.kind,
        bias=None if substitute.bias is None else len(substitute.bias),
        maps=[(each.shape[0], each.shape[1]) for each in substitute.maps],
        multiplier=part.multiplier,
        returns=returns,
    )


class _Place:
    """Where in a branch its substitute stands, and which of its modules then only pass on.

    Attributes:
        module: The module that the substitute takes the place of; it is given the branch's input.
        passing: Modules behind it.
        adds_residual: Whether the module is given the stream too, and returns the sum.
    """

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
    found = getattr(model.get_submodule(path.rpartition(".")[0]), "activation_fn", None)
    return [found] if isinstance(found, torch.nn.Module) else []


def _returned(
    model: Any, modules: Sequence[torch.nn.Module], inputs: dict[str, torch.Tensor]
) -> dict[torch.nn.Module, int]:
    """How many things each module returns in a tuple; 0 for a bare tensor."""
    import torch

    counts: dict[torch.nn.Module, int] = {}

    def keep(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        counts[module] = len(output) if isinstance(output, tuple) else 0

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for module in modules:
            hooks.callback(module.register_forward_hook(keep).remove)
        model(**inputs)
    return counts


def _lonely_norms(
    model: Any, cut: Cut, inputs: dict[str, torch.Tensor]
) -> Iterator[torch.nn.Module]:
    """The norms whose results only branches read that are gone and have no map.

    A norm is a module of the layer whose output is the very tensor that a branch reads. In
    post-norm layers the norm belongs to the sum before, and stays.
    """
    layers = {modules.number: modules for modules in layer_modules(model)}
    gone = {name for name, what in cut.items() if not what.maps}
    trace = _Trace(model, {layer for layer, _ in gone}, inputs)
    for number in sorted({layer for layer, _ in gone}):
        modules = layers[number]
        if modules.form == "post_norm":
            continue
        readers: dict[int, set[tuple[int, str]]] = {}
        for kind in ("attention", "mlp"):
            readers.setdefault(trace.read[number, kind], set()).add((number, kind))
        for tensor, names in readers.items():
            norm = trace.made[number].get(tensor)
            if norm is not None and names <= gone:
                yield norm


class _Trace:
    """Which module made which tensor, and which tensor each branch read, in one run.

    Attributes:
        made: By layer, the modules of its own by the identity of what they made.
        read: By branch, the identity of what it read.
    """

    def __init__(self, model: Any, numbers: set[int], inputs: dict[str, torch.Tensor]) -> None:
        import torch

        self.made: dict[int, dict[int, torch.nn.Module]] = {number: {} for number in numbers}
        self.read: dict[tuple[int, str], int] = {}
        self._alive: list[Any] = []  # so that no tensor gets the address of an earlier one
        with contextlib.ExitStack() as hooks, torch.inference_mode():
            for modules in layer_modules(model):
                inside = {*modules.attention.modules(), *modules.mlp.modules()}
                for child in modules.layer.children() if modules.number in numbers else ():
                    if child not in inside and not list(child.children()):
                        hook = child.register_forward_hook(self._making(modules.number))
                        hooks.callback(hook.remove)
            for part in sublayers(model):
                if part.layer in numbers:
                    look = self._reading((part.layer, part.kind))
                    hook = part.reads.register_forward_pre_hook(look, with_kwargs=True)
                    hooks.callback(hook.remove)
            model(**inputs)

    def _making(self, number: int) -> Callable[..., None]:
        def keep(module: Any, _inputs: Any, output: Any) -> None:
            self._alive.append(output)
            self.made[number][id(output)] = module

        return keep

    def _reading(self, name: tuple[int, str]) -> Callable[..., None]:
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
    return {types.index(each) for each in set(types)} | {0}


def _as_in(model: Any, substitute: Substitute) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The numbers in the model's dtype, to which a graph's are rounded too."""
    form = {"device": model.device, "dtype": model.dtype}
    bias = None if substitute.bias is None else substitute.bias.detach().to(**form)
    return bias, [each.detach().to(**form) for each in substitute.maps]


def _probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    import torch

    if model.main_input_name != "input_ids":
        raise UnknownArchitectureError(
            f"{type(model).__name__} takes no tokens, so it can't be saved pruned.",
            "Export it, and use the pruned ONNX file.",
        )
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(_TOKENS, device=model.device)[None] * 7 + 5) % vocabulary
    return {"input_ids": ids}


def _answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    answer: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return answer.double()


def _require_same(loaded: LoadedModel, found: torch.Tensor, wanted: torch.Tensor) -> None:
    name = str(loaded.model.dtype).removeprefix("torch.")
    scale = max(1.0, float(wanted.abs().max()))
    limit = _TOLERANCE.get(name, _NARROW_TOLERANCE) * scale
    error = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not error <= limit:
        raise UnknownArchitectureError(
            f"Without its dropped modules {loaded.ref.architecture} does not compute what it "
            f"should: it is off by {error:.1e}, more than {limit:.1e}.",
            "This family can be pruned as ONNX only: depthcut export.",
        )
