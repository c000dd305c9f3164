from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_support import record, written

from exporter.engines.build.engine_set import built_for, read_sidecar, refuse_mismatch, sidecar_path
from exporter.engines.build.libraries import Device
from exporter.engines.build.settings import BuildSettings
from exporter.errors import ArtifactError, EngineError, UnsafeInputError
from tests.raising import raises

ADA = Device("a card", "sm89", 24 << 30)
HOPPER = Device("another card", "sm90", 80 << 30)


def test_an_engine_and_its_record_belong_together(tmp_path: Path) -> None:
    engine = written(tmp_path)
    assert read_sidecar(engine) == record().model_copy(
        update={"command": read_sidecar(engine).command}
    )


def test_a_cut_off_engine_is_refused(tmp_path: Path) -> None:
    engine = written(tmp_path)
    engine.write_bytes(engine.read_bytes()[:-1])
    with raises(EngineError, "wrong-size", 19, "m.engine.json", 20):
        read_sidecar(engine)


def test_another_engine_of_the_same_size_is_refused(tmp_path: Path) -> None:
    engine = written(tmp_path)
    engine.write_bytes(engine.read_bytes().upper())
    with raises(EngineError, "wrong-hash", "m.engine.json"):
        read_sidecar(engine)


def test_an_engine_without_a_record_is_refused(tmp_path: Path) -> None:
    engine = written(tmp_path)
    sidecar_path(engine).unlink()
    with raises(EngineError, "sidecar-missing", "m.engine.json"):
        read_sidecar(engine)


def test_a_broken_record_is_refused(tmp_path: Path) -> None:
    engine = written(tmp_path)
    sidecar_path(engine).write_text("{}")
    with pytest.raises(ArtifactError):
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


def test_a_missing_engine_is_told(tmp_path: Path) -> None:
    with raises(EngineError, "file-missing"):
        read_sidecar(tmp_path / "none.engine")


def test_an_engine_for_this_card_and_version_passes() -> None:
    refuse_mismatch(record(), "1.7.1.116", [ADA])


def test_another_card_and_version_are_refused() -> None:
    with raises(EngineError, "other-version", "m.engine", "sm89", "1.7.1.116", "sm90", "1.6.0.1"):
        refuse_mismatch(record(), "1.6.0.1", [HOPPER])


def test_another_card_alone_is_refused_with_the_way_out() -> None:
    with raises(EngineError, "other-card", "m.engine", "--compute-capability sm90"):
        refuse_mismatch(record(), "1.7.1.116", [HOPPER])


def test_an_engine_of_tensorrt_is_tied_to_its_card_unless_made_compatible() -> None:
    facts = {"backend": "tensorrt", "backend_version": "11.4", "built_on": {
        "gpu": "a card", "compute_capability": "sm89", "driver_cuda": "13.0"}}  # fmt: skip
    tied = record(settings=BuildSettings(), **facts)
    assert built_for(tied) == "sm89"
    with raises(EngineError, "other-card", "sm90"):
        refuse_mismatch(tied, "11.4", [HOPPER])
    kin = record(settings=BuildSettings(hardware_compatibility="same-compute-capability"), **facts)
    refuse_mismatch(kin, "11.4", [ADA])
    with raises(EngineError, "other-card", "sm90"):
        refuse_mismatch(kin, "11.4", [HOPPER])
    free = record(settings=BuildSettings(hardware_compatibility="ampere+"), **facts)
    refuse_mismatch(free, "11.4", [HOPPER])


def test_a_version_compatible_engine_runs_on_another_version() -> None:
    settings = BuildSettings(version_compatible=True)
    facts = {"backend": "tensorrt", "backend_version": "11.4", "built_on": {}}
    refuse_mismatch(record(settings=settings, **facts), "11.5", [ADA])
    with pytest.raises(EngineError):
        refuse_mismatch(record(settings=BuildSettings(), **facts), "11.5", [ADA])


def test_a_record_of_an_earlier_version_is_read_without_what_was_removed(tmp_path: Path) -> None:
    engine = written(tmp_path)
    told = json.loads(sidecar_path(engine).read_text())
    told["settings"] |= {"strip_weights": False, "refittable": True}
    sidecar_path(engine).write_text(json.dumps(told))
    assert read_sidecar(engine).settings == record().settings
