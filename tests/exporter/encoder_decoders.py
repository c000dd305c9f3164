"""Random encoder-decoders of two layers a stack, as folders and as loaded models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
_SIZES = {
    "vocab_size": 64, "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "d_model": 32, "d_kv": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_WHISPER = {
    "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 40,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_TEXT = {"max_position_embeddings": 40, "forced_eos_token_id": None}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER),
    "t5": ("T5Config", "T5ForConditionalGeneration", {}),
    "bart": ("BartConfig", "BartForConditionalGeneration", _TEXT),
    "marian": ("MarianConfig", "MarianMTModel", _TEXT),
}


def made_model(family: str) -> Any:
    """A model in eval mode, its weights large enough that every branch counts."""
    import torch
    import transformers

    config_name, model_name, own = CLASSES[family]
    kind = getattr(transformers, config_name)
    taken = {**_SIZES, **own}
    if family != "t5":
        taken = {k: v for k, v in taken.items() if k not in ("num_layers", "num_heads", "d_kv")}
    else:
        taken = {k: v for k, v in taken.items() if not k.startswith(("encoder_", "decoder_layers"))}
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(kind(**taken)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def made_loaded(family: str) -> Any:
    """A ``LoadedModel`` without a tokenizer."""
    from exporter.artifacts import ModelRef
    from exporter.models.loading.model_source import LoadedModel

    model = made_model(family)
    ref = ModelRef(
        source=family,
        architecture=type(model).__name__,
        num_layers=4,
        encoder_layers=2,
        sha256="0" * 64,
    )
    return LoadedModel(model, None, ref, Path(family))


def write_source(folder: Path, family: str) -> Path:
    """A Hugging Face folder with a tokenizer of 64 words, and for speech its features."""
    from tests.exporter.tiny_families import tiny_tokenizer

    made_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if family == "whisper":
        result = {
            "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8,
            "sampling_rate": RATE, "hop_length": 160, "chunk_length": 1, "n_fft": 400,
            "padding_value": 0.0,
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(result))
    return folder


def write_sound(
    path: Path, seconds: float = 0.5, rate: int = RATE, *, pitch: float = 220.0, channels: int = 1
) -> Path:
    """A tone as a 16-bit WAV file."""
    from scipy.io import wavfile

    times = np.arange(int(seconds * rate)) / rate
    tone = (np.sin(2 * np.pi * pitch * times) * 12_000).astype(np.int16)
    wavfile.write(path, rate, np.stack([tone] * channels, axis=1) if channels > 1 else tone)
    return path


def write_recordings(folder: Path, first: int, number: int = 4) -> Path:
    """A JSON-lines file of recordings with what is said in them, no two alike."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(first, first + number):
        write_sound(folder / f"{index}.wav", 0.4 + 0.05 * index, pitch=150 + 40.0 * index)
        lines.append({"audio": f"{index}.wav", "text": f"w{index} w{index + 7} w{index + 20}"})
    file = folder / "recordings.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file
