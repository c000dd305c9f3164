from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from exporter.cli import run
from exporter.engines import doctor
from exporter.engines.build.driver import Device, Driver


def found(name: str) -> doctor.Component:
    return next(each for each in doctor.diagnose().components if each.name.strip() == name)


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these distributions were not installed."""
    version = metadata.version

    def asked(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", asked)


def test_a_machine_with_a_runtime_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert found("CPUExecutionProvider").found == "loads"
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fit"]


def test_without_a_runtime_it_ends_with_1_and_tells_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    assert run(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "\nonnxruntime: pip install 'depthcut[cpu]'" in told
    assert max(map(len, told.splitlines())) <= 100


def test_a_runtime_that_does_not_load_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROVIDERS", "import os; os.abort()")
    told = doctor.diagnose()
    assert not told.fit
    assert any("does not load" in each.remedy for each in told.components)


def test_files_of_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "numpy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert doctor.diagnose().fit


def test_a_driver_and_its_cards_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (Device("a card", "sm89", 24 << 30),)
    monkeypatch.setattr(doctor, "ask_driver", lambda: Driver("", "13.0", cards))
    assert found("NVIDIA driver").found == "CUDA 13.0"
    assert found("a card").found == "sm89, 24 GiB"
    monkeypatch.setattr(doctor, "ask_driver", lambda: Driver("no NVIDIA driver"))
    assert found("NVIDIA driver").remedy.startswith("no NVIDIA driver")


def test_what_runs_engines_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "cuda-bindings")
    component = found("cuda-bindings")
    assert (component.found, component.remedy) == ("", "pip install 'depthcut[rtx]'")


def test_an_engine_library_that_does_not_load_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda _: "1.0")
    monkeypatch.setattr(doctor, "_output_of", lambda program: None if "rtx" in program else "")
    assert found("tensorrt").found == "1.0"
    broken = found("tensorrt-rtx")
    assert broken.found == ""
    assert "does not load" in broken.remedy
