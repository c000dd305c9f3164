from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.cli import run
from exporter.engines import doctor
from exporter.engines.build import libraries as cuda_versions
from exporter.engines.build.libraries import Device, Driver


def found(name: str) -> doctor.Component:
    return next(
        component for component in doctor.diagnose().components if component.name.strip() == name
    )


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these distributions were not installed."""
    version = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in names else version(name))


def test_a_machine_with_a_runtime_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert found("CPUExecutionProvider").found == "loads"
    assert run(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["fit"]


def test_without_a_runtime_it_ends_with_1_and_tells_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    assert run(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "\nonnxruntime: pip install 'depthcut[cpu]'" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_a_runtime_that_does_not_load_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROVIDERS", "import os; os.abort()")
    diagnosis = doctor.diagnose()
    assert not diagnosis.fit
    assert any("does not load" in component.remedy for component in diagnosis.components)


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
    monkeypatch.setattr(doctor, "version_of", lambda _: "1.0")
    monkeypatch.setattr(doctor, "_output_of", lambda program: None if "rtx" in program else "")
    assert found("tensorrt").found == "1.0"
    broken = found("tensorrt-rtx")
    assert broken.found == ""
    assert "does not load" in broken.remedy


CARD = Device("a card", "sm89", 24 << 30)


def installed(monkeypatch: pytest.MonkeyPatch, **cuda: int) -> None:
    """As if these packages were installed alone, built for these versions of CUDA."""
    built = {name.replace("_", "-"): version for name, version in cuda.items()}
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0" if name in built else None)
    monkeypatch.setattr(cuda_versions, "built_for_cuda", built.get)
    monkeypatch.setattr(doctor, "_output_of", lambda program: "")


def test_a_driver_that_is_too_old_is_told_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tensorrt=13, tensorrt_rtx=12, cuda_bindings=13, onnxruntime_gpu=13)
    monkeypatch.setattr(doctor, "ask_driver", lambda: Driver("", "12.8", (CARD,)))
    for name in ("tensorrt", "cuda-bindings", "onnxruntime-gpu"):
        assert "CUDA 13" in found(name).remedy
        assert "[gpu-cu12]" in found(name).remedy
    assert found("tensorrt-rtx").remedy == ""
    monkeypatch.setattr(doctor, "ask_driver", lambda: Driver("", "13.0", (CARD,)))
    assert found("tensorrt").remedy == ""


def test_a_card_that_tensorrt_rtx_does_not_support_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (CARD, Device("another", "sm90", 80 << 30))
    monkeypatch.setattr(doctor, "ask_driver", lambda: Driver("", "13.0", cards))
    assert found("a card").remedy == ""
    assert "sm90" in found("another").remedy


def test_health_on_a_gpu_needs_a_card_and_a_driver_that_is_new_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, onnxruntime_gpu=13, tensorrt=13)
    driver = Driver("", "13.0", (CARD,))
    monkeypatch.setattr(doctor, "ask_driver", lambda: driver)
    assert run(["doctor", "--health", "gpu"]) == 0
    driver = Driver("", "12.8", (CARD,))
    assert run(["doctor", "--health", "gpu"]) == 1
    driver = Driver("no NVIDIA driver")
    assert run(["doctor", "--health", "gpu"]) == 1
    assert run(["doctor", "--health", "cpu"]) == 0
    assert "no NVIDIA driver" in capsys.readouterr().out
    missing(monkeypatch, "onnxruntime-gpu")
    assert run(["doctor", "--health", "cpu"]) == 1


def test_health_makes_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a GPU would disturb what is measured meanwhile."""
    programs: list[str] = []
    run_program = doctor._output_of
    monkeypatch.setattr(
        doctor, "_output_of", lambda text: programs.append(text) or run_program(text)
    )
    assert doctor.health("cpu").fit
    doctor.health("gpu")
    assert programs == ["import onnxruntime"] * 2
