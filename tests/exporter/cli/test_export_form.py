"""Which form `depthcut export` writes where nobody names one."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.cli import cli
from exporter.cli import export as module
from exporter.cli.command import SchemaCommand
from exporter.cli.export import ExportCall


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
        (["--min-embedding-cosine", "0.978"], "onnxruntime-cpu"),
        (["--at-most", "5%", "--target", "portable"], "portable"),
        (["--at-most", "5%", "--opset", "20"], "portable"),
        (["--provider", "cuda"], "portable"),
        (["--at-most", "5%", "--provider", "cuda"], "portable"),
        (["--provider", "cuda", "--dtype", "float16"], "onnxruntime-cuda"),
        (["--dtype", "float16"], "portable"),
        (["--drop-attn", "2"], "portable"),
        (["--faster", "1.1x"], "portable"),
    ],
)
def test_limits_on_quality_take_the_same_form_as_no_limits(
    monkeypatch: pytest.MonkeyPatch, options: list[str], target: str
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    assert _target(*options) == target
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert _target(*options) == "portable"
