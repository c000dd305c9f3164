"""From the name of a model to the model: a Hugging Face folder, a hub id, or a GGUF file.

Weights come from safetensors or GGUF. Nothing here reads a pickle or runs code from a model's
folder unless the caller allows it, and nothing but a hub id makes it use the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import ModelRef
from exporter.disk import telling_full_disk
from exporter.errors import (
    ModelSourceError,
    UnknownArchitectureError,
    first_line,
    pass_on_memory_error,
)
from exporter.files import sha256_file, sha256_files
from exporter.loading.auto_class import auto_class
from exporter.loading.checkpoint_shards import CheckpointShards, read_index
from exporter.loading.gguf_source import load_gguf
from exporter.loading.transformers_output import quiet_transformers
from exporter.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LoadedModel",
    "check_dtype",
    "load_folder",
    "load_model",
    "resolve_source",
    "source_sha256",
]

_HUB_ID = re.compile(r"(hf:[\w.-]+(/[\w.-]+)?|[\w][\w.-]*/[\w][\w.-]*)")
_TEXT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "*.model", "vocab.*")
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
# Weights in folders of their own are other formats; templates are the one thing wanted from there.
_ELSEWHERE = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "*/*.py", "*/*.bin")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
DTYPES = ("float32", "float16", "bfloat16")
"""What a model's weights may become when it is loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored or exported.

    Attributes:
        model: In eval mode, without gradients, its weights of the asked dtype; on the CPU unless
            a device map spread it.
        tokenizer: None for a model that ships none.
        ref: What the stages' files say about the model.
        path: The local folder, or the GGUF file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    ref: ModelRef
    path: Path


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    pruned: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> LoadedModel:
    """Loads a model as plain floating-point weights.

    Args:
        source: A folder, a GGUF file, or a hub id (``owner/name``, or ``hf:name``).
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        trust_remote_code: Lets the model's folder bring Python code that runs here.
        allow_pickle: Lets weights come from ``pytorch_model.bin`` when there are no safetensors.
        revision: A branch, tag or commit of a hub id.
        pruned: Takes checkpoints that :mod:`exporter.pruned_model` wrote, too. They can be run, but
            not be scored, healed or exported again.
        device_map: Spreads the model over devices as accelerate does, such as ``auto``.

    Raises:
        ModelSourceError: When the source is missing, incomplete or can't be read.
        UnknownArchitectureError: When transformers has no such model.
    """
    check_dtype(dtype)
    path = resolve_source(
        source, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, revision=revision
    )

    def load(config: Any) -> tuple[Any, dict[str, Any]]:
        model_class = auto_class(config, trust_remote_code=trust_remote_code, pruned=pruned)
        use_safetensors = bool(_matching(path, _SAFETENSORS)) or not allow_pickle
        if use_safetensors and not getattr(config, "transformers_weights", None):
            CheckpointShards.open(path)  # says which shard is at fault, which transformers doesn't
        model, info = model_class.from_pretrained(
            path,
            config=config,
            dtype=_torch_dtype(dtype),
            use_safetensors=use_safetensors,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **({} if device_map is None else {"device_map": device_map}),
        )
        return model, info

    if not path.is_file():
        return load_folder(source, path, load, trust_remote_code=trust_remote_code)
    if device_map is not None:
        raise ModelSourceError(f"{path} is one file, which is not spread over devices.")
    with quiet_transformers():
        model, info, tokenizer = load_gguf(path, _torch_dtype(dtype))
    return _loaded(source, path, model, info, tokenizer)


def load_folder(
    source: str,
    path: Path,
    load: Callable[[Any], tuple[PreTrainedModel, dict[str, Any]]],
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a model's folder with its tokenizer, however its weights come.

    Args:
        source: What the user named.
        path: The folder, as :func:`resolve_source` found it.
        load: From the config to the model and transformers' report of the load.
        trust_remote_code: As for :func:`load_model`.

    Raises:
        ModelSourceError: When weights are missing, or anything can't be read.
        UnknownArchitectureError: When transformers has no such model.
    """
    transformers = require("transformers", extra="torch")
    _refuse_unknown(_read_json(path / "config.json"), path, trust_remote_code)
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code
            )
            model, info = load(config)
        except ModelSourceError:
            raise
        # From a cut safetensors file to a config that contradicts the weights: many classes.
        except Exception as error:
            pass_on_memory_error(error)
            raise ModelSourceError(f"{path} can't be loaded: {first_line(error)}.") from error
        tokenizer = _load_tokenizer(path, trust_remote_code)
    return _loaded(source, path, model, info, tokenizer)


def _loaded(
    source: str, path: Path, model: Any, info: dict[str, Any], tokenizer: Any
) -> LoadedModel:
    _refuse_missing(info, path)
    model.eval().requires_grad_(False)
    ref = ModelRef(
        source=source,
        architecture=type(model).__name__,
        num_layers=_num_layers(model.config, path),
        sha256=_path_sha256(path),
    )
    return LoadedModel(model, tokenizer, ref, path)


def check_dtype(dtype: str) -> None:
    """Refuses what weights can't become.

    Raises:
        ModelSourceError: It is none of ``float32``, ``float16`` and ``bfloat16``.
    """
    if dtype not in DTYPES:
        raise ModelSourceError(f"The dtype {dtype} is not known.", f"Use {' or '.join(DTYPES)}.")


def resolve_source(
    source: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> Path:
    """Finds the folder or file behind a model's name; fetches a hub id into its usual cache.

    Raises:
        ModelSourceError: When there is nothing there that could be loaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path, allow_pickle)
        return path
    if path.is_file():
        _check_gguf(path)
        return path
    if path.is_absolute() or _HUB_ID.fullmatch(source) is None or path.suffix in (".gguf", ".onnx"):
        raise ModelSourceError(
            f"{source} does not exist.",
            "Give a Hugging Face folder, a GGUF file or a hub id such as owner/name.",
        )
    folder = _fetch(source, trust_remote_code, allow_pickle, revision)
    _check_folder(folder, allow_pickle)
    return folder


def source_sha256(
    source: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> str:
    """The SHA-256 of what defines the model; needs no PyTorch.

    Of a GGUF file that is the file's; of a folder one over config, tokenizer, code and weight
    files. The arguments are :func:`load_model`'s: they decide which files of a hub id are there.

    Raises:
        ModelSourceError: When there is nothing there that could be loaded.
    """
    path = resolve_source(
        source, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, revision=revision
    )
    return _path_sha256(path)


def _fetch(source: str, trust_remote_code: bool, allow_pickle: bool, revision: str | None) -> Path:
    hub = require("huggingface_hub", extra="torch")
    wanted = [*_TEXT_FILES, *_SAFETENSORS]
    wanted += _PICKLES if allow_pickle else ()
    wanted += ["*.py"] if trust_remote_code else []
    constants = require("huggingface_hub.constants", extra="torch")  # the package may lack it yet
    with telling_full_disk(Path(constants.HF_HUB_CACHE)):
        try:
            folder = hub.snapshot_download(
                source.removeprefix("hf:"),
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=[*_ELSEWHERE, "consolidated*"],
            )
        except (OSError, ValueError) as error:
            raise ModelSourceError(
                f"{source} is no folder or file here, and the Hugging Face Hub does not give it: "
                f"{first_line(error)}.",
                "Check the name and the network, or give the path of a model on this machine.",
            ) from error
    return Path(folder)


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    """Refuses a folder that can't be loaded, before anything heavy is imported."""
    if not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"Name the file itself: {folder / found[0]}" if found else "Is it a model's folder?"
        raise ModelSourceError(f"{folder} has no config.json.", hint)
    config = _read_json(folder / "config.json")
    quantized = config.get("quantization_config")
    if quantized:
        raise ModelSourceError(
            f"{folder} holds weights quantized with {quantized.get('quant_method', '?')}; "
            "scoring and export need floating-point weights.",
            "Give the model from before its quantization.",
        )
    if not _weights(folder, allow_pickle):
        pickled = _matching(folder, _PICKLES)
        hint = "Allow the pickle explicitly if you trust its origin." if pickled else ""
        held = f"only pickled weights ({pickled[0].name})" if pickled else "no weights"
        raise ModelSourceError(f"{folder} holds {held}; *.safetensors are wanted.", hint)
    for index in _matching(folder, ("*.safetensors.index.json", "*.bin.index.json")):
        read_index(index)  # every shard must be a file of the model's own folder


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return
    hint = "Give a Hugging Face folder, a GGUF file or a hub id."
    if path.suffix == ".onnx":
        hint = "An ONNX file is pruned with `depthcut prune` and a plan."
    raise ModelSourceError(f"{path} is not a GGUF file.", hint)


def _refuse_unknown(config: dict[str, Any], folder: Path, trust_remote_code: bool) -> None:
    known = require("transformers.models.auto.configuration_auto", extra="torch").CONFIG_MAPPING
    model_type = config.get("model_type")
    if model_type in known or (trust_remote_code and "auto_map" in config):
        return
    hint = "Update transformers."
    if "auto_map" in config:
        hint = "It brings its own code; allow that with --trust-remote-code if you trust it."
    raise UnknownArchitectureError(
        f"{folder}: transformers does not know the model type {model_type!r}.", hint
    )


def _refuse_missing(info: dict[str, Any], path: Path) -> None:
    """Weights that aren't in the file would be random numbers."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelSourceError(
            f"{path} lacks {len(missing)} weights of the model that its config describes, "
            f"first {missing[0]}.",
            "Fetch the model again, or correct its config.",
        )


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    transformers = require("transformers", extra="torch")
    if not _matching(folder, _TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        pass_on_memory_error(error)
        # 4.57 does not know the class that 5 writes into tokenizer_config.json.
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        raise ModelSourceError(
            f"The tokenizer in {folder} can't be loaded: {first_line(error)}."
        ) from error


def _num_layers(config: Any, path: Path) -> int:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise UnknownArchitectureError(f"{path}: the config does not tell the number of layers.")
    return layers


def _path_sha256(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    weights = _weights(path, allow_pickle=True)
    return sha256_files({*_matching(path, (*_TEXT_FILES, "*.py")), *weights}, path)


def _weights(folder: Path, allow_pickle: bool) -> list[Path]:
    return _matching(folder, ("*.safetensors",)) or (
        _matching(folder, ("pytorch_model*.bin",)) if allow_pickle else []
    )


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} can't be read: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise ModelSourceError(f"{path} is not a JSON object.")
    return content


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
