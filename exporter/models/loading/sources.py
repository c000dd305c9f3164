"""Where a model's name leads: a folder, a GGUF file, or a hub id's files in their usual cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exporter.errors import ModelSourceError, UnknownArchitectureError, first_line
from exporter.files import sha256_file, sha256_files, telling_full_disk
from exporter.models.families import GENERATING, STACKS
from exporter.models.gguf_header import MAGIC
from exporter.models.gguf_model_files import layers_of, read_model
from exporter.models.loading.checked_folder import (
    CONFIG,
    Dangers,
    checked_config,
    quantization_in,
    read_object,
)
from exporter.models.loading.checkpoint_shards import read_header, read_index
from exporter.models.model_folder import names_image_classifier
from exporter.option_types import Dtype, OutputFolder
from exporter.optional import require
from exporter.options import Options, dataclass, only_with, option
from graph_passes.files.placing import finish_interrupted
from graph_passes.files.reading import opened

_HUB_ID = re.compile(r"(hf:[\w.-]+(/[\w.-]+)?|[\w][\w.-]*/[\w][\w.-]*)")
_TEXT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "*.model", "vocab.*")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
# Weights in folders of their own are other formats; templates are the one thing wanted from there.
_ELSEWHERE = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "*/*.py", "*/*.bin")
_CODE = ("*.py", "custom_generate/*.py")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def resolve_source(source: str, *, revision: str | None = None, **allowed: bool) -> Path:
    """Finds the folder or file behind a model's name; fetches a hub id into its usual cache."""
    path, dangers = Path(source).expanduser(), Dangers(**allowed)
    if path.parent.is_dir():
        finish_interrupted(path)
    if path.is_dir():
        _check_folder(path, dangers)
        return path
    if path.is_file():
        _check_gguf(path)
        return path
    if path.is_absolute() or _HUB_ID.fullmatch(source) is None or path.suffix in (".gguf", ".onnx"):
        raise ModelSourceError(
            f"{source} does not exist.",
            "Give a Hugging Face folder, a GGUF file or a hub id such as owner/name.",
            code="file-missing",
        )
    folder = _fetch(source, dangers, revision)
    _check_folder(folder, dangers)
    return folder


def source_sha256(source: str, *, revision: str | None = None, **allowed: bool) -> str:
    """The SHA-256 of what defines the model; needs no PyTorch.

    Of a GGUF file that is the file's; of a folder one over config, tokenizer, code and weight
    files. The arguments are :func:`resolve_source`'s, which decide what of a hub id is there.
    """
    return path_sha256(resolve_source(source, revision=revision, **allowed))


def encoder_decoder_config(
    source: str, *, revision: str | None = None, **allowed: bool
) -> dict[str, Any] | None:
    """The config of a model that has an encoder and a decoder; None for others. No PyTorch."""
    path = resolve_source(source, revision=revision, **allowed)
    if path.is_file():
        return None
    config = read_object(path / CONFIG)
    known = config.get("model_type") in STACKS
    if known and config.get("is_encoder_decoder", True):
        named = config.get("architectures")
        if not (isinstance(named, list) and any(str(name).endswith(GENERATING) for name in named)):
            raise UnknownArchitectureError(
                f"{source} is an encoder-decoder of the class {named}; those that generate text "
                "are taken.",
                f"Give one whose config names a class that ends with {' or '.join(GENERATING)}.",
                code="unknown-family",
            )
    return config if config.get("is_encoder_decoder", known) else None


def classifies_images(source: str, *, revision: str | None = None, **allowed: bool) -> bool:
    """Whether a model's config names a class that gives each image a class. No PyTorch."""
    path = resolve_source(source, revision=revision, **allowed)
    return path.is_dir() and names_image_classifier(read_object(path / CONFIG))


def _fetch(source: str, dangers: Dangers, revision: str | None) -> Path:
    hub = require("huggingface_hub", extra="torch")
    wanted = [*_TEXT_FILES, *SAFETENSORS]
    wanted += _PICKLES if dangers.allow_pickle else ()
    wanted += ["*.py"] if dangers.trust_remote_code else []
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
                code="no-model",
            ) from error
    return Path(folder)


def _check_folder(folder: Path, dangers: Dangers) -> None:
    """Refuses a folder that can't be loaded, before anything heavy is imported."""
    if not (folder / CONFIG).exists():
        names = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"Name the file itself: {folder / names[0]}" if names else "Is it a model's folder?"
        raise ModelSourceError(f"{folder} has no config.json.", hint, code="no-model")
    quantized = quantization_in(checked_config(folder, dangers))
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise ModelSourceError(
            f"{folder} holds weights quantized with {method}; "
            "scoring and export need floating-point weights.",
            "Give the model from before its quantization.",
            code="quantized",
        )
    if not _weights(folder, dangers.allow_pickle):
        pickled = matching(folder, _PICKLES)
        hint = "If you trust its origin: allow_pickle: true in a --config file." if pickled else ""
        held = f"only pickled weights ({pickled[0].name})" if pickled else "no weights"
        raise ModelSourceError(
            f"{folder} holds {held}; *.safetensors are wanted.", hint, code="no-model"
        )
    for index in matching(folder, ("*.safetensors.index.json", "*.bin.index.json")):
        read_index(index)  # every shard must be a file of the model's own folder
    for file in matching(folder, ("*.safetensors",)):
        read_header(file)  # a terabyte of nothing would be hashed for ever


def _check_gguf(path: Path) -> None:
    with opened(path, named=True) as file:
        magic = file.read(4)
    if magic == MAGIC:
        layers_of(read_model(path))  # transformers would make them one by one
        return
    hint = f"Give a Hugging Face folder ({path.parent}), a GGUF file or a hub id."
    if path.suffix == ".onnx":
        hint = "An ONNX file is pruned with `depthcut prune` and a plan."
    raise ModelSourceError(f"{path} is not a GGUF file.", hint, code="no-model")


def path_sha256(path: Path) -> str:
    """The same of what :func:`resolve_source` gave."""
    if path.is_file():
        return sha256_file(path)
    weights = _weights(path, allow_pickle=True)
    return sha256_files({*matching(path, (*_TEXT_FILES, *_CODE)), *weights}, path)


def _weights(folder: Path, allow_pickle: bool) -> list[Path]:
    return matching(folder, ("*.safetensors",)) or (
        matching(folder, ("pytorch_model*.bin",)) if allow_pickle else []
    )


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """A folder's files of such names, in order."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(paths)


LOADING = "How MODEL is loaded"


@dataclass(frozen=True)
class SourceOptions(Options):
    """How the PyTorch model may be loaded; all dangers are off by default."""

    section = LOADING
    dtype: Dtype = option("float32", "The weights' type.")
    revision: str | None = option(None, "Revision of a hub model.", metavar="NAME")
    trust_remote_code: bool = option(
        False, "Dangerous: run Python code that comes with the model.", rare=True
    )
    allow_pickle: bool = option(
        False, "Dangerous: load weights from pickle files (pytorch_model.bin).", config_only=True
    )
    allow_any_model_type: bool = option(
        False,
        "Dangerous: allow every model type of transformers, including those whose code was "
        "not reviewed for depthcut.",
        config_only=True,
    )

    @property
    def reading(self) -> dict[str, Any]:
        """What is read, and what it may do: all but the dtype."""
        return {name: value for name, value in vars(self).items() if name != "dtype"}


@dataclass(frozen=True)
class StreamOptions(Options):
    """Whether and how weights are read a layer at a time."""

    section = LOADING
    stream: bool = option(
        False, "Read the weights a layer at a time, for models larger than memory."
    )
    stream_dir: OutputFolder | None = option(
        None,
        "For --stream: folder for a file with the hidden states.",
        usual="in memory if they fit, otherwise in TMPDIR or /var/tmp",
        rare=True,
    )
    rules = (only_with("stream_dir", "stream"),)
