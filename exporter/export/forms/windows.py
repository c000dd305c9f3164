"""Makes sure that a decoder's graph looks as far back as the model does, and no further.

A check that runs a few tokens can't tell: windows are thousands of positions long. The builder of
onnxruntime-genai 0.18 writes windows for models that list their layers' types, and none for those
whose config names a window alone, Mistral for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import ExportError

_LOCAL = "sliding_attention"


def windowed_layers(config: Any) -> int:
    """How many layers of a decoder look at a window alone.

    Args:
        config: Of the text model, as transformers has it.
    """
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or (isinstance(longest, int) and window >= longest):
        return 0
    types = getattr(config, "layer_types", None)
    return int(config.num_hidden_layers) if types is None else list(types).count(_LOCAL)


def require_windows(path: Path, config: Any) -> None:
    """Counts the attentions of a graph that look at a window.

    Args:
        path: The graph, in GroupQueryAttention.
        config: Of the text model, as transformers has it.

    Raises:
        ExportError: They are not as many as the model's.
    """
    import onnx_ir as ir

    wanted = windowed_layers(config)
    nodes = [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
    found = sum(node.attributes.get_int("local_window_size", -1) > 0 for node in nodes)
    if found != wanted:
        raise ExportError(
            f"onnxruntime-genai's model builder wrote a window into {found} of {len(nodes)} "
            f"attentions, where the model has one in {wanted}.",
        )
