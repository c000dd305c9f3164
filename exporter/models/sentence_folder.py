"""What makes a model's folder one of sentence-transformers: its modules, pooling and prompts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from exporter.errors import ModelSourceError, blaming
from exporter.files import sha256_file
from graph_passes.files.locations import real
from graph_passes.files.reading import TABLE_BYTES, check_file, copy_file, read_json
from graph_passes.fusing.pooling import MODES, Activation, DenseLayer, PoolingMode

WEIGHTS = "model.safetensors"
_ACTIVATIONS: dict[str, Activation] = {
    "Identity": "Identity", "Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid",
}  # fmt: skip
"""PyTorch's names of those that are known, and ONNX's."""
_ARRAYS: dict[Activation, Any] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@dataclass(frozen=True)
class Dense:
    """One product."""

    file: str
    activation: Activation
    sha256: str

    @property
    def layer(self) -> DenseLayer:
        """Its weights, float32."""
        return _layer(self.file, self.activation, self.sha256)

    def __call__(self, vectors: Any) -> Any:
        """Of ``[..., in]`` ``[..., out]``; of NumPy or of PyTorch."""
        layer = self.layer
        bias = np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias
        if isinstance(vectors, np.ndarray):
            return _ARRAYS[self.activation](vectors @ layer.weight.T + bias)
        import torch

        weight, added = (torch.from_numpy(array).to(vectors) for array in (layer.weight, bias))
        product = vectors @ weight.T + added
        name = self.activation.lower()
        return product if name == "identity" else getattr(torch, name)(product)


@cache
def _layer(file: str, activation: Activation, _sha256: str) -> DenseLayer:
    with blaming(f"{file} holds no product of vectors", _WHOLE, ModelSourceError, _BROKEN):
        numbers = load_file(file)
        weight, bias = numbers["linear.weight"], numbers.get("linear.bias")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError("linear.weight and linear.bias have other shapes")
        added = None if bias is None else bias.astype(np.float32)
        return DenseLayer(weight.astype(np.float32), added, activation)


_WHOLE, _BROKEN = "Fetch the whole folder, or correct the file.", "broken-sentence-folder"


def _broken(message: str) -> ModelSourceError:
    return ModelSourceError(message, _WHOLE, code=_BROKEN)


def _other(message: str) -> ModelSourceError:
    hint = "Let sentence-transformers pool, and apply the modules behind the model."
    return ModelSourceError(message, hint, code="other-pooling")


MODULES = "modules.json"
"""Which modules sentence-transformers makes a model of, and in which folder each has its files."""
PROMPTS = "config_sentence_transformers.json"
_SETTINGS = "sentence_bert_config.json"
_BESIDE = (MODULES, _SETTINGS, PROMPTS)
_CONFIG = "config.json"
_LIBRARY = "sentence_transformers."
_NEEDED: dict[str, tuple[str, ...]] = {
    "Transformer": (),  # the model itself
    "Normalize": (),
    "Pooling": (_CONFIG,),
    "Dense": (_CONFIG, WEIGHTS),
}
"""The files of each module that can be taken along."""
_SWITCHES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How versions before 6 wrote the modes, in the order of their vectors."""
_ORDER = re.compile(r"Transformer Pooling( Dense)*( Normalize)?")


@dataclass(frozen=True)
class Pooling:
    """How one vector is made of a text's token states."""

    modes: tuple[PoolingMode, ...]  # one at least; the vectors of several stand one after the other
    normalised: bool = False
    dense: tuple[Dense, ...] = ()

    def __call__(self, states: Any, mask: Any) -> Any:
        """Each text's vector, ``[..., size]``; of NumPy or of PyTorch.

        states: `[..., tokens, hidden]`, floats.
        mask: `[..., tokens]`, 1 or True at tokens, 0 at padding; at least one a token.
        """
        result = [_vector(mode, states, mask) for mode in self.modes]
        joined = _joined(result)
        for product in self.dense:
            joined = product(joined)
        return joined / (joined**2).sum(-1)[..., None] ** 0.5 if self.normalised else joined


MEAN = Pooling(("mean",))
"""As sentence encoders are mostly trained, where a folder says nothing else."""


def _vector(mode: PoolingMode, states: Any, mask: Any) -> Any:
    if mode == "max":
        spread = mask[..., None] > 0
        lowest = states.min() - 1
        largest = (states * spread + lowest * ~spread).max(-2)
        return getattr(largest, "values", largest)  # PyTorch gives the places, too
    weights, divisor = _weights(mode, mask)
    return (states * weights[..., None]).sum(-2) / divisor


def _weights(mode: PoolingMode, mask: Any) -> tuple[Any, Any]:
    """Of each token in a sum, ``[..., tokens]``, 0 at padding; and what the sum is divided by."""
    total = mask.sum(-1)[..., None]
    if mode in ("mean", "mean_sqrt_len_tokens"):
        return mask, total if mode == "mean" else total**0.5
    order = mask.cumsum(-1)
    if mode == "weightedmean":
        return mask * order, (mask * order).sum(-1)[..., None]
    return mask * (order == (1 if mode == "cls" else total)), 1


def _joined(vectors: Sequence[Any]) -> Any:
    if isinstance(vectors[0], np.ndarray):
        return np.concatenate(vectors, -1)
    import torch

    return torch.cat(list(vectors), -1)


@dataclass(frozen=True)
class _Module:
    """One entry of ``modules.json``."""

    kind: str | None  # the class of sentence-transformers; None for somebody's own
    place: str | None  # its folder in the model's, empty for that itself; None for one elsewhere

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Module:
        """Reads an entry."""
        kind, place = str(entry.get("type")), entry.get("path")
        plain = isinstance(place, str) and place != ".." and Path(place).name == place
        own = kind.rpartition(".")[2] if kind.startswith(_LIBRARY) else None
        return cls(own, str(place) if plain else None)

    def files(self, folder: Path) -> list[str] | None:
        """Those that are taken along; None where it can't be."""
        if self.kind not in _NEEDED or self.place is None:
            return None
        # A Transformer in a folder below is not what was exported.
        if bool(self.place) == (self.kind == "Transformer"):
            return None
        needed = [f"{self.place}/{item}" for item in _NEEDED[self.kind]]
        missing = [folder / file for file in needed if not _is_file(folder / file)]
        if missing and self.kind == "Pooling":
            raise _broken(f"{missing[0]} is not there, but {MODULES} lists that pooling.")
        also = f"{self.place}/{_CONFIG}"
        has_more = self.kind == "Normalize" and _is_file(folder / also)
        return None if missing else [*needed, *([also] if has_more else [])]


def sentence_files(folder: Path) -> list[str]:
    """The files that make a model's folder one of sentence-transformers, relative to it.

    Empty where it is none, or where it needs more than configs and safetensors: modules of
    somebody's own code, pickled weights, a Transformer in a folder below.
    """
    try:
        modules = _modules(folder)
    except ModelSourceError:
        return []
    names = [name for name in _BESIDE if (folder / name).is_file()]
    for module in modules:
        files = module.files(folder)
        if files is None:
            return []
        names += files
    return names if modules else []


def read_pooling(folder: Path) -> Pooling:
    """How a folder's model pools."""
    pooling, error = _known_pooling(folder)
    if error is not None:
        raise error
    return pooling


def pooling_of(folder: Path) -> Pooling:
    """How a folder's model pools; :data:`MEAN` where it doesn't say, or says what isn't known.

    Modules other than Pooling, Dense and Normalize are left out: :func:`why_not_whole` tells of
    them.
    """
    return _known_pooling(folder)[0]


def why_not_whole(folder: Path) -> str:
    """What keeps :func:`pooling_of` from all that the folder asks for; empty where nothing does."""
    error = _known_pooling(folder)[1]
    return "" if error is None or error.code == "no-modules" else error.message


def _known_pooling(folder: Path) -> tuple[Pooling, ModelSourceError | None]:
    """The first pooling that is listed, as far as it is known, and why it isn't to the letter."""
    pooling, errors = MEAN, list[ModelSourceError]()
    try:
        modules = _modules(folder)
        if not modules:
            raise ModelSourceError(
                f"{folder} has no {MODULES}, so it doesn't say how its token states are pooled.",
                "Give a folder of sentence-transformers, all of it: for a model from the Hub the "
                "path of a downloaded folder.",
                code="no-modules",
            )
        kinds = [str(module.kind) for module in modules]
        if not _ORDER.fullmatch(" ".join(kinds)):
            errors.append(
                _other(
                    f"{folder / MODULES} lists {', '.join(kinds)}; pooling needs a Transformer, "
                    "one Pooling, and then at most Dense modules and a Normalize."
                )
            )
        place = next((module.place for module in modules if module.kind == "Pooling"), None)
        if not place:
            raise _broken(f"{folder / MODULES} doesn't name the folder of its pooling in it.")
        config = folder / place / _CONFIG
        if not _is_file(config):
            raise _broken(f"{config} is not there, but {MODULES} lists that pooling.")
        settings = _object(config, folder)
        pooling = Pooling(_modes(settings, config), "Normalize" in kinds)
        if settings.get("include_prompt") is False:
            text = "leaves a prompt's tokens out; where they end is not among a graph's inputs"
            errors.append(_other(f"{config} {text}."))
        products = [_dense(folder, module) for module in modules if module.kind == "Dense"]
        pooling = replace(pooling, dense=tuple(products))
    except ModelSourceError as failed:
        errors.append(failed)
    return pooling, next(iter(errors), None)


def pools(folder: Path) -> bool:
    """Whether a folder lists a pooling: its model answers with token states, without any head."""
    try:
        return any(module.kind == "Pooling" for module in _modules(folder))
    except ModelSourceError:
        return False


def pooling_of_model(model: Any) -> Pooling:
    """How a loaded model of transformers pools, as the folder says that it was loaded from."""
    name = str(getattr(model.config, "name_or_path", ""))
    return pooling_of(Path(name)) if name else MEAN


@dataclass(frozen=True)
class Prompts:
    """What stands before a model's texts."""

    by_name: Mapping[str, str]
    default: str = ""

    def of(self, *names: str) -> str:
        """The first of these that is there, else the default."""
        return next((self.by_name[name] for name in names if name in self.by_name), self.default)


def read_prompts(folder: Path) -> Prompts:
    """A folder's prompts; none where it has none."""
    path = folder / PROMPTS
    result = _object(path, folder)
    listed = result.get("prompts")
    listed = listed if isinstance(listed, dict) else {}
    known = {str(name): text for name, text in listed.items() if isinstance(text, str)}
    default = result.get("default_prompt_name")
    if default is not None and str(default) not in known:
        raise _broken(f"{path} has no prompt {default!r}, its default, but {[*known]}.")
    return Prompts(known, known.get(str(default), ""))


def longest_text(folder: Path) -> int | None:
    """The tokens at which sentence-transformers cuts a text; None where the folder doesn't say."""
    longest = _object(folder / _SETTINGS, folder).get("max_seq_length")
    return longest if type(longest) is int and longest > 0 else None  # true is an int, too


def _modules(folder: Path) -> list[_Module]:
    """What ``modules.json`` lists; empty where there is none."""
    path = folder / MODULES
    if not path.is_file():
        return []
    entries = _read(path, folder)
    if not isinstance(entries, list) or not {*map(type, entries)} == {dict}:
        raise _broken(f"{path} holds no list of modules.")
    return [_Module.of(entry) for entry in entries]


def _object(path: Path, folder: Path) -> dict[str, Any]:
    """What a file holds; empty where it isn't there, or holds no object."""
    result = _read(path, folder) if _is_file(path) else {}
    return result if isinstance(result, dict) else {}


def _read(path: Path, folder: Path) -> Any:
    try:
        return read_json(path, folder)
    except ValueError as error:
        raise _broken(f"{path} can't be read as JSON: {error}.") from error


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # Path's raises for a name that is too long


def _dense(folder: Path, module: _Module) -> Dense:
    config, file = (folder / (module.place or "-") / name for name in _NEEDED["Dense"])
    for path in (config, file):
        if not module.place or not _is_file(path):
            text = "is not there, or pickled"
            raise _broken(f"{path} {text}, but {folder / MODULES} lists that Dense.")
    named = str(_object(config, folder).get("activation_function", "Tanh")).rpartition(".")[2]
    if named not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise _other(f"{config} has the activation {named!r}; known are {known}.")
    check_file(file)
    dense = Dense(str(file), _ACTIVATIONS[named], sha256_file(file))
    _ = dense.layer
    return dense


def _modes(settings: Mapping[str, Any], config: Path) -> tuple[PoolingMode, ...]:
    mode = settings.get("pooling_mode")
    if mode is None:
        named: list[Any] = [name for key, name in _SWITCHES.items() if settings.get(key) is True]
    else:
        named = mode if isinstance(mode, list) else [mode]
    if unknown := [item for item in named if item not in MODES]:
        text = f"{config} names the pooling {unknown[0]!r}"
        raise _other(f"{text}; known are {', '.join(MODES)}.")
    return tuple(named) or ("mean",)


_NAMES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.spm", "spiece.model",
)  # fmt: skip
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "normalizer.json")
_TEXTS = {".json", ".jinja", ".model", ".txt", ".spm", ".vocab", ".bpe", ".tiktoken"}


def stage_companions(source: Path, output: Path, stage: Path) -> list[tuple[Path, Path]]:
    """Puts copies of what a model ships with into a staging folder.

    Nothing that stands in the output's folder already is replaced, and nothing is copied where the
    source and the output share a folder.
    """
    folder, final = source.parent, output.parent
    if real(folder) == real(final):
        return []
    names = [path.name for path in sorted(folder.iterdir()) if _belongs(path)]
    names += sentence_files(folder)
    tops = dict.fromkeys(Path(name).parts[0] for name in names)
    wanted = [top for top in tops if not (final / top).exists()]
    _copy(folder, [name for name in names if Path(name).parts[0] in wanted], stage)
    return [(stage / top, final / top) for top in wanted]


def copy_settings(source: Path, folder: Path) -> None:
    """Copies into a staged folder what says how inputs become numbers, and answers vectors."""
    _copy(source, [*_processors(source), *sentence_files(source)], folder)


def _processors(folder: Path) -> list[str]:
    return [name for name in _PROCESSORS if (folder / name).is_file()]


def settings_hashes(folder: Path, *, whole: bool = False) -> dict[str, str]:
    """The SHA-256 of what says how inputs become numbers, and answers vectors, by its name.

    ``whole``: of all that a model ships with, such as rules of generating.
    """
    names = _processors(folder)
    if whole:
        names = sorted(path.name for path in folder.iterdir() if _belongs(path))
    with contextlib.suppress(ModelSourceError):  # told where vectors are made
        names += sentence_files(folder)
    for name in names:
        check_file(folder / name, folder, limit=TABLE_BYTES)
    return {name: sha256_file(folder / name) for name in names}


def _belongs(path: Path) -> bool:
    named = any(fnmatch(path.name, pattern) for pattern in _NAMES)
    return named and path.suffix in _TEXTS and not path.is_dir()


def _copy(folder: Path, names: list[str], target: Path) -> None:
    for name in names:
        check_file(folder / name, folder, limit=TABLE_BYTES)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, target / name, folder)
