"""One attention with its caches, and nothing else: what it alone takes of an engine."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.fusing.cache_in_place import CacheInPlacePass

_TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
attention (
    int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
    {dtype}[batch, {heads}, sequence, {size}] query,
    {dtype}[batch, {kv_heads}, sequence, {size}] key,
    {dtype}[batch, {kv_heads}, sequence, {size}] value,
    {dtype}[batch, {kv_heads}, past, {size}] past_key,
    {dtype}[batch, {kv_heads}, past, {size}] past_value
) => (
    {dtype}[batch, {heads}, sequence, {size}] found,
    {dtype}[batch, {kv_heads}, total, {size}] present_key,
    {dtype}[batch, {kv_heads}, total, {size}] present_value
)
<bool[batch, 1, sequence, total] seen>
{{
    present_key = Concat <axis = -2> (past_key, key)
    present_value = Concat <axis = -2> (past_value, value)
    rank = Constant <value_ints = [1]> ()
    ranks = Constant <value_ints = [1, 2]> ()
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    pasts = Shape <start = 2, end = 3> (past_key)
    past_length = Squeeze (pasts)
    news = Shape <start = 1, end = 2> (input_ids)
    new = Squeeze (news)
    whole = Add (past_length, new)
    columns = Range (zero, whole, one)
    places = Range (past_length, whole, one)
    rows = Unsqueeze (places, rank)
    earlier = LessOrEqual (columns, rows)
    real = Cast <to = 9> (attention_mask)
    told = Unsqueeze (real, ranks)
    seen = And (earlier, told)
    found = Attention <scale = 0.1> (query, present_key, present_value, seen)
}}
"""
_NAMES = {
    f"{when}_{what}": f"{full}.0.{what}"
    for when, full in (("past", "past_key_values"), ("present", "present"))
    for what in ("key", "value")
}


def attention_in_place(dtype: str, *, heads: int, kv_heads: int, size: int, room: int) -> ir.Model:
    """The graph, its caches in place."""
    text = _TEXT.format(dtype=dtype, heads=heads, kv_heads=kv_heads, size=size)
    model = ir.from_onnx_text(text)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = _NAMES.get(value.name or "", value.name)
    CacheInPlacePass(room)(model)
    return model
