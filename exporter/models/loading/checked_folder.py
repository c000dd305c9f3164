"""A model's folder, looked at before any library sees it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ModelSourceError, UnsafeModelError, first_line
from exporter.models.families import REVIEWED
from graph_passes.files.reading import (
    CONFIG_BYTES,
    TABLE_BYTES,
    check_file,
    check_folder,
    read_json,
)
from graph_passes.types import MOST_LAYERS

_COPY = "If you trust the model, take that entry out of a copy of it."
_AGAIN = "Fetch the model again, or correct its config."
# transformers hands these on to functions that load a second model, run code or read another file.
_HANDED_ON = {
    "trust_remote_code": "lets code run that nobody here allowed",
    "backbone_kwargs": "goes to the loading of another model",
    "use_timm_backbone": "loads another model by its name",
    "use_pretrained_backbone": "loads another model by its name",
    "configuration_files": "names other configs, which are read in place of this one",
    "custom_generate": "names code for generating",
    "init_inputs": "gives a tokenizer's class arguments by their order, files among them",
    "gguf_file": "names a file to read in place of this one",
}
# A hub's kernel is named owner/name, and is code.
_PLAIN_NAME = re.compile(r"[\w|-]*")
# A module of the folder and a class; another repository's begins with its name and "--".
_OWN_CODE = re.compile(r"\w+(-\w+)*\.\w+")
_IMPLEMENTATION = "implementation"  # 4.57 keeps it in _attn_implementation_internal
# What a tokenizer opens; a bare name it looks for in the working directory, not in the folder.
_FILES = {"vocab", "merges", "source_spm", "target_spm"}
_FILE_ENDING = "_file"
_NEVER_OPENED = {"special_tokens_map_file", "added_tokens_file"}  # old versions noted their cache
_PROGRAMS = {"mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs"}

_NUMBER = re.compile(r"^(num|n)_|_(eps|epsilon|size|dim|dropout|theta|range)$")
_COUNTED = re.compile("^(?!.*_size).*(layer|block|expert|depth|stage)")
_MOST = 10_000
_MOST_ENTRIES = 1 << 16

_Entry = tuple[str, str, Any]


def refuse_entries(content: Any, path: Path, dangers: Dangers) -> None:
    """Refuses what makes transformers load, fetch or run something else, or never end."""
    for where, key, value in _entries(content):
        if why := _danger(key, value, path.name in _TOKENIZER_CONFIGS, dangers):
            raise UnsafeModelError(f"{path}: $.{where} {why}.", _COPY)
        most = MOST_LAYERS if key.endswith(("layer", "layers")) else _MOST
        many = isinstance(value, list) and len(value) > _MOST_ENTRIES
        if many or (isinstance(value, int) and value > most and _COUNTED.search(key)):
            raise UnsafeModelError(
                f"{path}: $.{where} is larger than {_MOST_ENTRIES if many else most}, which no "
                "model has.",
                _AGAIN,
            )
        # transformers 4.57 takes it, and fails when it runs.
        if path.name == CONFIG and isinstance(value, str) and _NUMBER.search(key):
            text = f"{path}: $.{where} is {value[:60]!r}, and no number."
            raise ModelSourceError(text, _AGAIN)


def _danger(key: str, value: Any, of_tokenizer: bool, dangers: Dangers) -> str:
    """Why an entry isn't taken; empty where it is."""
    if key in _HANDED_ON and value:
        return _HANDED_ON[key]
    if key == "backbone" and isinstance(value, str):
        return "loads another model by its name"
    if _IMPLEMENTATION in key and not all(map(_PLAIN_NAME.fullmatch, _texts(value))):
        return "names code that would be fetched and run"
    named = key in _FILES or (key.endswith(_FILE_ENDING) and key not in _NEVER_OPENED)
    named = (named and isinstance(value, str) and bool(value)) or (key in _PROGRAMS and bool(value))
    named |= key == "fast_tokenizer_files" and any(Path(n).name != n for n in _texts(value))
    if of_tokenizer and named:  # its files are found by their usual names
        return "names a file to open, which may lie anywhere"
    foreign = key == "auto_map" and not all(map(_OWN_CODE.fullmatch, _texts(value)))
    if dangers.trust_remote_code and foreign:
        return (
            "names code that is not the folder's own, which may change at any time and is not "
            "part of the model's hash"
        )
    return ""


def refuse_types(content: Any, path: Path, known: Collection[str]) -> None:
    """Refuses a model, or one inside it, of a type that is not known."""
    for where, key, name in _entries(content):
        if key != "model_type" or name is None or (isinstance(name, str) and name in known):
            continue
        hint = "Load it with --allow-any-model-type if you trust the model."
        if "auto_map" in content:
            hint = "It brings its own code; allow that with --trust-remote-code if you trust it."
        raise UnsafeModelError(
            f"{path}: $.{where} is {str(name)[:60]!r}, a model type whose code in transformers was "
            "not looked at for depthcut.",
            hint,
            code="unread-model-type",
        )


def quantization_in(content: Any) -> Any:
    """What a config says of how its weights, or those of a model inside it, are quantized."""
    values = (value for _, key, value in _entries(content) if key == "quantization_config")
    return next((value for value in values if value), None)


def _entries(content: Any, place: str = "") -> Iterator[_Entry]:
    """Every entry of every object: its place, its key and its value."""
    if isinstance(content, list):
        for number, part in enumerate(content):
            yield from _entries(part, f"{place}[{number}]")
    elif isinstance(content, dict):
        for key, value in content.items():
            where = f"{place}.{key}" if place else str(key)
            yield where, key, value
            yield from _entries(value, where)


def _texts(value: Any) -> Iterator[str]:
    """A text, or the texts in a list or object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


CONFIG = "config.json"
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_FURTHER_CONFIGS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", *_TOKENIZER_CONFIGS,
)  # fmt: skip
_ADAPTER = "adapter_config.json"
_GENERATE = "custom_generate"
_FOLDERS = ("additional_chat_templates", _GENERATE)
# Read as a whole, unlike weights.
_TEXTS = {".json", ".jinja", ".model", ".py", ".tiktoken", ".spm", ".bpe", ".vocab"}
_CARD = ".md"
_LISTS = {"vocab.txt", "merges.txt", "dict.txt"}  # other texts may be a training's


@dataclass(frozen=True)
class Dangers:
    """What a model may do that others may not: off by default, set by the caller alone."""

    trust_remote_code: bool = False
    allow_pickle: bool = False
    allow_any_model_type: bool = False


def checked_config(folder: Path, dangers: Dangers) -> dict[str, Any]:
    """Looks at a model's folder, and gives what its ``config.json`` says."""
    check_files(folder)
    if (folder / _ADAPTER).exists():
        raise UnsafeModelError(
            f"{folder} holds {_ADAPTER}: an adapter, which is loaded with the model that it names.",
            "Merge it into its model first, or take it out of a copy of the folder.",
        )
    # transformers 4.57 runs what is in there without asking.
    if not dangers.trust_remote_code and (folder / _GENERATE).exists():
        raise UnsafeModelError(
            f"{folder} holds {_GENERATE}: code for generating, which nobody here allowed.",
            "Allow it with --trust-remote-code if you trust the model, or take it out of a copy.",
        )
    config = read_object(folder / CONFIG)
    for path in (folder / CONFIG, *(folder / name for name in _FURTHER_CONFIGS)):
        if path.name == CONFIG or path.exists():
            content = config if path.name == CONFIG else read_object(path)
            refuse_entries(content, path, dangers)
    brings_its_own = dangers.trust_remote_code and "auto_map" in config
    if not (dangers.allow_any_model_type or brings_its_own):
        refuse_types(config, folder / CONFIG, REVIEWED)
    _check_weights_name(config, folder / CONFIG)
    return config


def _check_weights_name(config: dict[str, Any], path: Path) -> None:
    """A config may name its weights' file; transformers 4.57 takes any path for it."""
    name = config.get("transformers_weights")
    if name is not None and (not isinstance(name, str) or Path(name).name != name):
        raise UnsafeModelError(
            f"{path}: $.transformers_weights is {str(name)[:60]!r}, no name of a file in the "
            "model's folder.",
            "Name a file of the folder, or take the entry out of a copy.",
        )


def check_files(folder: Path) -> None:
    """Looks at every file that a library could open in a model's folder, without reading any."""
    for name in _FOLDERS:
        check_folder(folder / name, folder)
    for path in _files(folder):
        check_file(path, folder, limit=TABLE_BYTES if _is_text(path) else None)


def _is_text(path: Path) -> bool:
    return path.suffix in _TEXTS or path.stem == "vocab" or path.name in _LISTS


def files_as_they_are(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes of a folder's files when one is written or replaced, by their names."""
    numbers: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        if path.exists():
            status = path.stat()
            numbers[str(path)] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return numbers


def refuse_changed(folder: Path, before: dict[str, tuple[int, ...]]) -> None:
    """Refuses a folder that was written to while it was read."""
    now = files_as_they_are(folder)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        raise UnsafeModelError(
            f"{changed[0]} was changed while the model was loaded.",
            "Load it again once whatever writes there is done.",
            code="file-changed",
        )


def _files(folder: Path) -> list[Path]:
    """All files at the top and in folders that libraries look into, but for cards."""
    paths = []
    for place in (folder, *(folder / name for name in _FOLDERS)):
        if place.is_dir():
            paths += [path for path in place.iterdir() if not path.is_dir()]
    return sorted(path for path in paths if path.suffix != _CARD)


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object of a model's folder."""
    try:
        content = read_json(path, limit=limit)
    except (OSError, ValueError) as error:
        raise ModelSourceError(
            f"{path} can't be read: {first_line(error)}.", code="unreadable"
        ) from error
    if not isinstance(content, dict):
        raise ModelSourceError(f"{path} is not a JSON object.", code="not-an-object")
    return content
