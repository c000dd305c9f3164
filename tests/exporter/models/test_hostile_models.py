"""Models of strangers: nothing of theirs runs, asks the network or reads elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.hostile_models import BROKEN, RAN, REFUSED, SECRET, made, outside
from tests.reading import in_file
from tests.tiny_models import tiny_loaded, tiny_tokenizer

RUNNER = Path(__file__).parents[1] / "hostile_runner.py"
ROOT = Path(__file__).parents[3]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("5", marks=pytest.mark.torch),
        pytest.param("4.57", marks=pytest.mark.optimum),
    ],
)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of each case, by its name; all in one process, for importing takes seconds."""
    from exporter.models.loading.model_files import save_checkpoint

    home = tmp_path_factory.mktemp("hostile")
    good, aim = home / "good", outside(home / "outside")
    save_checkpoint(tiny_loaded("llama", tiny_tokenizer()), good)
    cases = {**REFUSED, **{name: (change, ()) for name, change in BROKEN.items()}}
    calls = {"good": _command(good, home / "good.json", ())}
    for number, (name, (change, options)) in enumerate(cases.items()):
        folder = made(good, home / str(number), change, aim)
        calls[name] = _command(folder, home / f"{number}.json", options)
    return dict(zip(calls, _run(home, aim, list(calls.values())), strict=True)), home, aim


def _command(folder: Path, output: Path, options: tuple[str, ...]) -> list[str]:
    sizes = ("--samples", "2", "--sequence-length", "16", "--calibration", "pydoc")
    more = in_file(output.parent, options) if options else []
    return ["score", str(folder), "-o", str(output), "-q", *sizes, *more]


def _run(home: Path, aim: Path, calls: list[list[str]]) -> list[dict[str, Any]]:
    (home / "calls.json").write_text(json.dumps(calls))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(home / "calls.json")],
        cwd=aim,  # relative paths of hostile models lead here
        env={"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "HOME": str(home), "HF_TOKEN": "hf_x"},
        capture_output=True, text=True, timeout=540, check=True,
    )  # fmt: skip
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_good_model_is_scored_without_the_network(told: Any) -> None:
    result, home, _ = told
    assert result["good"]["code"] == 0, result["good"]["said"]
    assert not result["good"]["network"]
    assert (home / "good.json").is_file()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_is_refused(told: Any, name: str) -> None:
    result = told[0][name]
    assert result["code"] == 2, result
    _is_harmless(result, told)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_gives_one_line(told: Any, name: str) -> None:
    result = told[0][name]
    assert result["code"] in (1, 2), result
    _is_harmless(result, told)


def _is_harmless(items: dict[str, Any], value: Any) -> None:
    _, _, aim = value
    assert not items["network"]
    assert not items["programs"]
    secrets = {str(aim / SECRET), "/proc/self/environ", "/dev/zero"}
    assert not {os.path.realpath(name) for name in items["opened"]} & secrets
    assert not (aim / RAN).exists()
    line = items["said"].removesuffix("\n")
    assert line.startswith("depthcut: ")
    assert line.isprintable(), line
    assert "Unexpected" not in line
