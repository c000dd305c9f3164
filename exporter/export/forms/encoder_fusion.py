"""Fuses an encoder's graph for ONNX Runtime: attention, embeddings, residual sums, biased GELU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.errors import ExportError, first_line, pass_on_memory_error

if TYPE_CHECKING:
    import onnx_ir as ir

SOURCE_OPSET = 20
"""Of the export: onnxscript knows the attention that is written out there, not opset 23's."""


def fuse_encoder(model: ir.Model) -> ir.Model:
    """Writes an encoder in ONNX Runtime's fused operators.

    onnxscript's rewrite rules do most of it. What they leave is done before and after: embeddings,
    and norms without a bias. ONNX Runtime's own optimizer finds no attention in what PyTorch
    exports today: it wants another mask.

    Args:
        model: As PyTorch's exporter writes it at :data:`SOURCE_OPSET`, cut or not; it is changed.

    Returns:
        The same, with fewer and larger operators.

    Raises:
        ExportError: A rule fails on this graph, whose state is then unknown.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    from graph_passes import CleanupPass
    from graph_passes.fusing.embedding import fuse_embedding
    from graph_passes.fusing.skip_norms import fuse_skip_norms

    fuse_embedding(model.graph)
    CleanupPass(keep_debug=True)(model)
    try:
        fused, _ = optimize_for_ort(model)
    # Each of the rules is code of its own, with no error class.
    except Exception as error:
        pass_on_memory_error(error)
        raise ExportError(f"onnxscript can't fuse this graph: {first_line(error)}.") from error
    fuse_skip_norms(fused.graph)
    fused.graph.sort()
    CleanupPass(keep_debug=True)(fused)
    return fused
