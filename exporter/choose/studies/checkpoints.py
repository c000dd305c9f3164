"""The checkpoints of a training: which folders they are, in which order, and of one shape."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exporter.choose.studies.naming import step_of
from exporter.errors import ModelSourceError, UsageError
from exporter.files import sha256_bytes
from exporter.models.loading.checked_folder import read_object
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import TABLE_BYTES

_CONFIG = "config.json"
_MAGIC = re.compile(r"[*?[]")
_SHAPE = (
    "model_type", "architectures", "num_hidden_layers", "n_layer", "n_layers", "num_layers",
    "hidden_size", "n_embd", "d_model", "dim", "intermediate_size", "ffn_dim", "n_inner",
    "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_experts", "num_local_experts",
)  # fmt: skip
_SPLITS = ("model", "normalizer", "pre_tokenizer")
"""What in a tokenizer.json decides how a text is split."""


def find_checkpoints(named: Sequence[str], progress: Progress = QUIET) -> list[str]:
    """The checkpoints that a user named, in the order of the training.

    A pattern (``run/checkpoint-*``) and a folder of checkpoints are put in the order of their
    steps. What is named one by one stays in its order, unless that is the alphabet's, as a shell
    has it from a pattern: ``checkpoint-1000`` would then come before ``checkpoint-200``.

    Args:
        named: Folders of models, folders of such folders, patterns, GGUF files or hub ids.
        progress: Told where the order is another than the given one.

    Raises:
        ModelSourceError: A pattern or a folder holds no checkpoint.
        UsageError: Fewer than two, or one is named twice.
    """
    alone = len(named) == 1
    found = [source for name in named for source in _expanded(name, alone, progress)]
    if not alone and found == sorted(found) and len(found) == len(named):
        found = _by_step(found)
        if found != sorted(found):
            progress.say("checkpoints: sorted by their steps, not alphabetically")
    _refuse_few(found, named)
    return found


def _expanded(name: str, alone: bool, progress: Progress) -> list[str]:
    path = Path(name).expanduser()
    if not path.exists() and _MAGIC.search(name):
        matches = [str(each) for each in _matching(path) if _is_checkpoint(each)]
        if not matches:
            raise ModelSourceError(
                f"Nothing that matches {name} is a checkpoint.", _HINT, code="pattern-without-match"
            )
        return _by_step(matches)
    if not path.is_dir():
        return [name]
    inside = [str(each) for each in path.iterdir() if _is_checkpoint(each)]
    whole = _is_checkpoint(path)
    if whole and not (alone and inside):
        return [name]
    if not inside:
        raise ModelSourceError(f"{path} holds no checkpoint.", _HINT, code="no-checkpoint")
    if whole:
        progress.say(f"checkpoints: those in {path}, without the model next to them")
    return _by_step(inside)


def _matching(pattern: Path) -> Iterator[Path]:
    """What a pattern matches, from the folder on that is no pattern."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    return Path(*parts[:first]).glob(str(Path(*parts[first:])))


_HINT = f"A checkpoint is a folder with a {_CONFIG}, as save_pretrained writes it, or a GGUF file."


def _is_checkpoint(path: Path) -> bool:
    return (path / _CONFIG).is_file() or (path.is_file() and path.suffix == ".gguf")


def _by_step(sources: Sequence[str]) -> list[str]:
    """By their steps where all have one, else by the alphabet."""
    steps = {source: step_of(source) for source in sources}
    ranks = {source: step for source, step in steps.items() if step is not None}
    if len(ranks) < len(sources):
        return sorted(sources)
    return sorted(sources, key=lambda source: (ranks[source], source))


def _refuse_few(found: Sequence[str], named: Sequence[str]) -> None:
    places: dict[Path, str] = {}
    for source in found:
        path = Path(source).expanduser()
        if path.exists() and (other := places.setdefault(path.resolve(), source)) is not source:
            raise UsageError(
                f"{source} and {other} are the same checkpoint.",
                "Name it once.",
                code="named-twice",
            )
    if len(found) < 2:
        raise UsageError(
            f"{' '.join(named)} is one checkpoint; a series has two or more.",
            "Name several, a folder that holds them, or a pattern such as 'run/checkpoint-*'.",
            code="one-checkpoint",
        )


def check_series(sources: Sequence[str]) -> None:
    """Refuses checkpoints that can't be one training's, before anything is loaded.

    Only folders here are looked at; what a hub id brings shows when it is scored.

    Raises:
        ModelSourceError: A config can't be read; shapes differ; texts are split into other tokens.
    """
    folders = [path for source in sources if (path := Path(source).expanduser()).is_dir()]
    shapes = {folder: _shape(folder) for folder in folders}
    splits = {folder: digest for folder in folders if (digest := _split_digest(folder))}
    for first, second in itertools.pairwise(folders):
        for key in _SHAPE:
            one, other = shapes[first].get(key), shapes[second].get(key)
            if one != other:
                raise ModelSourceError(
                    f"{first} and {second} are models of different shapes: {key} is {one} in the "
                    f"first and {other} in the second.",
                    "A series is of one training; leave the other model out.",
                    code="other-shapes",
                )
    for first, second in itertools.pairwise(splits):
        if splits[first] != splits[second]:
            raise ModelSourceError(
                f"The tokenizers of {first} and {second} split text into different tokens, so "
                "the models would not read the same tokens.",
                "Give all checkpoints one tokenizer, or leave the odd one out.",
                code="other-tokens",
            )


def _shape(folder: Path) -> dict[str, Any]:
    config = read_object(folder / _CONFIG)
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return {key: inner.get(key, config.get(key)) for key in _SHAPE}


def _split_digest(folder: Path) -> str | None:
    """None where there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    told = read_object(path, TABLE_BYTES)
    return sha256_bytes(json.dumps([told.get(key) for key in _SPLITS], sort_keys=True).encode())
