"""Without lm-eval its commands name the extra."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_lm import write_tiny_lm, write_tokenizer

from exporter.cli import run


def test_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    write_tokenizer(write_tiny_lm(tmp_path))
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    compare = ["compare", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "o"), "-q"]
    for call in (["lm-eval", "ls"], [*compare, "--eval-tokens", "64", "--tasks", "arc_easy"]):
        assert run(call) == 2
        assert "depthcut[eval]" in capsys.readouterr().err
