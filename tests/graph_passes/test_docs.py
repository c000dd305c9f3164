"""Every example in the library's documentation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from graph_passes import save_model
from tests.tiny_graphs import TinySpec, tiny_feed, tiny_model

README = Path(__file__).parents[2] / "graph_passes" / "README.md"


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    assert len(examples) == 7
    model = tiny_model(TinySpec(layers=3))
    save_model(model, Path("model.onnx"))
    scope: dict[str, Any] = {"feed": tiny_feed(model, seq=4, past=3)}
    for number, example in enumerate(examples):
        exec(compile(example, f"example {number}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "1 attention" in printed
    assert "linear 72" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "pruned.onnx"]


def test_the_pages_that_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README.read_text("utf-8"))
    assert len(links) == 3
    assert all((README.parent / link).is_file() for link in links)
