"""An engine and the record beside it: what belongs together, and what this machine can load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.engines.build.engine_set import built_for, read_sidecar, refuse_mismatch, sidecar_path
from exporter.engines.build.libraries import Device
from exporter.engines.build.settings import BuildSettings
from exporter.errors import ArtifactError, DepthcutError, EngineError, UnsafeInputError
from tests.engine_support import record, written
from tests.raising import raises

ADA = Device("a card", "sm89", 24 << 30)
HOPPER = Device("another card", "sm90", 80 << 30)
TIED: dict[str, Any] = {
    "backend": "tensorrt", "backend_version": "11.4", "settings": BuildSettings(),
    "built_on": {"gpu": "a card", "compute_capability": "sm89", "driver_cuda": "13.0"},
}  # fmt: skip


def test_an_engine_and_its_record_belong_together(tmp_path: Path) -> None:
    engine = written(tmp_path)
    result = read_sidecar(engine)
    assert result == record().model_copy(update={"command": result.command})


@pytest.mark.parametrize(
    ("damage", "kind", "code", "named"),
    [
        (lambda e: e.write_bytes(e.read_bytes()[:-1]), EngineError, "wrong-size", (19, 20)),
        (lambda e: e.write_bytes(e.read_bytes().upper()), EngineError, "wrong-hash", ()),
        (lambda e: sidecar_path(e).unlink(), EngineError, "sidecar-missing", ()),
        (lambda e: sidecar_path(e).write_text("{}"), ArtifactError, None, ()),
        (lambda e: e.unlink(), EngineError, "file-missing", ()),
    ],
)
def test_what_does_not_belong_together_is_refused(
    damage: Callable[[Path], Any],
    kind: type[DepthcutError],
    code: str | None,
    named: tuple[int, ...],
    tmp_path: Path,
) -> None:
    engine = written(tmp_path)
    damage(engine)
    with pytest.raises(kind) if code is None else raises(kind, code, "m.engine", *named):
        read_sidecar(engine)


def test_a_record_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    engine = written(folder)
    sidecar_path(engine).rename(tmp_path / "elsewhere.json")
    sidecar_path(engine).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UnsafeInputError):
        read_sidecar(engine)
    (folder / "here.json").write_bytes((tmp_path / "elsewhere.json").read_bytes())
    sidecar_path(engine).unlink()
    sidecar_path(engine).symlink_to("here.json")
    assert read_sidecar(engine) == record()


@pytest.mark.parametrize(
    ("facts", "version", "card", "code", "named"),
    [
        ({}, "1.7.1.116", ADA, "", ()),
        ({}, "1.6.0.1", HOPPER, "other-version", ("sm89", "1.7.1.116", "sm90", "1.6.0.1")),
        ({}, "1.7.1.116", HOPPER, "other-card", ("--compute-capability sm90",)),
        (TIED, "11.4", ADA, "", ()),
        (TIED, "11.4", HOPPER, "other-card", ("sm90",)),
        (TIED, "11.5", ADA, "other-version", ("11.5",)),
    ],
)
def test_an_engine_for_another_card_or_version_is_refused(
    facts: dict[str, Any], version: str, card: Device, code: str, named: tuple[str, ...]
) -> None:
    made = record(**facts)
    assert built_for(made) == "sm89"
    if not code:
        refuse_mismatch(made, version, [card])
        return
    with raises(EngineError, code, "m.engine", *named):
        refuse_mismatch(made, version, [card])


def test_a_record_of_an_earlier_version_is_read_without_what_was_removed(tmp_path: Path) -> None:
    engine = written(tmp_path)
    content = json.loads(sidecar_path(engine).read_text())
    content["settings"] |= {"strip_weights": False, "refittable": True, "tf32": False}
    content["timing_cache_sha256"] = "0"
    sidecar_path(engine).write_text(json.dumps(content))
    assert read_sidecar(engine).settings == record().settings
