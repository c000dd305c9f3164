"""From scores and a budget, or from a user's own list, to a plan. Needs no PyTorch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    ModelRef,
    PlannedDeletion,
    PruningPlan,
    Score,
)
from exporter.artifacts.plan_dialects import foreign_deletions
from exporter.artifacts.stacks import DECODER_KINDS, DECODER_UNITS, Stacks, refuse_other_stacks
from exporter.errors import PlanError, UsageError
from exporter.files import sha256_file
from exporter.printable import are, counted
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import TABLE_BYTES, read_json
from graph_passes.plan_record import canonical_json
from graph_passes.types import MOST_LAYERS, DeletionKind, SublayerRef

MODEL_KEY = "depthcut.model"
"""Where a graph's metadata has the SHA-256 of the model that it was exported from."""
CONTENT = "content:"
_TEXTS_KEY = "depthcut.texts"
_ROLE = "model"


def note_texts(
    metadata: MutableMapping[str, str], roles: Mapping[str, Iterable[CalibrationRef]]
) -> None:
    """Adds to a graph's metadata by what texts it was made, by their role.

    That is their SHA-256, and behind ``content:`` what copies are known by. Names are left out:
    they may be paths of this machine.
    """
    noted = noted_texts(metadata)
    for role, refs in roles.items():
        for ref in refs:
            known = {ref.sha256, *([f"{CONTENT}{ref.content}"] if ref.content else [])}
            noted[role] = sorted({*noted.get(role, ()), *known})
    if noted:
        metadata[_TEXTS_KEY] = canonical_json(noted)


def noted_texts(metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """What :func:`note_texts` noted; an unreadable note counts as none."""
    try:
        return TypeAdapter(dict[str, list[str]]).validate_json(metadata.get(_TEXTS_KEY, "{}"))
    except ValidationError:
        return {}


def parents_of(report: ImportanceReport, importance_sha256: str | None) -> dict[str, str]:
    """What a plan by scores is made from: the model, and the scores' file where it is known."""
    scores = {} if importance_sha256 is None else {"importance": importance_sha256}
    return {**scores, _ROLE: report.model.sha256}


def hold_against_model(
    plan: PruningPlan,
    sha256: str | None,
    *,
    model: str,
    path: Path | None = None,
    refits: bool = False,
    progress: Progress = QUIET,
) -> None:
    """Warns of a plan for another model, and refuses replacements that were fitted to one.

    Nothing is said where one of the two doesn't tell: a plan by hand, a graph from elsewhere.
    """
    meant = plan.made_from.get(_ROLE)
    if meant is None or sha256 is None or meant == sha256:
        return
    text = (
        f"{path or 'the plan'} was made for another model (sha256 {meant[:12]}) than {model} "
        f"(sha256 {sha256[:12]})"
    )
    if plan.replacements is not None and not refits:
        raise PlanError(
            f"{text[:1].upper()}{text[1:]}, and its replacements were fitted to that one.",
            "Fit them to this model: depthcut heal.",
            code="another-model",
        )
    progress.say(f"plan: warning: {text}; sublayers that are redundant there may be needed here")


_NOUNS = {
    "attention": "attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "block": "block",
}
_DROP = re.compile(r"(?P<kind>[a-z_]+):(?P<layers>\d+(-\d+)?(,\d+(-\d+)?)*)")
_DROP_HINT = "Write kind:layers, such as attention:25,26 or mlp:3-5."
JOINT_KINDS = DECODER_KINDS
"""What a joint number chooses among; most models have no cross-attention."""


def plan_cut(
    report: ImportanceReport,
    *,
    attention: int = 0,
    cross_attention: int = 0,
    mlp: int = 0,
    block: int = 0,
    joint: int = 0,  # how many sublayers to drop, those of all kinds sorted together
    importance_sha256: str | None = None,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> PruningPlan:
    """Chooses the most redundant sublayers: the lowest scores, ties by layer.

    That is the one-shot choice of arXiv 2406.15786, section 3.3. Several numbers may be given when
    they can't name a sublayer twice. Deletions stand in the order of choice: by score within a
    kind, kinds in the order of the arguments.

    Args:
        report: What :func:`exporter.score_model` gives.
        attention: How many attentions to drop.
        cross_attention: How many cross-attentions of a decoder that has them.
        mlp: How many MLPs.
        block: How many whole layers.
        joint: How many sublayers to drop, attentions and MLPs sorted together.
        importance_sha256: The hash of the report's file, which the plan then names.
        allow_all: Also takes all attentions and all MLPs; without it one of them is left.
        progress: Hears a warning of a plan that drops the first or last layer.

    Raises:
        PlanError: There are fewer of a kind, their scores weren't measured, or two numbers name
            one sublayer.
    """
    budget = {
        "attention": attention,
        "cross_attention": cross_attention,
        "mlp": mlp,
        "block": block,
        "joint": joint,
    }
    if min(budget.values()) < 0 or not any(budget.values()):
        numbers = ", ".join(f"{number} of {name}" for name, number in budget.items())
        raise PlanError(
            f"Nothing is to be dropped: {numbers}.",
            "Ask for at least one sublayer or block.",
            code="nothing-asked",
        )
    if joint and any(budget[kind] for kind in JOINT_KINDS):
        raise PlanError(
            "A joint number already covers attentions and MLPs.",
            "Ask for a joint number, or for one of each kind.",
            code="dropped-twice",
        )
    chosen = [
        *_lowest(report, ("attention",), attention),
        *_lowest(report, ("cross_attention",), cross_attention),
        *_lowest(report, ("mlp",), mlp),
        *_lowest(report, ("block",), block),
        *_lowest(report, JOINT_KINDS, joint),
    ]
    plan = PruningPlan(
        deletions=[PlannedDeletion(layer=score.layer, kind=score.kind) for score in chosen],
        encoder_layers=report.model.encoder_layers,
        budget={name: number for name, number in budget.items() if number},
        importance_sha256=importance_sha256,
        made_from=parents_of(report, importance_sha256),
        chosen_on=report.calibration.texts,
    )
    kinds = tuple({score.kind for score in report.scores})
    validate_for(plan, report.model, kinds, allow_all=allow_all)
    _warn_of_ends(plan, report.model.num_layers, progress)
    return plan


def keep_first(
    report: ImportanceReport, number: int, *, importance_sha256: str | None = None
) -> PruningPlan:
    """Drops the blocks of all layers but the first, the last first: an early exit."""
    layers = report.model.num_layers
    if number >= layers:
        raise PlanError(
            f"{report.model.source} has {layers} layers; --keep-first {number} drops none.",
            f"Keep at most {layers - 1}.",
            code="nothing-to-drop",
        )
    return PruningPlan(
        deletions=[
            PlannedDeletion(layer=layer, kind="block") for layer in reversed(range(number, layers))
        ],
        budget={"keep_first": number},
        importance_sha256=importance_sha256,
        made_from=parents_of(report, importance_sha256),
    )


def parse_drops(texts: Iterable[str]) -> PruningPlan:
    """Makes a plan by hand from texts such as ``attention:25,26``, ``mlp:3`` or ``block:3-7``."""
    deletions = [deletion for text in texts for deletion in _parse_drop(text)]
    _check_not_empty(deletions)
    _check_once(deletions)
    return PruningPlan(deletions=deletions)


def read_plan(path: Path) -> PruningPlan:
    """Reads a plan file, or a model's config that says in another's dialect what is dropped.

    Those are LLM-Drop's lists, Puzzletron's ``block_configs`` and what depthcut writes into a
    pruned checkpoint's ``config.json``.
    """
    plan = _foreign_plan(path) or PruningPlan.read(path)
    _check_not_empty(plan.deletions, f"{path}: ")
    _check_once(plan.deletions, f"{path}: ")
    return plan


def is_foreign_plan(path: Path) -> bool:
    """Whether a plan stands in somebody's config, and not in a file of depthcut's own."""
    return _foreign_plan(path) is not None


def _foreign_plan(path: Path) -> PruningPlan | None:
    """None for a plan of our own, and for what can't be read: that has its errors elsewhere."""
    try:
        content = read_json(path, limit=TABLE_BYTES, named=True)
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and "schema_version" in content:
        return None
    deletions = foreign_deletions(content, str(path))
    if deletions is None:
        return None
    return PruningPlan(deletions=deletions, made_from={"config": sha256_file(path)})


def validate_plan(
    plan: PruningPlan,
    num_layers: int,
    kinds: Sequence[str] = ("attention", "mlp", "block"),
    *,
    encoder_layers: int | None = None,  # None for a model of one stack
    model: str = "the model",
    path: Path | None = None,  # the plan's file, for errors; None when it comes from no file
    allow_all: bool = False,
) -> None:
    """Holds a plan against the model that it is meant for."""
    where = "" if path is None else f"{path}: "
    _check_not_empty(plan.deletions, where)
    refuse_other_stacks(plan, encoder_layers, where, model)
    if encoder_layers is not None:
        kinds = DECODER_UNITS
    for deletion in plan.deletions:
        _check_known(deletion, num_layers, kinds, where, model)
    _check_once(plan.deletions, where)
    stacks = Stacks.numbered(num_layers, encoder_layers)
    if encoder_layers is not None:
        stacks.every(plan.deletions)  # refuses what a layer of its stack doesn't have
    left = {*stacks.every((layer, "block") for layer in range(num_layers))}
    if not allow_all and left <= {ref for item in plan.deletions for ref in _all_of(item)}:
        raise PlanError(
            f"{where}The plan drops every attention and every MLP of {model}.",
            "Keep at least one, or give --allow-empty.",
            code="nothing-left",
        )


def _check_known(
    deletion: PlannedDeletion, num_layers: int, kinds: Sequence[str], where: str, model: str
) -> None:
    if not 0 <= deletion.layer < num_layers:
        raise PlanError(
            f"{where}The plan drops {deletion.kind} {deletion.layer}, but {model} has only "
            f"layers 0 to {num_layers - 1}.",
            "Remove that layer from the plan, or make a plan for this model: depthcut plan.",
            code="layer-missing",
        )
    if deletion.kind not in kinds:
        raise PlanError(
            f"{where}The plan drops {deletion.kind} {deletion.layer}, but in {model} there is "
            f"no {deletion.kind} to drop.",
            f"Kinds that can be dropped here: {', '.join(sorted(kinds))}.",
            code="sublayer-missing",
        )


def validate_for(
    plan: PruningPlan,
    model: ModelRef,
    kinds: Sequence[str] = ("attention", "mlp", "block"),
    *,
    allow_all: bool = False,
) -> None:
    """:func:`validate_plan` for a model as reports speak of it."""
    validate_plan(
        plan,
        model.num_layers,
        kinds,
        encoder_layers=model.encoder_layers,
        model=model.source,
        allow_all=allow_all,
    )


def _lowest(report: ImportanceReport, kinds: Sequence[DeletionKind], number: int) -> list[Score]:
    candidates = [score for score in report.scores if score.kind in kinds]
    if number > len(candidates):
        left, names = len(candidates), [_NOUNS[kind] for kind in kinds]
        what = counted(number, " or ".join(names), " and ".join(f"{name}s" for name in names))
        raise PlanError(
            f"{what} {are(number)} to be dropped, but only {left} of {report.model.source} "
            f"{are(left)} scored and may be dropped.",
            f"The most that can be asked for is {left}."
            + " Blocks are scored by --metric kl with --blocks."
            * (kinds == ("block",) and not left),
            code="too-many",
        )
    for score in candidates:
        if not math.isfinite(score.score):
            raise PlanError(
                f"The score of {score.kind} {score.layer} of {report.model.source} is "
                f"{score.score}; it can't be ranked.",
                "Score the model again.",
                code="not-finite",
            )
    ranked = sorted(candidates, key=lambda score: (score.score, score.layer, score.kind))
    return ranked[:number]


def _parse_drop(text: str) -> list[PlannedDeletion]:
    match = _DROP.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} does not say what to drop.", _DROP_HINT, code="malformed-drop")
    kind = next((kind for kind in get_args(DeletionKind) if kind == match["kind"]), None)
    if kind is None:
        raise UsageError(
            f"{text!r}: {match['kind']} is not a kind of sublayer.",
            f"Kinds are {', '.join(get_args(DeletionKind))}.",
            code="malformed-drop",
        )
    numbers = [layer for part in match["layers"].split(",") for layer in _layer_range(part, text)]
    return [PlannedDeletion(layer=layer, kind=kind) for layer in numbers]


def _layer_range(part: str, text: str) -> range:
    first, _, last = part.partition("-")
    low, high = int(first), int(last or first)
    if low > high or high >= MOST_LAYERS:
        raise UsageError(
            f"{text!r}: {part} is not a range of layers.", _DROP_HINT, code="malformed-drop"
        )
    return range(low, high + 1)


def _check_not_empty(deletions: Sequence[PlannedDeletion], where: str = "") -> None:
    if not deletions:
        raise PlanError(f"{where}The plan drops nothing.", _DROP_HINT, code="drops-nothing")


def _check_once(deletions: Iterable[PlannedDeletion], where: str = "") -> None:
    seen: set[SublayerRef] = set()
    for ref in (ref for deletion in deletions for ref in _all_of(deletion)):
        if ref in seen:
            raise PlanError(
                f"{where}The plan drops {ref} twice.",
                "Name it once. A block stands for the attention and the MLP of its layer.",
                code="dropped-twice",
            )
        seen.add(ref)


def _all_of(deletion: PlannedDeletion) -> list[SublayerRef]:
    """What it may remove of any model: a block also the cross-attention, where there is one."""
    if deletion.kind == "block":
        return [SublayerRef(deletion.layer, kind) for kind in JOINT_KINDS]
    return list(deletion.sublayers)


def _warn_of_ends(plan: PruningPlan, num_layers: int, progress: Progress) -> None:
    for name, layer in (("first", 0), ("last", num_layers - 1)):
        kinds = [deletion.kind for deletion in plan.deletions if deletion.layer == layer]
        if kinds:
            progress.say(
                f"plan: warning: {' and '.join(kinds)} of the {name} layer ({layer}) is to be "
                "dropped; that often does far more damage than its score suggests"
            )
