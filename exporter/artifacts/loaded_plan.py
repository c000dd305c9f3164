"""A plan with all that a cut needs of it, read once: also the numbers that healing made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import onnx_ir
from safetensors import SafetensorError, safe_open

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.artifacts.plans import hold_against_model, read_plan
from exporter.errors import PlanError, UnsafePlanError, first_line
from exporter.files import sha256_file
from exporter.progress import Progress
from graph_passes.files.locations import real
from graph_passes.files.reading import check_file
from graph_passes.replacements import ReplacementTensors
from graph_passes.types import Deletion, SublayerKind, SublayerRef

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class LoadedPlan:
    """A plan, where it comes from a file its place and hash, and the numbers of replacements."""

    plan: PruningPlan
    replacements: Replacements | None = None
    path: Path | None = None
    sha256: str | None = None

    @classmethod
    def read(cls, path: Path) -> LoadedPlan:
        """Reads a plan's file and that of its replacements."""
        plan = read_plan(path)
        return cls(plan, read_replacements(plan, path), path, sha256_file(path))

    @classmethod
    def of(
        cls,
        plan: PruningPlan | Sequence[PlannedDeletion],
        replacements: Replacements | None = None,
    ) -> LoadedPlan:
        """A plan that stands in no file."""
        if not isinstance(plan, PruningPlan):
            plan = PruningPlan(deletions=list(plan))
        return cls(plan, replacements)

    @property
    def deletions(self) -> list[Deletion]:
        """What is to go, as the surgery takes it."""
        return [Deletion(d.layer, d.kind, d.replacement) for d in self.plan.deletions]

    @property
    def tensors(self) -> Mapping[SublayerRef, ReplacementTensors]:
        """The replacements' numbers, as the surgery takes them."""
        return {} if self.replacements is None else self.replacements.tensors

    @property
    def changed_weights(self) -> Mapping[str, ChangedWeight]:
        """New values of weights that the model keeps, by the parameter's name in PyTorch."""
        return {} if self.replacements is None else self.replacements.weights

    @property
    def inputs(self) -> list[Path]:
        """The files that it was read from."""
        numbers = [] if self.replacements is None else [self.replacements.path]
        return [*([] if self.path is None else [self.path]), *numbers]

    @property
    def hashes(self) -> dict[str, str]:
        """Those of the files, by their roles in what is made from them."""
        result = {} if self.sha256 is None else {"plan": self.sha256}
        return (
            result
            if self.replacements is None
            else result | {"replacements": self.replacements.sha256}
        )

    def hold_against(self, model_sha256: str | None, model: str, progress: Progress) -> None:
        """Warns of a plan for another model; see :func:`hold_against_model`."""
        hold_against_model(self.plan, model_sha256, model=model, path=self.path, progress=progress)


_KINDS = "|".join(get_args(SublayerKind))
# One way to write a number: 01 and 1 would be two keys for one layer.
_KEY = re.compile(rf"({_KINDS})\.(0|[1-9][0-9]*)\.(weight|bias)")
_KEYS_HINT = (
    "Keys are <kind>.<layer>.bias and, for linear, <kind>.<layer>.weight; for changed weights "
    "value:<parameter>, or down:<parameter> and up:<parameter>."
)
_WEIGHT_KEY = re.compile(r"(value|down|up):(.+)")
_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}


@dataclass(frozen=True)
class ChangedWeight:
    """The new value of a weight that the model keeps.

    That is the whole value, or the two factors ``down`` [rank, in] and ``up`` [out, rank] of
    ``up @ down``, which is added to the old one. From a file they are tensors of onnx_ir that are
    read whenever asked for, from healing PyTorch's.
    """

    numbers: tuple[Any] | tuple[Any, Any]

    @property
    def parts(self) -> dict[str, Any]:
        """The numbers by what they are called in the file."""
        names = ("value",) if len(self.numbers) == 1 else ("down", "up")
        return dict(zip(names, self.numbers, strict=True))


@dataclass(frozen=True)
class Replacements:
    """What healing put into a plan's file of numbers."""

    path: Path
    sha256: str
    tensors: Mapping[SublayerRef, ReplacementTensors]  # weights are read whenever asked for
    weights: Mapping[str, ChangedWeight] = field(default_factory=dict)  # by PyTorch's names


def read_replacements(plan: PruningPlan, plan_path: Path) -> Replacements | None:
    """Opens the file of numbers that a plan names."""
    if plan.replacements is None:
        if plan.changed_weights or any(d.replacement != "none" for d in plan.deletions):
            raise PlanError(
                f"{plan_path} names no file with the numbers for {plan.describe()} and "
                f"{plan.changed_weights} changed weights.",
                "Name it under $.replacements: path and sha256 of a safetensors file.",
                code="other-numbers",
            )
        return None
    path = _located(plan.replacements.path, plan_path)
    content = dict(_opened(path))  # first: a terabyte of nothing would be hashed for ever
    sha256 = sha256_file(path)
    if sha256 != plan.replacements.sha256.lower():
        raise _other(path, f"its SHA-256 is {sha256}, and not the one that {plan_path} names")
    tensors: dict[SublayerRef, dict[str, ir.LazyTensor]] = {}
    weights: dict[str, dict[str, ir.LazyTensor]] = {}
    for key, numbers in content.items():
        if match := _KEY.fullmatch(key):
            ref = SublayerRef(int(match[2]), cast(SublayerKind, match[1]))
            takers = {"linear"} if match[3] == "weight" else {"linear", "bias"}
            if takers.isdisjoint(d.replacement for d in plan.deletions if d.names(ref)):
                raise _other(path, f"the plan does not use {key}")
            tensors.setdefault(ref, {})[match[3]] = numbers
        elif match := _WEIGHT_KEY.fullmatch(key):
            weights.setdefault(match[2], {})[match[1]] = numbers
        else:
            raise _other(path, f"{key!r} is not the key of a replacement")
    for name, parts in weights.items():
        if set(parts) not in ({"value"}, {"down", "up"}):
            raise _other(path, f"of the weight {name} it holds {', '.join(sorted(parts))}")
    if len(weights) != plan.changed_weights:
        held = len(weights)
        raise _other(path, f"it changes {held} weights, and the plan says {plan.changed_weights}")
    for ref, parts in tensors.items():  # what lacks for a deletion the cut tells
        if "bias" not in parts:
            text = f"{path} lacks {ref.kind}.{ref.layer}.bias."
            raise PlanError(text, _KEYS_HINT, code="numbers-missing")
    return Replacements(
        path,
        sha256,
        {ref: ReplacementTensors(t["bias"], t.get("weight")) for ref, t in tensors.items()},
        {
            name: ChangedWeight((w["down"], w["up"]) if "up" in w else (w["value"],))
            for name, w in weights.items()
        },
    )


def _other(path: Path, problem: str) -> PlanError:
    hint = f"It may belong to another plan: heal it again, or bring the file back. {_KEYS_HINT}"
    return PlanError(f"{path}: {problem}.", hint, code="other-numbers")


def _located(name: str, plan_path: Path) -> Path:
    path = plan_path.parent / name
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or not real(path).is_relative_to(real(plan_path.parent)):
        raise UnsafePlanError(
            f"{plan_path}: $.replacements.path: {name!r} is outside the plan's folder.",
            "Put the file next to the plan.",
        )
    if not path.exists():
        raise PlanError(
            f"{plan_path}: $.replacements.path: {path} does not exist.", code="file-missing"
        )
    check_file(path)
    return path


def _opened(path: Path) -> Iterator[tuple[str, ir.LazyTensor]]:
    """Each key with its tensor, which is not read yet."""

    def read(key: str) -> ir.TensorProtocol:
        with safe_open(path, framework="numpy") as file:
            return onnx_ir.tensor(file.get_tensor(key))

    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                part = file.get_slice(key)
                dtype, shape = _DTYPES.get(part.get_dtype()), part.get_shape()
                if dtype is None:
                    raise PlanError(
                        f"{path}: {key} is of type {part.get_dtype()}.",
                        f"Types that can be read are {', '.join(_DTYPES)}.",
                        code="wrong-dtype",
                    )
                yield (
                    key,
                    onnx_ir.LazyTensor(
                        partial(read, key),
                        dtype=onnx_ir.DataType[dtype],
                        shape=onnx_ir.Shape(shape),
                        name=key,
                    ),
                )
    except (SafetensorError, OSError) as error:
        raise PlanError(
            f"{path} is not a valid safetensors file: {first_line(error)}.", code="other-numbers"
        ) from error
