"""The graphs that are mutated: tiny Transformers in every form, as the plain tests build them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from tests.tiny_graphs import TinySpec, tiny_model

sys.path.append(str(Path(__file__).parents[1] / "graph_passes"))
from fused_graphs import FUSED, fused_model

_FORMS = (
    "pre_norm", "post_norm", "sandwich", "multiplier", "parallel", "parallel_in_turn", "split_mlp",
)  # fmt: skip
_SPECS = {
    **{form: TinySpec(form=form, layers=2) for form in _FORMS},  # type: ignore[arg-type]
    **{f"{form}_encoder": TinySpec(form=form, layers=2, cache=False) for form in _FORMS},  # type: ignore[arg-type]
    "past_from_last": TinySpec(past_from=2),
    "gathered_past": TinySpec(past_from=1, gather_past=True, layers=2),
    "mask_in_branch": TinySpec(mask_in_branch=True, layers=2),
    "attention_operator": TinySpec(fused=True, layers=2),
    "tied": TinySpec(tied=True, layers=2),
    "router": TinySpec(router=True, layers=2),
    "unannotated": TinySpec(annotated=False, layers=2),
}
_BUILDERS: dict[str, Callable[[], ir.Model]] = {
    **{name: functools.partial(tiny_model, spec) for name, spec in _SPECS.items()},
    **{f"fused_{name}": functools.partial(fused_model, spec) for name, spec in FUSED.items()},
}
NAMES = tuple(_BUILDERS)


@functools.cache
def _serialised(name: str) -> bytes:
    data: bytes = ir.to_proto(_BUILDERS[name]()).SerializeToString()
    return data


def graph(name: str) -> onnx.ModelProto:
    """A fresh copy of one of the graphs."""
    return onnx.ModelProto.FromString(_serialised(name))
