"""How an ONNX file may be cut."""

from __future__ import annotations

from typing import Literal

from exporter.option_types import OutputFile, Size
from exporter.options import Options, dataclass, option

DEFAULT_LIMIT_BYTES = 8 * 10**9
"""Models with more weights are verified at the cheaper setting."""


@dataclass(frozen=True)
class CutOptions(Options):
    """How an ONNX file is cut.

    Attributes:
        verify: ``oracle`` runs the result against the original with the branches multiplied by
            zero, plus the replacements, on ONNX Runtime; ``none`` is recorded in the report.
        verify_limit_bytes: Models with more weights, in bytes, are verified at a cheaper setting
            (see :func:`exporter.cut.oracle.verify.verify_candidate`), and so are those for which
            there isn't memory enough; the report says so.
        weights: ``compact`` writes ``<target>.data`` with the weights that are left; ``share``
            points into the source's data file, which must be in the same folder; only what
            replacements bring goes into the graph, or if it is large into ``<target>.data``.
        companions: Copies config and tokenizer from the source's folder into the result's, where
            they are missing there, and writes ``USE.md``, which tells how the result is used.
        report_path: In place of an earlier file; by default ``prune.json`` beside the result, or
            ``<target>.prune.json`` where another model's stands there.
        renumber_kv: Gives the caches that are left dense numbers.
        genai_config: ``rewrite`` a config beside the source for the result, or ``none``.
        keep_debug: Keeps the exporter's notes, which may hold local paths.
        allow_all: Lets every sublayer go.
    """

    verify: Literal["oracle", "none"] = option(
        "oracle",
        "Compare the result with the original in which the branches are multiplied by zero.",
    )
    verify_limit_bytes: Size = option(
        DEFAULT_LIMIT_BYTES,
        "If the weights are larger than this, verify in a way that needs little memory.",
        "--verify-limit",
        rare=True,
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
    )
    report_path: OutputFile | None = option(
        None, "The report's file.", "--report", usual="prune.json next to the result"
    )
    renumber_kv: bool = option(False, "Number the remaining KV caches from 0.")
    genai_config: Literal["rewrite", "none"] = option(
        "rewrite",
        "Write onnxruntime-genai's config for the result, if the original has one.",
        rare=True,
    )
    keep_debug: bool = option(False, "Keep the exporter's stack traces.", config_only=True)
    allow_all: bool = option(
        False,
        "Cut even if no attention and no MLP is left. Disables no other check.",
        "--allow-empty",
    )
