"""Real modules in the places of dropped branches, as a pruned config describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt, ValidationError

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.base import Record, json_path
from exporter.artifacts.plan_dialects import SECTION, with_drops
from exporter.errors import ModelSourceError
from exporter.files import write_text
from exporter.printable import json_text
from graph_passes.types import SublayerKind

_VERSION = 2


class BranchRecord(Record):
    """One module that stands in a branch's place.

    maps: `[out, in]` of the matrix; empty without one.
    """

    path: str = Field(min_length=1)
    layer: int = Field(ge=0)
    kind: SublayerKind
    bias: PositiveInt | None = None  # the width of the bias; None without one
    maps: list[tuple[PositiveInt, PositiveInt]] = Field(default_factory=list, max_length=1)
    multiplier: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    returns: int = Field(default=0, ge=0)
    adds_residual: bool = False
    keeps_length: bool = False


class PrunedStructure(Record):
    """The section ``depthcut`` of a pruned checkpoint's config."""

    version: int = _VERSION
    base_sha256: str
    deletions: list[PlannedDeletion]
    branches: list[BranchRecord]
    passing: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    empty: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)

    @property
    def without_cache(self) -> set[int]:
        """The layers that keep no keys and values any more."""
        return {branch.layer for branch in self.branches if branch.kind == "attention"}

    @property
    def length_keepers(self) -> list[int]:
        """The layers among them in which the length of the past is kept."""
        return [branch.layer for branch in self.branches if branch.keeps_length]


def structure_of(config: Any) -> PrunedStructure | None:
    """What a model's config says of its pruning; None for a whole model."""
    section = getattr(config, SECTION, None)
    return None if section is None else read_structure(section)


def read_structure(section: Any) -> PrunedStructure:
    """Validates the section; see :func:`structure_of`."""
    version = section.get("version") if isinstance(section, Mapping) else None
    if isinstance(version, int) and version > _VERSION:
        raise ModelSourceError(
            f"This checkpoint was pruned by a newer depthcut: its section has version {version}.",
            "Update depthcut.",
            code="newer-schema",
        )
    try:
        return PrunedStructure.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelSourceError(
            f"config.json: {json_path((SECTION, *first['loc']))}: {first['msg']}."
        ) from error


class PassOn(torch.nn.Module):
    """Hands on its first argument."""

    def forward(self, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """What it was given."""
        return x


class ReplacementModule(torch.nn.Module):
    """Contributes ``x @ weight.T + bias`` to the stream in a branch's place; else nothing."""

    replacement_weight: torch.nn.Parameter | None
    replacement_bias: torch.nn.Parameter | None

    def __init__(self, record: BranchRecord) -> None:
        super().__init__()
        self._record = record
        weight = torch.nn.Parameter(torch.empty(record.maps[0])) if record.maps else None
        self.register_parameter("replacement_weight", weight)
        bias = None if record.bias is None else torch.nn.Parameter(torch.empty(record.bias))
        self.register_parameter("replacement_bias", bias)

    def fill(self, bias: torch.Tensor | None, weight: torch.Tensor | None) -> None:
        """Sets the parameters."""
        for name, tensor in (("replacement_weight", weight), ("replacement_bias", bias)):
            if tensor is not None:
                setattr(self, name, torch.nn.Parameter(tensor.clone(), requires_grad=False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The contribution, as the module that was here gave it: bare, or first in a tuple."""
        record = self._record
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        x = kwargs.get("hidden_states", tensors[0])
        y = self._contribution(x) / record.multiplier
        if record.adds_residual:
            y = y + _residual(kwargs, tensors, x)
        if record.keeps_length:
            _keep_length(x, record.layer, [*args, *kwargs.values()])
        return (y, *[None] * (record.returns - 1)) if record.returns else y

    def _contribution(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.replacement_bias
        if self.replacement_weight is None:
            return torch.zeros_like(x) if bias is None else bias.expand(x.shape)
        y: torch.Tensor = x @ self.replacement_weight.T
        return y if bias is None else y + bias


def _residual(
    kwargs: Mapping[str, Any], tensors: list[torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The stream: named, or the second tensor of the input's shape (maybe the very same one)."""
    named = kwargs.get("residual")
    if isinstance(named, torch.Tensor):
        return named
    return next(tensor for tensor in tensors[1:] if tensor.shape == x.shape)


def _keep_length(x: torch.Tensor, layer: int, given: Iterable[Any]) -> None:
    """Has the cache remember one number a token, where there is a cache."""
    for cache in given:
        if hasattr(cache, "update") and hasattr(cache, "get_seq_length"):
            kept = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(kept, kept, layer)
            return


def put_modules(model: Any, structure: PrunedStructure) -> None:
    """Replaces a whole model's modules by those of a pruned one, in place."""
    dtype, device = _form_of(model)
    for branch in structure.branches:
        made = ReplacementModule(branch).to(dtype=dtype)
        _put(model, branch.path, made if device is None else made.to(device))
    for path in structure.passing:
        _put(model, path, PassOn())
    setattr(model.config, SECTION, structure.model_dump(mode="json"))


def _form_of(model: torch.nn.Module) -> tuple[torch.dtype, torch.device | None]:
    first = next(model.parameters())
    # A model that is being loaded has no weights yet, and what is made here is made alike.
    return first.dtype, None if first.device.type == "meta" else first.device


def _put(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(holder)
        parent.get_submodule(name)
    except AttributeError as error:
        raise ModelSourceError(
            f"The pruned checkpoint names {path}, which this model does not have.",
            "Its config.json was changed, or this version of transformers has other modules.",
            code="another-model",
        ) from error
    setattr(parent, name, module)


def note_drops(folder: Path, structure: PrunedStructure) -> None:
    """Adds to a written ``config.json`` what other programs can read of the drops."""
    path = folder / "config.json"
    config = with_drops(json.loads(path.read_text(encoding="utf-8")), structure.deletions)
    write_text(path, json_text(config))


def pruned_class(model_class: type[Any], structure: PrunedStructure) -> type[Any]:
    """A model's class whose instances are made with the modules that their config names.

    transformers' own loading then fills them, and finds nothing missing and nothing left over.
    What is saved is such a checkpoint again, trained or not.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        put_modules(self, structure)

    def save(
        self: Any,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        held = self.state_dict() if state_dict is None else state_dict
        dtype, _ = _form_of(self)
        # Each with memory of its own: safetensors takes tensors that share one for the same.
        tensors = {**held, **{n: torch.empty(1, dtype=dtype)[:0] for n in structure.empty}}
        model_class.save_pretrained(
            self, save_directory, is_main_process=is_main_process, state_dict=tensors, **kwargs
        )
        if is_main_process:
            note_drops(Path(save_directory), structure)

    ignored = [f"^{re.escape(name)}$" for name in structure.empty]
    known = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or []
    names = {
        "__init__": init,
        "save_pretrained": save,
        "__module__": model_class.__module__,
        "_keys_to_ignore_on_load_unexpected": [*known, *ignored],
    }
    return type(model_class.__name__, (model_class,), names)
