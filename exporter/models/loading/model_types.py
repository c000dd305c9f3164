"""The model types that are loaded without being asked for: those whose code was looked at here.

A ``config.json`` chooses by its ``model_type`` which of some four hundred pieces of transformers'
code runs. Most are harmless; some load other models by the names that the config gives them
(``encoder-decoder``, ``rag``, detectors with a backbone), read pickles or ask the network. On the
list is what the anatomy knows and what the table of architectures (graph_passes/docs) holds: each
is built, exported and cut in the tests, loads nothing by name, and takes no path from its config.
A model of another type is loaded with ``--allow-any-model-type`` only. That goes for the models
inside a model too, and for the classes of tokenizers: those that belong to these types.
"""

from __future__ import annotations

from typing import Any

from exporter.models.anatomy.families import FAMILIES
from exporter.optional import require

__all__ = ["REVIEWED", "is_reviewed_tokenizer"]

REVIEWED = frozenset(FAMILIES) | {
    "albert", "audio-spectrogram-transformer", "bamba", "bart", "beit", "blenderbot",
    "clip_text_model", "clip_vision_model", "falcon_h1", "gemma3n_text", "granitemoehybrid",
    "hubert", "jamba", "lfm2", "m2m_100", "mamba", "mamba2", "marian", "mbart", "pegasus",
    "qwen3_next", "siglip_vision_model", "swin", "t5", "wav2vec2", "wavlm", "whisper", "zamba2",
}  # fmt: skip
"""Their names in ``config.json``."""

# Those that only read a tokenizer.json, whatever the model; and what hub models name for theirs.
_PLAIN_TOKENIZERS = {"PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer"}


def is_reviewed_tokenizer(name: str) -> bool:
    """Whether a tokenizer's class belongs to a reviewed type, or is none that transformers has.

    transformers takes its plain class, or refuses, where it does not know a name.
    """
    transformers = require("transformers", extra="torch")
    bare = name.removesuffix("Fast")
    known = any(hasattr(transformers, each) for each in (bare, f"{bare}Fast"))
    return bare in _reviewed_tokenizers() or not known


def _reviewed_tokenizers() -> set[str]:
    auto: Any = require("transformers.models.auto.tokenization_auto", extra="torch")
    found = set(_PLAIN_TOKENIZERS)
    for model_type in REVIEWED:
        classes = auto.TOKENIZER_MAPPING_NAMES.get(model_type)
        # A name in transformers 5, a slow one and a fast one in 4.57.
        for name in (classes,) if isinstance(classes, str) else classes or ():
            found.add((name or "").removesuffix("Fast"))
    return found - {""}
