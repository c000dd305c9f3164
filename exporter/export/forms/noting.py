"""What a form's writers tell of their graph, and where the graph notes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from exporter.artifacts import FORM_KEY, FormRecord, Target
from exporter.artifacts.plans.origin import MODEL_KEY
from exporter.export.onnx_output import MODEL_FILE, save_graph

_FUSED_IN_ONNX = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"})
_FUSED_DOMAINS = frozenset({"com.microsoft"})
_FUSED_NORMS = frozenset({"SimplifiedLayerNormalization"})  # ONNX Runtime's, in ONNX's own domain


@dataclass(frozen=True)
class WrittenForm:
    """How a graph came about, which now lies in its folder as ``model.onnx``.

    Attributes:
        writer: The exporter and its version.
        passes: What rewrote its graph after it, in order.
        cache_room: The fixed length of its caches; None where they grow.
        remark: Why it is not the fastest form of its target; None where it is.
    """

    writer: str
    passes: tuple[str, ...] = ()
    cache_room: int | None = None
    remark: str | None = None


def note_form(
    folder: Path,
    written: WrittenForm,
    target: Target,
    source_sha256: str | None = None,
    *,
    name: str = MODEL_FILE,
) -> FormRecord:
    """Writes into a graph's notes how it is written.

    Args:
        folder: There the graph lies.
        written: How it came about.
        target: What it is for.
        source_sha256: Of the model that it was exported from, if that is known.
        name: Of the graph's file.

    Returns:
        The record, as written.
    """
    model = ir.load(folder / name)
    record = FormRecord(
        target=target,
        writer=written.writer,
        passes=list(written.passes),
        fused=fused_operators(model),
        cache_room=written.cache_room,
        remark=written.remark,
    )
    model.metadata_props[FORM_KEY] = record.model_dump_json()
    if source_sha256 is not None:
        model.metadata_props[MODEL_KEY] = source_sha256
    save_graph(model, folder, name)
    return record


def fused_operators(model: ir.Model) -> dict[str, int]:
    """By name, how many nodes do at once what takes several of ONNX's basic operators."""
    found = Counter(node.op_type for node in model.graph.all_nodes() if _is_fused(node))
    return dict(sorted(found.items()))


def form_in_words(record: FormRecord) -> str:
    """A form on one line."""
    fused = ", ".join(f"{count} {name}" for name, count in record.fused.items())
    after = f", then {', '.join(record.passes)}" if record.passes else ""
    remark = f"; {record.remark}" if record.remark else ""
    if record.cache_room is not None:
        remark = f"; each run reads {record.cache_room} positions of its caches{remark}"
    by = f"written by {record.writer}{after}"
    return f"form: {record.target}, {by}; fused: {fused or 'nothing'}{remark}"


def version_of(distribution: str) -> str:
    """A library's name with its version."""
    return f"{distribution} {metadata.version(distribution)}"


def _is_fused(node: ir.Node) -> bool:
    if node.op_type in _FUSED_NORMS or node.domain in _FUSED_DOMAINS:
        return True
    return node.domain in ("", "ai.onnx") and node.op_type in _FUSED_IN_ONNX
