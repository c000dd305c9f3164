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
FACTORS = ("weight_down", "weight_up")
"""What the two factors of a map of low rank are called, in the order in which they work."""
_DIGEST_LETTERS = 16


@dataclass(frozen=True, eq=False)
class ReplacementTensors:
    """The numbers of one replacement: ``contribution = branch_input @ weight.T + bias``.

    A map of low rank comes as its two factors: ``weight = up @ down``, which is never multiplied
    out. All are float32, float16, bfloat16 or float64, and are rounded to the stream's dtype.
    A weight is looked at once when it is put into a graph, then read again when the graph is
    serialised; one that comes as ``onnx_ir.LazyTensor`` is not kept in memory between.

    Attributes:
        bias: ``[hidden]``; for ``bias`` it is all there is, the mean of the branch's output.
        weight: ``[hidden_out, hidden_in]``, as ``torch.nn.Linear`` has it; None for ``bias``.
        factors: Instead of a weight, ``down`` ``[rank, hidden_in]`` and ``up``
            ``[hidden_out, rank]``.
    """

    bias: Numbers
    weight: Numbers | None = None
    factors: tuple[Numbers, Numbers] | None = None

    @property
    def maps(self) -> dict[str, Numbers]:
        """The matrices by their names in files and graphs, in the order in which they work."""
        whole = {} if self.weight is None else {"weight": self.weight}
        return (
            whole if self.factors is None else whole | dict(zip(FACTORS, self.factors, strict=True))
        )


@dataclass(frozen=True, eq=False)
class FittedReplacement:
    """A replacement's numbers as a site takes them."""

    kind: Replacement
    bias: ir.TensorProtocol  # `[hidden]` in the stream's dtype
    weights: Mapping[str, ir.TensorProtocol]
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
            code="unasked-numbers",
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
    if given is None or (kind == "linear" and not given.maps):
        lacking = "numbers are" if given is None else "weight is"
        raise SurgeryError(
            f"{site.ref} is to be replaced ({kind}), but no {lacking} given for it.",
            "Give the bias [hidden], and for linear the weight [hidden, hidden] or its two factors "
            "[rank, hidden] and [hidden, rank] too.",
            code="numbers-missing",
        )
    if kind == "bias" and given.maps:
        raise SurgeryError(
            f"{site.ref} is to be replaced by a bias, but a weight is given for it too.",
            "Ask for the replacement linear, or leave the weight out.",
            code="unasked-weight",
        )
    if kind == "linear" and isinstance(site.branch_input, str):
        raise SurgeryError(
            f"{site.ref} can't be replaced by a linear map: {site.branch_input}.",
            "Replace it by a bias, or by nothing.",
            code="unknown-branch-input",
        )
    dtype, hidden = _stream_form(site)
    bias = _checked("bias", site.ref, given.bias, (hidden,), dtype)
    return FittedReplacement(
        kind=kind,
        bias=ir.tensor(bias),
        weights=_turned_maps(site.ref, given, hidden, dtype),
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


def _turned_maps(
    ref: SublayerRef, given: ReplacementTensors, hidden: int, dtype: ir.DataType
) -> dict[str, ir.TensorProtocol]:
    if given.factors is None:
        sizes = [(hidden, hidden)]
    elif given.weight is not None:
        raise SurgeryError(
            f"For {ref} there is a weight and its two factors as well.",
            "Give one of the two.",
            code="weight-given-twice",
        )
    else:
        rank = _rank(given.factors[0])
        sizes = [(rank, hidden), (hidden, rank)]
    return {
        name: _turned(name, ref, weight, shape, dtype)
        for (name, weight), shape in zip(given.maps.items(), sizes, strict=False)
    }


def _rank(down: Numbers) -> int:
    """How many rows the first factor has; 1 where it is no matrix, which is then told."""
    shape = tuple(down.shape if isinstance(down, np.ndarray) else down.shape.numpy())
    return max(1, shape[0]) if shape else 1


def _turned(
    name: str, ref: SublayerRef, weight: Numbers, shape: tuple[int, int], dtype: ir.DataType
) -> ir.TensorProtocol:
    """The weight as MatMul takes it, read again whenever it is asked for."""
    _checked(name, ref, weight, shape, dtype)

    def turn() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(_rounded(array_of(weight), dtype).T))

    return ir.LazyTensor(turn, dtype=dtype, shape=ir.Shape(shape[::-1]))


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

    Two fits never give the same bias, so the weight need not be read for it; but maps that were
    made without a bias have zeros there, and are then read too.
    """
    bias = array_of(given.bias)
    total = sha256()
    for numbers in (bias, *(() if bias.any() else map(array_of, given.maps.values()))):
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
