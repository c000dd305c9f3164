"""Beside a project whose packages are called as depthcut's: its tests run, nothing is mixed up."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = {"exporter", "graph_passes", "depthcut_command", "depthcut_packages", "depthcut_pytest"}

_FROM_WHEEL = """
import runpy, sys
wheel, checkout, *rest = sys.argv[1:]
own = {"", checkout, f"{checkout}/exporter/cli/entry_points"}
sys.path[:] = ["", wheel, *(path for path in sys.path if path not in own)]
sys.argv = rest
runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Packages of its own under both names, and tests of them."""
    home = tmp_path / "project"
    for name in ("exporter", "graph_passes"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text(f"WHOSE = 'the project: {name}'\n")
    (home / "test_own.py").write_text(
        "import exporter, graph_passes\n"
        "def test_own():\n"
        "    assert (exporter.WHOSE + graph_passes.WHOSE).count('the project') == 2\n"
    )
    (home / "test_gate.py").write_text("def test_gate(depthcut):\n    assert depthcut\n")
    return home


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, unpacked as pip would."""
    pytest.importorskip("hatchling")
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = place.glob("*.whl")
    with zipfile.ZipFile(file) as packed:
        names = packed.namelist()
        assert len(names) == len(set(names))
        packed.extractall(place / "site")
    return place / "site"


def called(
    folder: Path, *arguments: str, wheel: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a module of Python in a folder, with what is installed or with a wheel."""
    how = ["-m"] if wheel is None else ["-c", _FROM_WHEEL, str(wheel), str(ROOT)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=folder,
        env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def outcome(folder: Path, *arguments: str, wheel: Path | None = None) -> tuple[int, str]:
    quiet = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark")
    done = called(folder, "pytest", *quiet, *arguments, wheel=wheel)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(params=["installed here", "wheel"])
def site(request: pytest.FixtureRequest) -> Path | None:
    return request.getfixturevalue("wheel") if request.param == "wheel" else None


def test_its_tests_run(project: Path, site: Path | None) -> None:
    code, result = outcome(project, "test_own.py", wheel=site)
    assert "1 passed" in result
    assert code == 0
    _, result = outcome(project, "--fixtures", "test_own.py", wheel=site)
    assert "\ndepthcut --" in result  # the plugin was there


def test_what_needs_depthcut_says_what_hides_it(project: Path, site: Path | None) -> None:
    code, result = outcome(project, wheel=site)
    assert code == 1
    assert "1 passed, 1 error" in result
    assert f"The package exporter at {project / 'exporter'} hides" in result
    assert "Traceback" not in result


def test_the_command_says_so_too(project: Path, site: Path | None) -> None:
    script = "import depthcut_command; depthcut_command.main()"
    (project / "as_a_script.py").write_text(script)
    done = called(project, "as_a_script", "--version", wheel=site)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(project / "exporter") in line
    elsewhere = project.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "as_a_script.py").write_text(script)
    done = called(elsewhere, "as_a_script", "--version", wheel=site)
    assert (done.returncode, done.stdout[:9]) == (0, "depthcut ")


def test_the_wheel_has_no_other_names(wheel: Path) -> None:
    result = {path.name.removesuffix(".py") for path in wheel.iterdir()}
    assert {name for name in result if not name.endswith(".dist-info")} == TOP
    assert not (wheel / "exporter" / "cli" / "entry_points").exists()
    points = configparser.ConfigParser()
    (info,) = wheel.glob("*.dist-info")
    points.read(info / "entry_points.txt")
    assert dict(points["console_scripts"]) == {"depthcut": "depthcut_command:main"}
    assert dict(points["pytest11"]) == {"depthcut": "depthcut_pytest"}
