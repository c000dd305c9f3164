from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from exporter.errors import MissingDependencyError
from exporter.optional import require
from tests.raising import raises

ROOT = Path(__file__).parents[2]


def test_an_installed_module_comes_back() -> None:
    assert require("json", extra="cpu") is json


def test_a_missing_module_names_its_extra() -> None:
    with raises(MissingDependencyError, "", "pip install 'depthcut[rtx]'") as error:
        require("no_such_module_here.deeper", extra="rtx")
    assert "no_such_module_here" in error.value.message


def test_a_module_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("made_up")
    module.__version__ = "0.18.0.dev0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", module)
    for oldest in (None, "0.9", "0.18"):
        assert require("made_up", extra="torch", oldest=oldest) is module
    for oldest in ("0.19", "1.0"):
        with raises(MissingDependencyError, "too-old", "0.18.0.dev0", oldest):
            require("made_up", extra="torch", oldest=oldest)


def test_what_works_without_pytorch_does_not_import_it() -> None:
    names = ("score.scoring", "score.cluster", "choose.selection", "artifacts.plans")
    code = "".join(f"import exporter.{name}\n" for name in names)
    code += "import sys; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


_ASKS = """
import os, sys, time
from exporter.optional import require
require("onnxruntime", extra="cpu")
time.sleep(2)
print([name for _, _, names in os.walk(sys.argv[1]) for name in names])
print(len(os.listdir("/proc/self/task")))
"""


def test_onnxruntime_tells_nobody_that_it_is_used(tmp_path: Path) -> None:
    """It would in C++, where Python sees nothing but what it leaves behind and its threads."""
    pytest.importorskip("onnxruntime")
    call = [sys.executable, "-B", "-c", _ASKS, str(tmp_path)]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "1"]
