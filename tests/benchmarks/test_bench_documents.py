"""Benchmarks that print intervals count documents, not samples."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import tiny_loaded, tiny_tokenizer

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from exporter.models.ablation.branch_replacements import NOTHING  # noqa: E402
from tests.benchmarks import bench_distill, bench_healing, bench_selection  # noqa: E402

SAMPLES, LENGTH, DOCUMENTS = 12, 16, 10
CUT: Any = {(1, "attention"): NOTHING}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A few long documents, so that several samples are of one."""
    path, words = tmp_path / "text.txt", np.random.default_rng(0)
    lines = (" ".join(f"w{n}" for n in words.integers(0, 60, 2000)) for _ in range(DOCUMENTS))
    path.write_text("\n\n".join(f"# Title {n}\n\n{line}" for n, line in enumerate(lines)))
    return str(path)


def _selection(text: str, loaded: Any, folder: Path) -> Any:
    bench = object.__new__(bench_selection.Bench)
    bench.loaded, bench.keep = loaded, folder
    bench.options = Namespace(test_tokens=SAMPLES * LENGTH)
    return bench.damages("test", text, {"cut": CUT})["cut"].nll_sums


def _healing(text: str, loaded: Any, folder: Path) -> Any:
    options = Namespace(
        model="tiny", calibrate=text, test=text, test_samples=SAMPLES, second_samples=0,
        keep=folder, cache=folder, tasks=None, items=0,
    )  # fmt: skip
    (row,) = bench_healing.Bench(options).results([bench_healing.Row(1, "none")])
    return row["test"]["nll_sums"]


def _distill(text: str, loaded: Any, folder: Path) -> Any:
    options = Namespace(judge=[text], samples=SAMPLES, tasks=None, items=0)
    return bench_distill.measures(loaded, options)["text.txt"](CUT).nll_sums


@pytest.mark.parametrize("measure", [_selection, _healing, _distill])
def test_damage_is_by_document(
    measure: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.models.loading import model_source

    loaded = replace(tiny_loaded("llama", num_hidden_layers=3), tokenizer=tiny_tokenizer())
    monkeypatch.setattr(model_source, "load_model", lambda *_: loaded)
    for bench in (bench_selection, bench_healing):
        monkeypatch.setattr(bench, "LENGTH", LENGTH)
    assert 1 < len(measure(text, loaded, tmp_path)) <= DOCUMENTS
