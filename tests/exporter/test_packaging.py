"""What an installed depthcut holds, read off a wheel built from this tree."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_wheel_holds_two_packages_and_its_entry_points(wheel: zipfile.ZipFile) -> None:
    """Other names are surely ours: a wheel's modules share one folder with everybody's."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    info = {name for name in tops if name.endswith(".dist-info")}
    others = tops - info - {"exporter", "graph_passes"}
    assert others
    assert all(name.startswith("depthcut_") for name in others)
    assert {"exporter/py.typed", "graph_passes/py.typed"} <= set(wheel.namelist())


def test_the_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    name = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "depthcut = depthcut_command:main" in wheel.read(name).decode()


def test_base_needs_neither_torch_nor_a_runtime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = " ".join(project["dependencies"])
    assert not any(name in base for name in ("torch", "onnxruntime", "transformers", "tensorrt"))
    assert {"cpu", "gpu", "rtx", "optimum", "demo", "eval", "dev"} <= set(
        project["optional-dependencies"]
    )


def test_the_version_is_told_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    from exporter import __version__

    assert project["version"] == __version__
