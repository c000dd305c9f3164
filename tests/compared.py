"""Tiny models held against one another, in no time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.artifacts import Accuracy, QuantizationRecord
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from tests.present import present
from tests.text_graphs import write_tiny_lm, write_tokenizer

PLAN = [{"layer": 0, "kind": "attention", "replacement": "none"}]
QUICK = CompareOptions(
    threads=1, prefill_lengths=(4,), decode_past_lengths=(), rounds=2, eval_tokens=32,
    eval_sequence_length=16,
)  # fmt: skip


def quick(**changes: Any) -> CompareOptions:
    """One shape, two rounds, few tokens; but for what is named."""
    return replace(QUICK, **changes)


def language_model(
    folder: Path,
    files: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    **how: Any,
) -> Path:
    """A tiny language model with a tokenizer, a config and other files beside it."""
    write_tiny_lm(folder, **how)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0, **(config or {})}))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def language_models(folder: Path, files: Any = None, **config: Any) -> tuple[Path, Path]:
    """One, and the same with other weights and a cache less."""
    first = language_model(folder / "a", files, config)
    return first, language_model(folder / "b", files, config, layers=(1,), noise=1.0)


def encoder(folder: Path, **how: Any) -> Path:
    """A tiny graph of token states, without a tokenizer."""
    return write_tiny_lm(folder, layers=(), output="last_hidden_state", **how)


def encoders(folder: Path) -> tuple[Path, Path]:
    """One, and the same with other weights."""
    return encoder(folder / "a"), encoder(folder / "b", noise=0.5)


def accuracy_of(*arms: Any, options: CompareOptions = QUICK, **more: Any) -> Accuracy:
    """What a comparison says of its arms' answers."""
    return present(compare(*arms, options, **more).accuracy)


EIGHT = QuantizationRecord(scheme="int8", method="rtn", bits={"8": 1}, block_size=32)


def noted(folder: Path, name: str, text: str) -> Path:
    """Has the graph say how it was made; its weights stay what they are."""
    model = ir.load(folder / "model.onnx")
    model.metadata_props[f"depthcut.{name}"] = text
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    return folder


def quantized(folder: Path, **changes: Any) -> Path:
    """Has the graph say that its weights are of fewer bits."""
    return noted(folder, "quantization", EIGHT.model_copy(update=changes).model_dump_json())


def four_models(root: Path) -> dict[str, Path]:
    """Folders whose answers differ from the whole float model's by more and more noise."""
    made = {
        "whole": write_tiny_lm(root / "whole"),
        "cut": write_tiny_lm(root / "cut", layers=(1,), noise=0.2, plan=PLAN),
        "whole-q": write_tiny_lm(root / "whole-q", noise=0.1),
        "cut-q": write_tiny_lm(root / "cut-q", layers=(1,), noise=0.3, plan=PLAN),
    }
    for name, folder in made.items():
        write_tokenizer(folder)
        if name.endswith("-q"):
            quantized(folder)
    return made
