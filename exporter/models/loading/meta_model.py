"""A model whose weights stay in the checkpoint's shards until one of its modules is wanted."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import ModelSourceError, first_line
from exporter.models.loading.checked_folder import Dangers
from exporter.models.loading.checkpoint_shards import CheckpointShards, TensorEntry
from exporter.models.loading.model_class import auto_class, quiet_transformers, refuse_far_larger
from exporter.models.loading.model_source import LoadedModel, check_dtype, load_folder
from exporter.models.loading.sources import resolve_source
from exporter.optional import require

if TYPE_CHECKING:
    import threading

    import torch

_WHOLE = "Load it whole."

Fetched = Mapping[str, "torch.Tensor"]
"""Tensors as they are in the shards, by their names there."""


@dataclass(frozen=True)
class MetaModel(LoadedModel):
    """A loaded model without its weights.

    Its parameters are on PyTorch's meta device, its buffers are real. It answers whatever is asked
    of shapes, names and config; it runs as far as its modules are filled.
    """

    weights: ShardedWeights

    @property
    def shards(self) -> CheckpointShards:
        """Where the weights come from."""
        return self.weights.shards

    @contextlib.contextmanager
    def held(self, prefix: str = "", fetched: Fetched | None = None) -> Iterator[None]:
        """Fills one module's parameters while the block runs."""
        self.weights.materialise(prefix, fetched)
        try:
            yield
        finally:
            self.weights.release(prefix)


def load_meta(
    source: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    pruned: bool = False,
    allow_any_model_type: bool = False,
) -> MetaModel:
    """Loads a model without reading its weights."""
    check_dtype(dtype)
    dangers = Dangers(allow_any_model_type=allow_any_model_type)
    path = resolve_source(source, revision=revision, **vars(dangers))
    if path.is_file():
        raise ModelSourceError(
            f"{path} holds quantized weights, which are not read a layer at a time.",
            "Give the folder of the model from before its quantization, or load it whole.",
            code="quantized",
        )
    version = require("transformers", extra="torch").__version__
    if int(version.partition(".")[0]) < 5:
        raise ModelSourceError(
            f"transformers {version} can't load a model without its weights.",
            "Update it to 5 or newer, or load the model whole.",
        )
    shards = CheckpointShards.open(path)
    loaded = load_folder(
        source, path, lambda config: _emptied(config, path, shards, dtype, pruned), dangers
    )
    weights = ShardedWeights(loaded.model, shards)
    return MetaModel(loaded.model, loaded.tokenizer, loaded.ref, loaded.path, weights)


class ShardedWeights:
    """Fills a model's modules from the shards and empties them again.

    Modules that share a parameter share it here as well, and a module that is filled twice must be
    emptied twice. :meth:`fetch` may run in another thread than the rest.
    """

    def __init__(self, model: Any, shards: CheckpointShards) -> None:
        self.shards = shards
        self._model = model
        mapping = require("transformers.conversion_mapping", extra="torch")
        self._config = require("transformers.modeling_utils", extra="torch").LoadStateDictConfig(
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=mapping.get_model_conversion_mapping(model),
        )
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._dtypes = {name: empty.dtype for name, empty in self._empty.items()}
        shared: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._empty.items():
            shared[id(parameter)].append(name)
        self._aliases = {name: tuple(names) for names in shared.values() for name in names}
        # from each parameter or buffer to the shards' names of what it is made from
        self.sources = _sources(model, shards, self._config.weight_mapping)
        self._uses: Counter[str] = Counter()
        self._fill_buffers()

    def names(self, prefix: str = "") -> list[str]:
        """The parameters of a module, by their names in the model; those of a tie each."""
        own = prefix and f"{prefix}."
        return [name for name in self._empty if name == prefix or name.startswith(own)]

    def aliases(self, name: str) -> tuple[str, ...]:
        """All names of one parameter, itself included."""
        return self._aliases[name]

    def nbytes(self, prefix: str = "") -> int:
        """How much memory a module's parameters take when they are there; ties count once."""
        shared = {self._aliases[name][0] for name in self.names(prefix)}
        return sum(self._empty[name].nbytes for name in shared)

    def fetch(
        self, prefix: str = "", stop: threading.Event | None = None
    ) -> dict[str, torch.Tensor]:
        """Reads what :meth:`materialise` needs for a module, and changes nothing."""
        return {name: self.shards.read(name, stop) for name in self._needed(prefix)}

    def materialise(self, prefix: str = "", fetched: Fetched | None = None) -> None:
        """Fills one module's parameters, in the dtype that was asked for."""
        tensors = dict(fetched or {})
        # All of it, or what was emptied since the fetch: a module that the last layer shared.
        tensors |= {name: self.shards.read(name) for name in self._needed(prefix, tensors)}
        self._uses.update(self._aliases[name][0] for name in self.names(prefix))
        try:
            self._load(tensors)
            for name in self.names(prefix):
                self._share(name, prefix)
        except BaseException:
            self.release(prefix)
            raise

    def release(self, prefix: str = "") -> None:
        """Empties one module's parameters, but those that another filled module shares."""
        for name in self.names(prefix):
            first, *others = self._aliases[name]
            self._uses[first] -= 1
            if self._uses[first] <= 0:
                for alias in (first, *others):
                    self._set(alias, self._empty[alias])

    def _needed(self, prefix: str, fetched: Fetched | None = None) -> list[str]:
        """The shards' names of what a module lacks, and that was not fetched."""
        own = [name for name in self.names(prefix) if not self._uses[self._aliases[name][0]]]
        wanted = {alias for name in own for alias in self._aliases[name]}
        return [
            source
            for target, sources in self.sources.items()
            if target in wanted
            for source in sources
            if source not in (fetched or ())
        ]

    def _load(self, tensors: Fetched) -> None:
        if not tensors:
            return
        loading = require("transformers.core_model_loading", extra="torch")
        kept = getattr(self._model, "_weight_conversions", None)
        with quiet_transformers():
            info, _ = loading.convert_and_load_state_dict_in_model(
                self._model, dict(tensors), copy.deepcopy(self._config)
            )
        self._model._weight_conversions = kept
        errors = [*info.conversion_errors.values(), *map(str, info.mismatched_keys)]
        if errors:
            raise ModelSourceError(
                f"{self.shards.folder}: {first_line(Exception(errors[0]))}.", _WHOLE
            )

    def _share(self, name: str, prefix: str) -> None:
        """Gives a parameter to all that are tied to it."""
        parameters = [self._model.get_parameter(alias) for alias in self._aliases[name]]
        real = next((parameter for parameter in parameters if not parameter.is_meta), None)
        if real is None:
            raise ModelSourceError(
                f"{self.shards.folder}: {name} is not filled by what the shards hold for "
                f"{prefix or 'the model'}, so this model can't be read a layer at a time.",
                _WHOLE,
            )
        real.requires_grad_(False)
        # The loader takes that of the empty one, which who runs the model may have widened.
        real.data = real.data.to(self._dtypes[name])
        for alias in self._aliases[name]:
            self._set(alias, real)

    def _fill_buffers(self) -> None:
        buffers = [name for name, buffer in self._model.named_buffers() if buffer.is_meta]
        sources = [source for name in buffers for source in self.sources.get(name, ())]
        self._load({source: self.shards.read(source) for source in sources})
        for name, buffer in self._model.named_buffers():
            if buffer.is_meta:
                raise ModelSourceError(
                    f"{self.shards.folder} does not tell the buffer {name}.", _WHOLE
                )

    def _set(self, name: str, parameter: torch.nn.Parameter) -> None:
        owner, _, own = name.rpartition(".")
        self._model.get_submodule(owner)._parameters[own] = parameter


class _WithoutContent:
    """A tensor of the shards as transformers' loader takes it, without content."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry

    def __getitem__(self, _index: Any) -> _WithoutContent:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An empty tensor, whatever device is asked for."""
        import torch

        wanted = dtype or self._entry.torch_dtype
        return torch.empty(self._entry.shape, dtype=wanted, device="meta")


def _emptied(
    config: Any, path: Path, shards: CheckpointShards, dtype: str, pruned: bool
) -> tuple[Any, Any]:
    """The model on the meta device, and transformers' report of the load."""
    if getattr(config, "transformers_weights", None):
        raise ModelSourceError(f"{path}: the config names a weights file of its own.", _WHOLE)
    empty = {name: _WithoutContent(entry) for name, entry in shards.entries.items()}
    model_class = auto_class(config, trust_remote_code=False, pruned=pruned)
    refuse_far_larger(model_class, config, shards, path)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        dtype=dtype,
        state_dict=empty,
        output_loading_info=True,
    )
    _tie_what_is_there_twice(model, shards)
    model.config.name_or_path = str(path)
    if model.can_generate() and (path / "generation_config.json").is_file():
        kind = require("transformers", extra="torch").GenerationConfig
        model.generation_config = kind.from_pretrained(path, local_files_only=True)
    return model, info


def _tie_what_is_there_twice(model: Any, shards: CheckpointShards) -> None:
    """Ties what the shards hold twice with the same content, as for tensors that are loaded."""
    mapping = require("transformers.conversion_mapping", extra="torch")
    sources = _sources(model, shards, mapping.get_model_conversion_mapping(model))
    for target, source in list(model.all_tied_weights_keys.items()):
        pair = [sources.get(name, []) for name in (target, source)]
        if [len(names) for names in pair] != [1, 1] or target not in dict(model.named_parameters()):
            continue
        if shards.same(pair[0][0], pair[1][0]):
            owner, _, own = target.rpartition(".")
            setattr(model.get_submodule(owner), own, model.get_parameter(source))
        else:
            model.all_tied_weights_keys.pop(target)


def _sources(model: Any, shards: CheckpointShards, mapping: Any) -> dict[str, list[str]]:
    """From each parameter or buffer to what in the shards it is made from.

    Where one tensor becomes several parameters it stands at the first of them.
    """
    loading = require("transformers.core_model_loading", extra="torch")
    mapping = copy.deepcopy(mapping)  # the renamings remember what they met
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    targets = model.state_dict()
    lines: dict[str, list[str]] = defaultdict(list)
    for source in sorted(shards.entries, key=loading.dot_natural_key):
        for changes in ((renamings, converters), ([], [])):
            target, _ = loading.rename_source_key(
                source, *changes, model.base_model_prefix, targets
            )
            if target in targets:
                lines[target].append(source)
                break
    return dict(lines)


@contextlib.contextmanager
def filled_while_running(
    meta: MetaModel, modules: Iterable[torch.nn.Module] | None = None
) -> Iterator[None]:
    """Has modules filled while they run, and emptied after it; every run reads their weights once.

    A module whose weights are used by another while it does not run itself makes PyTorch raise:
    there is nothing in them.
    """
    if modules is None:
        modules = [module for module in meta.model.modules() if module._parameters]
    names = {module: name for name, module in meta.model.named_modules()}
    placed = {names[module]: module for module in modules}
    inside = {name for path in placed for name in meta.weights.names(path)}
    # Now: one inside another with weights of its own is filled by that one first, unwidened.
    own = ((module, item) for module in placed.values() for item in module._parameters.items())
    dtypes = {(module, name): value.dtype for module, (name, value) in own if value is not None}

    def fill(module: torch.nn.Module, *_: Any) -> None:
        meta.weights.materialise(names[module])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.data = parameter.data.to(dtypes[module, name])

    def empty(module: torch.nn.Module, *_: Any) -> None:
        meta.weights.release(names[module])

    with contextlib.ExitStack() as stack:
        for name in meta.weights.names():
            if name not in inside:
                stack.enter_context(meta.held(name))
        for module in placed.values():
            stack.callback(module.register_forward_pre_hook(fill).remove)
            stack.callback(module.register_forward_hook(empty, always_call=True).remove)
        yield
