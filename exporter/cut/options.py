"""How an ONNX file may be cut."""

from __future__ import annotations

from typing import Literal

from exporter.option_types import Size
from exporter.options import Options, dataclass, option

DEFAULT_LIMIT_BYTES = 8 * 10**9
"""Models with more weights are verified at the cheaper setting."""


@dataclass(frozen=True)
class CutOptions(Options):
    """How an ONNX file is cut."""

    verify: Literal["oracle", "none"] = option(
        "oracle",
        "Compare the result with the original in which the branches are multiplied by zero.",
    )
    verify_limit_bytes: Size = option(
        DEFAULT_LIMIT_BYTES,
        "If the weights are larger than this, verify in a way that needs little memory.",
        "--verify-limit",
        config_only=True,
    )
    weights: Literal["compact", "share"] = option(
        "compact",
        "Write a data file with the remaining weights, or refer to the original's (in the "
        "same folder).",
    )
    companions: bool = option(
        True,
        "Copy the config and tokenizer next to the original into the result's folder, if they are "
        "missing there, and write USE.md, which tells how to load the result.",
        "--copy/--no-copy",
        config_only=True,
    )
    renumber_kv: bool = option(False, "Number the remaining KV caches from 0.", config_only=True)
    genai_config: Literal["rewrite", "none"] = option(
        "rewrite",
        "Write onnxruntime-genai's config for the result, if the original has one.",
        config_only=True,
    )
    keep_debug: bool = option(False, "Keep the exporter's stack traces.", config_only=True)
    allow_all: bool = option(
        False,
        "Cut even if no attention and no MLP is left. Disables no other check.",
        "--allow-empty",
    )
    reports: bool = True
