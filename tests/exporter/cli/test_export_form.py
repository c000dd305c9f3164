"""Which form `depthcut export` writes where nobody names one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.cli import cli
from exporter.cli import export as module
from exporter.cli.command import SchemaCommand
from exporter.cli.export import ExportCall
from tests.reading import Heard, in_file


def _target(*options: str) -> Any:
    command = cli.get_command(None, "export")
    assert isinstance(command, SchemaCommand)
    call = command.read(["MODEL", "-o", "out", *options])
    assert isinstance(call, ExportCall)
    return call.request.target


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ([], "onnxruntime-cpu"),
        (["--quick"], "onnxruntime-cpu"),
        (["--at-most", "5%"], "onnxruntime-cpu"),
        (["min_embedding_cosine: 0.978"], "onnxruntime-cpu"),
        (["--at-most", "5%", "--target", "portable"], "portable"),
        (["--at-most", "5%", "opset: 20"], "portable"),
        (["--provider", "cuda"], "portable"),
        (["--at-most", "5%", "--provider", "cuda"], "portable"),
        (["--provider", "cuda", "--dtype", "float16"], "onnxruntime-cuda"),
        (["--dtype", "float16"], "portable"),
        (["--drop-attn", "2"], "portable"),
        (["--faster", "1.1x"], "portable"),
    ],
)
def test_limits_on_quality_take_the_same_form_as_no_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], target: str
) -> None:
    options = in_file(tmp_path, options)
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    assert _target(*options) == target
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert _target(*options) == "portable"


@pytest.mark.parametrize(
    ("target", "installed", "is_told"),
    [("portable", None, True), ("portable", "", False), ("onnxruntime-cpu", None, False)],
)
def test_a_form_that_an_extra_would_make_faster_is_told(
    monkeypatch: pytest.MonkeyPatch, target: str, installed: str | None, is_told: bool
) -> None:
    from exporter.pipeline import road

    monkeypatch.setattr(road, "find_spec", lambda _: installed)
    monkeypatch.setattr(road.keys, "score_key", lambda _: {})
    for name in ("refuse_foreign_goals", "_stage"):
        monkeypatch.setattr(road, name, lambda *_: None)
    heard = Heard()
    request = SimpleNamespace(target=target, scored=True, stream=False)
    ledger = SimpleNamespace(valid=lambda *_: False)
    run: Any = SimpleNamespace(request=request, ledger=ledger, progress=heard)
    road._score(run)
    assert any("genai" in line for line in heard.lines) == is_told
