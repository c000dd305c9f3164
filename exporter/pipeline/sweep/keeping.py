"""What a cell depends on, and what an earlier run has left of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exporter.artifacts import CellRecord, SweepCell
from exporter.artifacts.ledger import StageLedger, locked
from exporter.artifacts.plans.by_score import parse_drops
from exporter.artifacts.store import key_hash
from exporter.errors import ArtifactError
from exporter.files import sha256_bytes, sha256_file, write_text
from exporter.pipeline.keys import plan_file_hash, request_key
from exporter.pipeline.run import ARMS, QUANTIZED
from exporter.pipeline.sweep.cells import Cell

CELL_FILE = "cell.json"


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
        plan = plan_file_hash(given)
    return key_hash(request_key(cell.request, source_sha256, plan))


def source_hashes() -> Callable[[Cell], str]:
    """Hashes each model once, however many cells it has."""
    from exporter.models.loading.model_source import source_sha256

    known: dict[tuple[str, str | None], str] = {}

    def sha256(cell: Cell) -> str:
        source, load = cell.request.source, cell.request.load
        name = (source, load.revision)
        if name not in known:
            known[name] = source_sha256(
                source,
                revision=load.revision,
                allow_pickle=load.allow_pickle,
                allow_any_model_type=load.allow_any_model_type,
                trust_remote_code=load.trust_remote_code,
            )
        return known[name]

    return sha256


def drop_models(cell: Cell) -> None:
    """Removes the weights of a cell that was measured, where only its reports are wanted."""
    if not cell.keeps_models:
        with locked(cell.request.out):
            StageLedger(cell.request.out).drop(*ARMS, *QUANTIZED.values())


def kept(cell: Cell, key: str) -> SweepCell | None:
    """The cell as an earlier run has finished it from the same; None where it must run."""
    folder = cell.request.out
    try:
        found = CellRecord.read(folder / CELL_FILE, named=False).cell
    except ArtifactError:
        return None
    report, model = folder / "report.json", folder / "candidate" / "model.onnx"
    if found.status != "done" or found.key != key or not report.is_file():
        return None
    if cell.keeps_models and not model.is_file():
        return None
    return found if sha256_file(report) == found.report_sha256 else None
