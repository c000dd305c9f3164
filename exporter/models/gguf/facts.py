"""What a GGUF file tells of itself, in the words of graphs and Hugging Face configs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from exporter.errors import GgufFileError, SurgeryError
from exporter.files import sha256_files
from exporter.models.gguf.header import Entry
from exporter.models.gguf.layer_sizes import HIDDEN, sizes_of
from exporter.models.gguf.model_files import GgufModel, read_model
from exporter.models.graph_facts import GraphFacts
from exporter.models.model_folder import ModelFolder
from graph_passes.plan_record import PLAN_KEY

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
    found = ModelFolder.beside(model.path, model.path.parent, gguf_config(model))
    return found if found.tokenizer else ModelFolder(model.path, model.path, found.config)


def gguf_config(model: GgufModel) -> dict[str, Any]:
    """The metadata in the words of ``config.json``, as far as they are asked for."""
    told = {key: _whole(model, name) for key, name in _CONFIG.items()}
    vocabulary = _vocabulary(model)
    ends = [end for name in _ENDS if (end := _whole(model, name)) is not None]
    known = {**told, "eos_token_id": ends or None, "vocab_size": vocabulary}
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
        found = sorted(path.glob("*.gguf"))
        path = found[0] if len(found) == 1 else path
    return read_model(path)


def _whole(model: GgufModel, name: str) -> int | None:
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
    except (GgufFileError, SurgeryError):
        return 0
    widths = [_whole(model, f"{{}}.{name}") or usual for name in _WIDTHS]
    return CACHE_BYTES * sum(each.kv_heads for each in sizes) * sum(widths)
