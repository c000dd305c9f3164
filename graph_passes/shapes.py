"""What the graph's annotations say about shapes, without inference."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

Dim = int | str | None


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """A value's dimensions: numbers, names, None for the unknown; None for an unknown rank."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def broadcast_reason(skip: ir.Value, total: ir.Value, branches: Iterable[ir.Value]) -> str | None:
    """Why the skip can't stand in for the sum; None where no annotation speaks against it.

    A skip that only broadcasts to the sum's shape would leave a wrong shape behind. Unnamed
    dimensions prove nothing; a named one that differs from the sum's counts against the skip
    only when it is the branch that brings the sum's dimension.
    """
    kept, wanted = dims(skip), dims(total)
    if kept is None or wanted is None:
        return None
    text = f"the skip {skip.name!r} {list(kept)} broadcasts to the sum's shape {list(wanted)}"
    if len(kept) != len(wanted):
        return text
    from_branches = [shape for value in branches if (shape := dims(value)) is not None]
    for axis, (have, want) in enumerate(zip(kept, wanted, strict=True)):
        brought = any(axis < len(s) and s[axis - len(wanted)] == want for s in from_branches)
        if _differs(have, want, brought):
            return text
    return None


def _differs(have: Dim, want: Dim, brought_by_branch: bool) -> bool:
    if have == want or have is None or want is None:
        return False
    if isinstance(have, int) and (have == 1 or isinstance(want, int)):
        return True
    return isinstance(have, str) and isinstance(want, str) and brought_by_branch
