"""What takes a deleted branch's place: the mean of its output, or a linear map of its input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graph_passes.errors import SurgeryError
from graph_passes.files.weight_file import read_bytes
from graph_passes.finding.weights import FLOATS, float_type, width
from graph_passes.locate import FoundSite
from graph_passes.types import Replacement, SublayerRef

Numbers = NDArray[Any] | ir.TensorProtocol
_DIGEST_LETTERS = 16


@dataclass(frozen=True, eq=False)
class ReplacementTensors:
    """The numbers of one replacement: ``contribution = branch_input @ weight.T + bias``.

    All are float32, float16, bfloat16 or float64, and are rounded to the stream's dtype.
    A weight is looked at once when it is put into a graph, then read again when the graph is
    serialised; one that comes as ``onnx_ir.LazyTensor`` is not kept in memory between.

    Attributes:
        bias: ``[hidden]``; for ``bias`` it is all there is, the mean of the branch's output.
        weight: ``[hidden_out, hidden_in]``, as ``torch.nn.Linear`` has it; None for ``bias``.
    """

    bias: Numbers
    weight: Numbers | None = None


@dataclass(frozen=True, eq=False)
class FittedReplacement:
    """A replacement's numbers as a site takes them."""

    kind: Replacement
    bias: ir.TensorProtocol  # `[hidden]` in the stream's dtype
    weight: ir.TensorProtocol | None
    digest: str


def fit(
    sites: Iterable[FoundSite],
    kinds: Mapping[SublayerRef, Replacement],
    given: Mapping[SublayerRef, ReplacementTensors],
    gone: Collection[SublayerRef] = (),
) -> dict[SublayerRef, FittedReplacement]:
    """Checks the numbers against the sites that they are for. Nothing is changed."""
    chosen = list(sites)
    refs = {site.ref for site in chosen if kinds[site.ref] != "none"}
    for ref in sorted(set(given) - refs - set(gone)):
        raise SurgeryError(
            f"There are numbers to replace {ref} by, but it is not to be replaced.",
            "Name the replacement in the deletion, or leave its numbers out.",
            code="other-numbers",
        )
    return {
        site.ref: _fit_one(site, kinds[site.ref], given.get(site.ref))
        for site in chosen
        if site.ref in refs
    }


def _fit_one(
    site: FoundSite, kind: Replacement, given: ReplacementTensors | None
) -> FittedReplacement:
    if kind not in get_args(Replacement):
        raise SurgeryError(
            f"{site.ref} can't be replaced by {kind!r}.",
            f"What can take its place: {', '.join(get_args(Replacement))}.",
            code="unknown-replacement",
        )
    if given is None or (kind == "linear" and given.weight is None):
        lacking = "numbers are" if given is None else "weight is"
        raise SurgeryError(
            f"{site.ref} is to be replaced ({kind}), but no {lacking} given for it.",
            "Give the bias [hidden], and for linear the weight [hidden, hidden] too.",
            code="numbers-missing",
        )
    if kind == "bias" and given.weight is not None:
        raise SurgeryError(
            f"{site.ref} is to be replaced by a bias, but a weight is given for it too.",
            "Ask for the replacement linear, or leave the weight out.",
            code="other-numbers",
        )
    if kind == "linear" and isinstance(site.branch_input, str):
        raise SurgeryError(
            f"{site.ref} can't be replaced by a linear map: {site.branch_input}.",
            "Replace it by a bias, or by nothing.",
            code="unknown-replacement",
        )
    dtype, hidden = _stream_form(site)
    bias = _checked("bias", site.ref, given.bias, (hidden,), dtype)
    return FittedReplacement(
        kind=kind,
        bias=ir.tensor(bias),
        weight=None if given.weight is None else _turned(site.ref, given.weight, hidden, dtype),
        digest=digest_of(given),
    )


def _stream_form(site: FoundSite) -> tuple[ir.DataType, int]:
    """The dtype and the width of what a site adds to the stream."""
    values = [site.tree.add.outputs[0], *(leaf.value for leaf in site.leaves), site.tree.skip]
    alike = [] if isinstance(site.branch_input, str) else [site.branch_input]
    dtype, hidden = float_type(values), width([*values, *alike])
    if dtype is None or hidden is None:
        lacking = "dtype" if dtype is None else "width"
        raise SurgeryError(
            f"{site.ref} can't be replaced: the {lacking} of the residual stream "
            f"{site.tree.skip.name!r} is not declared.",
            "Infer the graph's shapes first (onnx.shape_inference).",
        )
    return dtype, hidden


def _turned(
    ref: SublayerRef, weight: Numbers, hidden: int, dtype: ir.DataType
) -> ir.TensorProtocol:
    """The weight as MatMul takes it, read again whenever it is asked for."""
    shape = (hidden, hidden)
    _checked("weight", ref, weight, shape, dtype)

    def turn() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(_rounded(array_of(weight), dtype).T))

    return ir.LazyTensor(turn, dtype=dtype, shape=ir.Shape(shape))


def _checked(
    part: str, ref: SublayerRef, numbers: Numbers, shape: tuple[int, ...], dtype: ir.DataType
) -> NDArray[Any]:
    """The numbers in the stream's dtype."""
    what = f"The {part} for {ref}"
    tensor = ir.tensor(numbers) if isinstance(numbers, np.ndarray) else numbers
    if tensor.dtype not in FLOATS:
        raise SurgeryError(
            f"{what} is of type {tensor.dtype.name}; it must be floating.", code="wrong-dtype"
        )
    if tuple(tensor.shape.numpy()) != shape:
        raise SurgeryError(
            f"{what} has the shape {list(tensor.shape.numpy())}; "
            f"the residual stream asks for {list(shape)}.",
            code="wrong-shape",
        )
    array = array_of(tensor)
    rounded = _rounded(array, dtype)
    # Of the rounded ones: in float16 a number that is too large becomes infinite.
    if not np.isfinite(rounded).all():
        reason, code = "holds NaN or infinity", "not-finite"
        if np.isfinite(array).all():
            reason = f"holds numbers too large for {dtype.name}, the residual stream's dtype"
            code = "too-large"
        raise SurgeryError(f"{what} {reason}.", "Fit it again.", code=code)
    return rounded


def digest_of(given: ReplacementTensors) -> str:
    """The beginning of the SHA-256 of a bias as it is given, in float64.

    Two fits never give the same bias, so the weight need not be read for it; but a map that was
    made without a bias has zeros there, and is then read too.
    """
    bias = array_of(given.bias)
    total = sha256()
    further = [] if given.weight is None or bias.any() else [given.weight]
    for numbers in (bias, *map(array_of, further)):
        total.update(np.ascontiguousarray(numbers.astype(np.float64)).tobytes())
    return total.hexdigest()[:_DIGEST_LETTERS]


def array_of(numbers: Numbers) -> NDArray[Any]:
    """The numbers in memory. A data file is read here, since onnx_ir refuses hard links."""
    if isinstance(numbers, ir.ExternalTensor):
        flat = np.frombuffer(read_bytes(numbers), numbers.dtype.numpy())
        return flat.reshape(numbers.shape.numpy())
    return numbers if isinstance(numbers, np.ndarray) else numbers.numpy()


def _rounded(array: NDArray[Any], dtype: ir.DataType) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # looked for afterwards, with a better message
        return array.astype(dtype.numpy(), copy=False)
