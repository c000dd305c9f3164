"""What makes a model's folder one of sentence-transformers: its modules, pooling and prompts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from exporter.errors import ModelSourceError, first_line
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


def read_dense(folder: Path, config: Mapping[str, Any]) -> Dense:
    """A module Dense."""
    named = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if named not in _ACTIVATIONS:
        raise ModelSourceError(
            f"{folder} has the activation {named!r}; known are {', '.join(_ACTIVATIONS)}.",
            "Let sentence-transformers apply this module.",
            code="unknown-activation",
        )
    file = folder / WEIGHTS
    check_file(file)
    if not file.is_file():
        raise ModelSourceError(
            f"{file} is not there, but modules.json lists that module.",
            "Fetch the whole folder; pickled weights (pytorch_model.bin) are not read.",
            code="dense-missing",
        )
    dense = Dense(str(file), _ACTIVATIONS[named], sha256_file(file))
    _ = dense.layer
    return dense


@cache
def _layer(file: str, activation: Activation, _sha256: str) -> DenseLayer:
    try:
        numbers = load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, first_line(error)) from error
    weight, bias = numbers.get("linear.weight"), numbers.get("linear.bias")
    shapes = [None if array is None else array.shape for array in (weight, bias)]
    if weight is None or weight.ndim != 2 or shapes[1] not in (None, weight.shape[:1]):
        raise _unreadable(file, f"linear.weight and linear.bias have the shapes {shapes}")
    return DenseLayer(
        weight.astype(np.float32), None if bias is None else bias.astype(np.float32), activation
    )


def _unreadable(file: str, why: str) -> ModelSourceError:
    return ModelSourceError(
        f"{file} holds no product of vectors: {why}.",
        "Fetch the model again.",
        code="dense-unreadable",
    )


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
        joined = result[0] if len(result) == 1 else _joined(result)
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
        files = _module_files(folder, module)
        if files is None:
            return []
        names += files
    return names if modules else []


def read_pooling(folder: Path) -> Pooling:
    """How a folder's model pools."""
    modules = _modules(folder)
    if not modules:
        raise ModelSourceError(
            f"{folder} has no {MODULES}, so it doesn't say how its token states are pooled.",
            "Give a folder of sentence-transformers, all of it: for a model from the Hub the path "
            "of a downloaded folder.",
            code="no-modules",
        )
    kinds = [_kind(module) for module in modules]
    first, last = kinds[:2], kinds[-1:] if "Normalize" in kinds else []
    between = kinds[2 : len(kinds) - len(last)]
    if (
        first != ["Transformer", "Pooling"]
        or last not in ([], ["Normalize"])
        or set(between) - {"Dense"}
    ):
        raise ModelSourceError(
            f"{folder / MODULES} lists {', '.join(map(str, kinds))}; pooling needs a Transformer, "
            "one Pooling, and then at most Dense modules and a Normalize.",
            "Let sentence-transformers apply the modules behind the model.",
            code="other-modules",
        )
    return _listed_pooling(folder, modules, whole=True)


def pooling_of(folder: Path) -> Pooling:
    """How a folder's model pools; :data:`MEAN` where it doesn't say, or says what isn't known.

    Modules other than Pooling, Dense and Normalize are left out: :func:`why_not_whole` tells of
    them.
    """
    try:
        return _listed_pooling(folder, _modules(folder), whole=False)
    except ModelSourceError:
        return MEAN


def why_not_whole(folder: Path) -> str:
    """What keeps :func:`pooling_of` from all that the folder asks for; empty where nothing does."""
    try:
        read_pooling(folder)
    except ModelSourceError as error:
        return "" if error.code == "no-modules" else error.message
    return ""


def pools(folder: Path) -> bool:
    """Whether a folder lists a pooling: its model answers with token states, without any head."""
    try:
        return "Pooling" in map(_kind, _modules(folder))
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
    result = _read(path, folder) if path.is_file() else {}
    result = result if isinstance(result, dict) else {}
    listed = result.get("prompts")
    known = {
        str(name): text
        for name, text in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(text, str)
    }
    default = result.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in known):
        raise ModelSourceError(
            f"{path} has no prompt {default!r}, its default; it has {', '.join(known) or 'none'}.",
            "Correct default_prompt_name.",
            code="prompt-missing",
        )
    return Prompts(known, known.get(str(default), ""))


def longest_text(folder: Path) -> int | None:
    """The tokens at which sentence-transformers cuts a text; None where the folder doesn't say."""
    path = folder / _SETTINGS
    result = _read(path, folder) if path.is_file() else {}
    longest = result.get("max_seq_length") if isinstance(result, dict) else None
    return longest if type(longest) is int and longest > 0 else None  # true is an int, too


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    """What ``modules.json`` lists; empty where there is none."""
    if not (folder / MODULES).is_file():
        return []
    results = _read(folder / MODULES, folder)
    if (
        not isinstance(results, list)
        or not results
        or not all(isinstance(result, dict) for result in results)
    ):
        raise ModelSourceError(
            f"{folder / MODULES} holds no list of modules.",
            "Fetch the model again.",
            code="modules-unreadable",
        )
    return results


def _read(path: Path, folder: Path) -> Any:
    try:
        return read_json(path, folder)
    except ValueError as error:
        raise ModelSourceError(
            f"{path} can't be read as JSON: {error}.",
            "Fetch the model again.",
            code="modules-unreadable",
        ) from error


def _kind(module: Mapping[str, Any]) -> str | None:
    """The class of sentence-transformers; None for somebody's own."""
    kind = str(module.get("type"))
    return kind.rpartition(".")[2] if kind.startswith(_LIBRARY) else None


def _place(module: Mapping[str, Any]) -> str | None:
    """The folder of a module in the model's, empty for that itself; None for one elsewhere."""
    place = module.get("path")
    plain = isinstance(place, str) and place != ".." and Path(place).name == place
    return str(place) if plain else None


def _module_files(folder: Path, module: Mapping[str, Any]) -> list[str] | None:
    """Those of one module; None where it can't be taken along."""
    kind, place = _kind(module), _place(module)
    if kind not in _NEEDED or place is None:
        return None
    if bool(place) == (kind == "Transformer"):  # a model in a folder below is not what was exported
        return None
    if kind == "Pooling" and not _is_file(folder / place / _CONFIG):
        raise _no_pooling(folder / place / _CONFIG)
    needed = [f"{place}/{item}" for item in _NEEDED[kind]]
    if not all(_is_file(folder / file) for file in needed):
        return None
    also = [f"{place}/{_CONFIG}"] if kind == "Normalize" else []
    return needed + [file for file in also if _is_file(folder / file)]


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # Path's raises for a name that is too long


def _listed_pooling(folder: Path, modules: Sequence[Mapping[str, Any]], *, whole: bool) -> Pooling:
    """The first that is listed; ``whole`` refuses what can't be done to the letter."""
    kinds = [_kind(module) for module in modules]
    place = _place(modules[kinds.index("Pooling")]) if "Pooling" in kinds else None
    if not place:
        raise ModelSourceError(
            f"{folder / MODULES} doesn't name the folder of its pooling in it.",
            "Correct its path, such as 1_Pooling.",
            code="module-elsewhere",
        )
    modes = _modes(folder / place / _CONFIG, folder, whole=whole)
    try:
        dense = tuple(_dense(folder, item) for item in modules if _kind(item) == "Dense")
    except ModelSourceError:
        if whole:
            raise
        dense = ()
    return Pooling(modes, "Normalize" in kinds, dense)


def _dense(folder: Path, module: Mapping[str, Any]) -> Dense:
    place = _place(module)
    if not place or not _is_file(folder / place / _CONFIG):
        raise ModelSourceError(
            f"{folder / MODULES} lists a Dense whose {_CONFIG} is not there.",
            "Fetch the whole folder.",
            code="dense-missing",
        )
    result = _read(folder / place / _CONFIG, folder)
    return read_dense(folder / place, result if isinstance(result, dict) else {})


def _modes(config: Path, folder: Path, *, whole: bool) -> tuple[PoolingMode, ...]:
    if not _is_file(config):
        raise _no_pooling(config)
    result = _read(config, folder)
    result = result if isinstance(result, dict) else {}
    named = tuple(_named_modes(result)) or ("mean",)
    if unknown := [item for item in named if item not in MODES]:
        raise ModelSourceError(
            f"{config} names the pooling {unknown[0]!r}; known are {', '.join(MODES)}.",
            "Correct it, or let sentence-transformers pool.",
            code="unknown-pooling",
        )
    if whole and result.get("include_prompt") is False:
        raise ModelSourceError(
            f"{config} leaves a prompt's tokens out of the pooling; where they end is not among a "
            "graph's inputs.",
            "Let sentence-transformers pool.",
            code="prompt-left-out",
        )
    return named


def _named_modes(items: Mapping[str, Any]) -> Iterator[Any]:
    mode = items.get("pooling_mode")
    if mode is None:
        yield from (name for key, name in _SWITCHES.items() if items.get(key) is True)
    else:
        yield from mode if isinstance(mode, list) else [mode]


def _no_pooling(config: Path) -> ModelSourceError:
    return ModelSourceError(
        f"{config} is not there, but {MODULES} lists that pooling.",
        "Fetch the whole folder; for a model from the Hub give the path of a downloaded one.",
        code="pooling-missing",
    )


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


def copy_processor_files(source: Path, folder: Path) -> None:
    """Copies what says how a recording or an image becomes numbers into a staged folder."""
    _copy(source, [name for name in _PROCESSORS if (source / name).is_file()], folder)


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Copies what sentence-transformers reads of a model into a folder that the caller stages."""
    _copy(source, sentence_files(source), folder)


def settings_hashes(folder: Path, *, whole: bool = False) -> dict[str, str]:
    """The SHA-256 of what says how inputs become numbers, and answers vectors, by its name.

    ``whole``: of all that a model ships with, such as rules of generating.
    """
    names = [name for name in _PROCESSORS if (folder / name).is_file()]
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
