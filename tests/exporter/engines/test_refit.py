"""What a refit refuses before it touches anything; the refit itself needs a GPU (tests/gpu)."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_support import record, written

from exporter.engines.build import refit
from exporter.engines.build.driver import ask_driver
from exporter.engines.build.settings import BuildSettings, Profile
from exporter.engines.build.sidecar import read_sidecar
from exporter.errors import BackendError, EngineError, UsageError
from exporter.files import sha256_file
from graph_passes import save_model
from tests.raising import raises
from tests.stand_in.decoders import decoder_onnx
from tests.tiny_graphs import TinySpec, tiny_model

REFITTABLE = BuildSettings(compute_capabilities=("sm89",), refittable=True)
no_driver = pytest.mark.skipif(not ask_driver().problem, reason="there is an NVIDIA driver")


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    save_model(tiny_model(TinySpec()), path)
    return path


def test_fixed_weights_stay(onnx: Path, tmp_path: Path) -> None:
    with raises(EngineError, "weights-fixed") as caught:
        refit.refit_engine(written(tmp_path), onnx, tmp_path / "new.engine")
    assert "--refittable" in (caught.value.hint or "")


def test_the_graph_of_another_cut_is_refused(onnx: Path, tmp_path: Path) -> None:
    plan = [{"kind": "attention", "layer": 1, "replacement": "none"}]
    engine = written(tmp_path, settings=REFITTABLE, plan=plan)
    with raises(EngineError, "other-sublayers"):
        refit.refit_engine(engine, onnx, tmp_path / "new.engine")


STRIPPED = BuildSettings(compute_capabilities=("sm89",), strip_weights=True)


def test_a_stripped_engine_takes_back_its_own_weights_alone(onnx: Path, tmp_path: Path) -> None:
    """Others are undefined behaviour, a healed model's with the same plan too."""
    engine = written(tmp_path, settings=STRIPPED, made_from={"model": "0" * 64})
    with raises(EngineError, "other-weights") as caught:
        refit.refit_engine(engine, onnx, tmp_path / "new.engine")
    assert "--refittable" in (caught.value.hint or "")


@no_driver
@pytest.mark.parametrize("settings", [STRIPPED, REFITTABLE])
def test_weights_that_fit_are_refused_by_the_driver_alone(
    settings: BuildSettings, onnx: Path, tmp_path: Path
) -> None:
    own = {"model": sha256_file(onnx)}
    made_from = {"model": "0" * 64} if settings.refittable else own
    engine = written(tmp_path, settings=settings, made_from=made_from)
    with raises(BackendError, "no-driver"):
        refit.refit_engine(engine, onnx, tmp_path / "new.engine")


@pytest.mark.parametrize("target", ["m.engine", "."])
def test_the_engine_itself_is_not_replaced(target: str, onnx: Path, tmp_path: Path) -> None:
    engine = written(tmp_path, settings=REFITTABLE)
    before = engine.read_bytes()
    with pytest.raises(UsageError):
        refit.refit_engine(engine, onnx, tmp_path / target)
    assert engine.read_bytes() == before


@no_driver
def test_without_a_driver_nothing_is_written(onnx: Path, tmp_path: Path) -> None:
    engine = written(tmp_path, settings=REFITTABLE)
    with raises(BackendError, "no-driver"):
        refit.refit_engine(engine, onnx, tmp_path / "new.engine")
    assert not (tmp_path / "new.engine").exists()


@no_driver
@pytest.mark.rtx
def test_its_process_asks_the_driver_too(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = written(tmp_path, settings=REFITTABLE)
    monkeypatch.setattr(refit, "refuse_unready", lambda _: None)
    with raises(EngineError, "no-driver"):
        refit.refit_engine(engine, onnx, tmp_path / "new.engine")
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("model")}
    assert left == {"m.engine", "m.engine.json"}


@pytest.mark.parametrize(("version", "told_by"), [("10.16.0.72", "mask"), ("11.0.0.12", "lengths")])
def test_the_graph_is_changed_as_it_was_for_the_build(
    version: str, told_by: str, tmp_path: Path
) -> None:
    """A later library that loads the engine has lengths; the engine's own may have had none."""
    onnx = decoder_onnx(tmp_path, in_place=True)
    decode = Profile(phase="decode", shapes={})
    built = record(
        backend="tensorrt", backend_version=version, profiles=[decode], settings=REFITTABLE
    )
    attention = refit._as_built(onnx, built).attention
    assert attention is not None
    assert attention.told_by == told_by


def test_the_record_is_that_of_the_new_engine(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refit itself is left out: it is told files that are there, and makes one."""

    def job(library: object, request: dict[str, str], *_: object) -> None:
        asked.append(request)
        assert all(Path(request[name]).is_file() for name in ("engine", "onnx", "graph"))
        Path(request["target"]).write_bytes(b"with other weights")

    asked: list[dict[str, str]] = []
    monkeypatch.setattr(refit, "refuse_unready", lambda _: None)
    monkeypatch.setattr(refit, "run_job", job)
    engine = written(tmp_path, settings=REFITTABLE)
    target, new = refit.refit_engine(engine, onnx, tmp_path / "new" / "m.engine")
    assert read_sidecar(target) == new
    assert (new.made_from, new.engine) == ({"model": sha256_file(onnx)}, "m.engine")
    assert target.read_bytes() == b"with other weights"
    assert [each["job"] for each in asked] == ["refit"]
    assert sorted(each.name for each in target.parent.iterdir()) == ["m.engine", "m.engine.json"]
