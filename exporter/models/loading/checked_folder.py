"""A model's folder, looked at before any library sees it.

Every file that a library could open by itself passes the door (:mod:`graph_passes.files.reading`);
what the model says of itself is read once and walked. Nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ModelSourceError, UnsafeModelError, first_line
from exporter.models.anatomy.families import REVIEWED
from exporter.models.loading import config_walk
from graph_passes.files.reading import (
    CONFIG_BYTES,
    TABLE_BYTES,
    check_file,
    check_folder,
    read_json,
)

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
    """What a model may do that others may not: off by default, set by the caller, never by a file.

    Attributes:
        trust_remote_code: Bring Python code that runs here.
        allow_pickle: Bring its weights as pickles.
        allow_any_model_type: Be of a type whose code in transformers was not looked at.
    """

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
            _walk(config if path.name == CONFIG else read_object(path), path, dangers)
    brings_its_own = dangers.trust_remote_code and "auto_map" in config
    if not (dangers.allow_any_model_type or brings_its_own):
        config_walk.refuse_types(config, folder / CONFIG, REVIEWED)
    config_walk.refuse_words_for_numbers(config, folder / CONFIG)
    _check_weights_name(config, folder / CONFIG)
    return config


def _walk(content: Any, path: Path, dangers: Dangers) -> None:
    config_walk.refuse_endless(content, path)
    config_walk.refuse_dangerous_entries(content, path)
    if path.name in _TOKENIZER_CONFIGS:
        config_walk.refuse_files_elsewhere(content, path)
    if dangers.trust_remote_code:
        config_walk.refuse_foreign_code(content, path)


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
    found: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        if path.exists():
            told = path.stat()
            found[str(path)] = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)
    return found


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
    found = []
    for place in (folder, *(folder / name for name in _FOLDERS)):
        if place.is_dir():
            found += [path for path in place.iterdir() if not path.is_dir()]
    return sorted(path for path in found if path.suffix != _CARD)


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
