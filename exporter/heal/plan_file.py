"""Writes fitted replacements, and the plan that names them: both files together, or neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import HealingReport, PruningPlan, ReplacementsRef
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.errors import HealingError, UsageError
from exporter.files import make_readable, refuse_overwriting, sha256_file, telling_full_disk
from exporter.models.ablation.branch_replacements import BranchReplacement
from graph_passes.files.locations import real
from graph_passes.files.placing import staging
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    import torch

FOLDER_PLAN, FOLDER_REPORT = "plan.json", "heal.json"
"""The names of a healed plan and its report where they have a folder for themselves."""
_REPORT_ROLE = "healing_report"


def files_of(path: Path) -> tuple[Path, Path, Path]:
    """Where a healed plan, its numbers and its report stand: all three are named like the plan."""
    return path, path.with_suffix(".safetensors"), path.with_name(f"{path.stem}.report.json")


def numbers_of(plan: PruningPlan, path: Path) -> tuple[Path, ...]:
    """The file of numbers that a plan at ``path`` names; none where it names none."""
    return () if plan.replacements is None else (path.parent / plan.replacements.path,)


def report_of(plan: PruningPlan, path: Path) -> Path | None:
    """The report of what a plan's replacements cost and gained."""
    digest = plan.made_from.get(_REPORT_ROLE)
    if digest is None:
        return None
    places = [files_of(item)[2] for item in (path, *numbers_of(plan, path))]
    paths = (item for item in (*places, path.with_name(FOLDER_REPORT)) if item.is_file())
    return next((item for item in paths if sha256_file(item) == digest), None)


def refuse_places(path: Path, inputs: Iterable[Path], model: Path) -> None:
    """Refuses a place for a healed plan where one of its files would do harm."""
    _, numbers, _ = files = files_of(path)
    folder = next((item for item in files if item.is_dir()), None)
    harm = "" if folder is None else f"{folder} is a folder"
    if path.suffix == numbers.suffix:
        harm = f"{path} is the name of the file for the plan's numbers"
    elif model.is_dir() and real(numbers.parent) == real(model):
        harm = f"{numbers} would be taken for weights of the model in {model}"
    if harm:
        hint = f"Write the plan elsewhere, or as {path.with_suffix('.json').name}."
        raise UsageError(f"{harm}.", hint, code="plan-place")
    for item in files:
        refuse_overwriting(item, [*inputs, model], "pruning_plan" if item == path else "")


def write_healed_plan(
    path: Path,
    plan: PruningPlan,
    branch_replacements: Mapping[SublayerRef, BranchReplacement],
    *,
    weights: Mapping[str, ChangedWeight] | None = None,
    report: HealingReport | None = None,
    report_path: Path | None = None,
) -> PruningPlan:
    """Writes a plan with its replacements: ``plan.json`` and ``plan.safetensors``, as it is named.

    The plan has the report's hash, so that :func:`report_of` finds it again.
    """
    _, numbers, usual = files_of(path)
    weights = weights or {}
    parents = {role: sha for role, sha in plan.made_from.items() if role != _REPORT_ROLE}
    noted = {"made_from": parents, "changed_weights": len(weights)}
    plan = plan.model_copy(update=noted)
    with telling_full_disk(path.parent), staging(path) as staged:
        stage, moves = staged.folder, []
        fitted = any(replacement.numbers for replacement in branch_replacements.values())
        if fitted or weights:
            reference = _write(stage / numbers.name, branch_replacements, weights)
            plan = plan.model_copy(update={"replacements": reference})
            moves.append((stage / numbers.name, numbers))
        else:
            plan = plan.model_copy(update={"replacements": None})
        if report is not None:
            place_of_report = report_path or usual
            result = report.write(stage / place_of_report.name)
            made_from = {**plan.made_from, _REPORT_ROLE: sha256_file(result)}
            plan = plan.model_copy(update={"made_from": made_from})
            moves.append((result, place_of_report))
        moves.append((plan.write(stage / path.name), path))
        staged.place(moves)
    return plan


def kind_of(branch_replacement: BranchReplacement) -> Replacement:
    """What a plan calls a replacement."""
    if branch_replacement.weight is not None:
        return "linear"
    return "none" if branch_replacement.bias is None else "bias"


def _write(
    path: Path,
    branch_replacements: Mapping[SublayerRef, BranchReplacement],
    weights: Mapping[str, ChangedWeight],
) -> ReplacementsRef:
    from safetensors.torch import save_file

    tensors = {
        key: tensor.detach().cpu().contiguous()
        for name in sorted(branch_replacements)
        for key, tensor in _tensors(name, branch_replacements[name])
    }
    for name, change in sorted(weights.items()):
        for part, numbers in change.parts.items():
            tensors[f"{part}:{name}"] = numbers.detach().cpu().contiguous()
    if not tensors:
        raise HealingError("There is no replacement to write.", "Heal a plan first: depthcut heal.")
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise HealingError(
                f"The fitted {key} holds NaN or infinity.", "Heal with another --calibration."
            )
    save_file(tensors, path)
    make_readable(path)
    return ReplacementsRef(path=path.name, sha256=sha256_file(path))


def _tensors(
    name: SublayerRef, branch_replacement: BranchReplacement
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by their names in the file; a linear map always has a bias there."""
    prefix = f"{name[1]}.{name[0]}"
    bias, weight = branch_replacement.bias, branch_replacement.weight
    if weight is not None:
        yield f"{prefix}.weight", weight
        bias = weight.new_zeros(len(weight)) if bias is None else bias
    if bias is not None:
        yield f"{prefix}.bias", bias
