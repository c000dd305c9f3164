"""Mixtures of experts in a form that can be traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def exportable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Lets a mixture of experts run as batched products: its usual kernel can't be traced.

    That has no form in ONNX, and without numbers it takes no other type than bfloat16.
    """
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
