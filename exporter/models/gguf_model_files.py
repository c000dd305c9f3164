"""A model in one GGUF file, or in shards as llama.cpp's ``llama-gguf-split`` writes them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import GgufFileError
from exporter.files import sha256_files
from exporter.models.gguf_header import Entry, GgufFile, Tensor, broken, read_header
from exporter.models.graph_facts import GraphFacts
from exporter.models.model_folder import ModelFolder
from graph_passes.plan_record import PLAN_KEY
from graph_passes.types import MOST_LAYERS

ARCHITECTURE_KEY = "general.architecture"
GGUF_SUFFIX = ".gguf"
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_MOST_SHARDS = 99_999
_HINT = "Put all shards into one folder, under the names that they were written with."


@dataclass(frozen=True)
class GgufModel:
    """A model with its metadata, and its tensors in whichever file."""

    files: tuple[GgufFile, ...]

    @property
    def path(self) -> Path:
        """The first file, which has the metadata."""
        return self.files[0].path

    @property
    def entries(self) -> dict[str, Entry]:
        """The metadata."""
        return self.files[0].entries

    @property
    def tensors(self) -> list[Tensor]:
        """Those of all files."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's kind."""
        entry = self.entries.get(ARCHITECTURE_KEY)
        if entry is None or not entry.text:
            raise broken(self.path, f"it has no {ARCHITECTURE_KEY}", "entry-missing")
        return entry.text

    def entry(self, name: str) -> Entry | None:
        """The architecture's entry of this name, such as ``attention.head_count``."""
        return self.entries.get(f"{self.architecture}.{name}")

    def said(self, names: Sequence[str]) -> Entry | None:
        """The first of the architecture's entries that is there and isn't 0; None: none is."""
        result = map(self.entry, names)
        return next((entry for entry in result if entry is not None and entry.whole != 0), None)

    def whole(self, name: str) -> int:
        """The architecture's entry of this name as a whole number."""
        entry = self.entry(name)
        if entry is None or entry.whole is None:
            text = f"it has no whole number {self.architecture}.{name}"
            raise broken(self.path, text, "entry-missing")
        return entry.whole


def read_model(path: Path) -> GgufModel:
    """Reads the headers of a model's file, or of all its shards."""
    named = read_header(path)
    count = _whole(named, SPLIT_COUNT, 1)
    if count <= 1:
        return GgufModel((named,))
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count or count > _MOST_SHARDS:
        text = f"is one of {count} shards, but its name does not end in -00001-of-{count:05}.gguf"
        raise GgufFileError(f"{path} {text}.", _HINT, code="shard-missing")
    shards: list[GgufFile] = []
    names: set[str] = set()
    for number in range(count):
        place = shard_path(path.with_name(match["stem"] + ".gguf"), number, count)
        try:
            shard = named if place.name == path.name else read_header(place, place.parent)
        except FileNotFoundError as error:
            text = f"{path} is one of several shards, and {place} is missing."
            raise GgufFileError(text, _HINT, code="shard-missing") from error
        if (_whole(shard, SPLIT_NUMBER, -1), _whole(shard, SPLIT_COUNT, 1)) != (number, count):
            text = f"it is not shard {number} of {count} by its {SPLIT_NUMBER}, {SPLIT_COUNT}"
            raise broken(place, text, "shard-mismatch", _HINT)
        own = {tensor.name for tensor in shard.tensors}
        if names & own:
            text = f"{min(names & own)} is in another shard, too"
            raise broken(place, text, "tensor-twice", _HINT)
        names |= own
        shards.append(shard)
    wanted = _whole(named, SPLIT_TENSORS, len(names))
    if len(names) != wanted:
        text = f"its shards have {len(names)} tensors, not {wanted}"
        raise broken(path, text, "shard-mismatch", _HINT)
    return GgufModel(tuple(shards))


def shard_path(path: Path, number: int, count: int) -> Path:
    """Where a shard of a file lies; they are counted from 0, and in the names from 1."""
    return path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf")


def _whole(file: GgufFile, key: str, absent: int) -> int:
    entry = file.entries.get(key)
    number = absent if entry is None else entry.whole
    if number is None:
        raise broken(file.path, f"{key} is no whole number", "entry-missing")
    return number


BLOCK_COUNT = "block_count"
HIDDEN = "embedding_length"
HEADS, KV_HEADS, MLP_WIDTH = (
    "attention.head_count", "attention.head_count_kv", "feed_forward_length",
)  # fmt: skip
_MOST = 1 << 31


@dataclass(frozen=True)
class LayerSizes:
    """What a layer of a Llama consists of."""

    heads: int
    kv_heads: int
    width: int


def layers_of(model: GgufModel) -> int:
    """How many layers a file has."""
    count = model.whole(BLOCK_COUNT)
    if not 0 < count <= MOST_LAYERS:
        entry = f"{model.architecture}.{BLOCK_COUNT}"
        text = f"{entry} is {count}, and no model has more than {MOST_LAYERS} layers"
        raise broken(model.path, text, "layer-count")
    return count


def sizes_of(model: GgufModel) -> list[LayerSizes]:
    """What each layer of the file consists of."""
    heads = _of_layers(model, HEADS)
    kv_heads = heads if model.entry(KV_HEADS) is None else _of_layers(model, KV_HEADS)
    widths = _of_layers(model, MLP_WIDTH)
    return [LayerSizes(*pair) for pair in zip(heads, kv_heads, widths, strict=True)]


def _of_layers(model: GgufModel, name: str) -> list[int]:
    """One whole number for each layer: an array's, or the same for all."""
    count, entry = layers_of(model), model.entry(name)
    if entry is None or entry.length is None:
        numbers = [model.whole(name)] * count
    else:  # an array of another length may be a huge one
        numbers = (entry.wholes or []) if entry.length == count else []
    if len(numbers) != count or not 0 <= min(numbers) <= max(numbers) < _MOST:
        text = f"{model.architecture}.{name} is no whole number below {_MOST}, nor one a layer"
        raise broken(model.path, text, "wrong-array")
    return numbers


CACHE_BYTES = 2
"""Of a key's or value's number: llama.cpp keeps float16, unless it is told otherwise."""
_WIDTHS = ("attention.key_length", "attention.value_length")
_TABLE = "token_embd.weight"
_CONFIG = {
    "max_position_embeddings": "{}.context_length",
    "num_hidden_layers": "{}.block_count",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
}
"""What ``config.json`` calls a whole number, and what a GGUF file does."""
_ENDS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
"""Tokens that end a text, a turn and a message: llama.cpp stops at each."""


def gguf_folder(path: Path) -> ModelFolder:
    """A GGUF file as a model's files: the first of its shards, and the tokenizer.

    That is ``tokenizer.json`` where it stands beside the file, else the file itself.
    """
    model = _read(path)
    folder = ModelFolder.beside(model.path, model.path.parent, gguf_config(model))
    return folder if folder.tokenizer else ModelFolder(model.path, model.path, folder.config)


def gguf_config(model: GgufModel) -> dict[str, Any]:
    """The metadata in the words of ``config.json``, as far as they are asked for."""
    numbers = {key: _facts_whole(model, name) for key, name in _CONFIG.items()}
    vocabulary = _vocabulary(model)
    ends = [end for name in _ENDS if (end := _facts_whole(model, name)) is not None]
    known = {**numbers, "eos_token_id": ends or None, "vocab_size": vocabulary}
    return {"architectures": [f"{model.architecture}ForCausalLM"]} | {
        key: value for key, value in known.items() if value is not None
    }


def gguf_facts(path: Path) -> GraphFacts:
    """Sizes of a GGUF file; its tensors are hashed as bytes and never loaded."""
    model = _read(path)
    files = [file.path for file in model.files]
    plan = model.entries.get(PLAN_KEY)
    return GraphFacts(
        file_bytes=sum(file.nbytes for file in model.files),
        sha256=sha256_files(files, model.path.parent),
        parameters=sum(math.prod(tensor.shape) for tensor in model.tensors),
        nodes=0,
        precision=_precision(model),
        kv_cache_bytes_per_token=_cache_bytes(model),
        vocabulary=_vocabulary(model),
        metadata={PLAN_KEY: plan.text} if plan is not None and plan.text else {},
    )


def _read(path: Path) -> GgufModel:
    if path.is_dir():
        paths = sorted(path.glob("*.gguf"))
        path = paths[0] if len(paths) == 1 else path
    return read_model(path)


def _facts_whole(model: GgufModel, name: str) -> int | None:
    entry: Entry | None = model.entries.get(name.format(model.architecture))
    return None if entry is None else entry.whole


def _vocabulary(model: GgufModel) -> int | None:
    return next((t.shape[-1] for t in model.tensors if t.name == _TABLE), None)


def _precision(model: GgufModel) -> str:
    """The block type of most bytes, in llama.cpp's words: its caches are float16 with any."""
    held: Counter[str] = Counter()
    for tensor in model.tensors:
        held[tensor.kind_name] += tensor.nbytes
    return held.most_common(1)[0][0].lower() if held else "none"


def _cache_bytes(model: GgufModel) -> int:
    """Of one token of one sequence; 0 where the file has no heads, as of a state space."""
    try:
        sizes = sizes_of(model)
        usual = model.whole(HIDDEN) // max(sizes[0].heads, 1)
    except GgufFileError:
        return 0
    widths = [_facts_whole(model, f"{{}}.{name}") or usual for name in _WIDTHS]
    return CACHE_BYTES * sum(size.kv_heads for size in sizes) * sum(widths)
