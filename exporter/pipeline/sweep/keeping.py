"""What a cell depends on, and what an earlier run has left of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from exporter.artifacts import SweepCell
from exporter.artifacts.ledger import FOLDER, StageLedger, locked
from exporter.artifacts.plans.by_score import parse_drops
from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.artifacts.store import Store, key_hash
from exporter.files import sha256_bytes, write_text
from exporter.models.loading.sources import source_sha256
from exporter.pipeline.keys import request_key
from exporter.pipeline.planning import given_plan_hash
from exporter.pipeline.run import ARMS, QUANTIZED
from exporter.pipeline.sweep.cells import Cell


def plan_text(cell: Cell) -> str | None:
    """The plan that the sweep's file has written out; the same whoever writes it, and when."""
    if not cell.drops:
        return None
    return parse_drops(cell.drops).model_copy(update={"versions": {}, "command": []}).to_json()


def write_plan(cell: Cell) -> None:
    """Puts that plan where the cell's request expects it."""
    text, path = plan_text(cell), cell.request.drops.plan
    if text is not None and path is not None and not _holds(path, text):
        write_text(path, text)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def cell_key(cell: Cell, source_sha256: str) -> str:
    """The hash of everything that a cell depends on, but for the machine.

    Raises:
        ArtifactError: The plan's file is not valid.
    """
    given, written = cell.request.drops.plan, plan_text(cell)
    plan = None if written is None else sha256_bytes(written.encode())
    if plan is None and given is not None:
        plan = given_plan_hash(LoadedPlan.read(given))
    return key_hash(request_key(cell.request, source_sha256, plan))


def source_hashes() -> Callable[[Cell], str]:
    """Hashes each model once, however many cells it has."""
    known: dict[tuple[str, str | None], str] = {}

    def sha256(cell: Cell) -> str:
        source, load = cell.request.source, cell.request.load
        name = (source, load.revision)
        if name not in known:
            known[name] = source_sha256(source, **load.reading)
        return known[name]

    return sha256


def drop_models(cell: Cell) -> None:
    """Removes the weights of a cell that was measured, where only its reports are wanted."""
    if not cell.keeps_models:
        with locked(cell.request.out):
            StageLedger(cell.request.out).drop(*ARMS, *QUANTIZED.values())


def open_store(out: Path) -> Store:
    """The finished cells of a sweep's folder, by their folders."""
    return Store(out / FOLDER / "cells.jsonl", folder=out.resolve())


def kept(store: Store, cell: Cell, key: str) -> SweepCell | None:
    """The cell as an earlier run has finished it from the same; None where it must run."""
    told = store.find(cell.folder, key)
    if cell.keeps_models and not (cell.request.out / "candidate" / "model.onnx").is_file():
        return None
    with contextlib.suppress(ValidationError):
        return None if told is None else SweepCell.model_validate(told)
    return None


def keep(store: Store, cell: Cell, found: SweepCell) -> None:
    """Keeps a cell for the next run, as long as its report is as it was."""
    report = cell.request.out / "report.json"
    if report.is_file():
        store.keep(cell.folder, found.model_dump(mode="json"), found.key, [report])
