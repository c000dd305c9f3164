"""Which method an export takes where none is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exporter.choose.budgets.budget import Budget
from exporter.errors import QuantizationError
from exporter.pipeline.quantizing import with_method
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.pipeline.run import Run
from exporter.quantize.gguf_blocks import most_bits
from exporter.quantize.settings import QuantizeSettings, Scheme
from tests.raising import raises
from tests.reading import Heard
from tests.tiny_gguf import numbers, random_rows, write_gguf

INT4 = QuantizeSettings()


def run_of(source: Path) -> tuple[Run, Heard]:
    run, heard = object.__new__(Run), Heard()
    run.request = ExportRequest(
        source=str(source), out=source.parent, drops=DropRequest(Budget(joint=1))
    )
    run.progress = heard
    return run, heard


def file_of(folder: Path, *kinds: str) -> Path:
    """A GGUF file of one tensor of each type, the first of them the largest."""
    rows = range(2 * len(kinds), 0, -2)
    made = {kind: (kind, random_rows(kind, n, 256)) for kind, n in zip(kinds, rows, strict=True)}
    return write_gguf(folder / "m.gguf", made)


# The package gguf comes with the environment that has PyTorch.
@pytest.mark.torch
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_gguf_file_s_blocks_are_kept(tmp_path: Path, scheme: Scheme) -> None:
    file = file_of(tmp_path, "Q4_1", "Q6_K")
    run, heard = run_of(file)
    chosen = with_method(run, QuantizeSettings(scheme))
    assert chosen == QuantizeSettings(scheme, "gguf", gguf=file)
    assert heard.lines == ["quantize: by the method gguf, which keeps the blocks of m.gguf"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (INT4, ["Q8_0", "Q4_0"]),  # 8 bits where 4 are asked for
        (replace(INT4, block_size=64), ["Q4_0"]),
        (replace(INT4, symmetric=True), ["Q4_0"]),
    ],
)
def test_blocks_that_were_not_asked_for_are_not_kept(
    tmp_path: Path, settings: QuantizeSettings, kinds: list[str]
) -> None:
    run, heard = run_of(file_of(tmp_path, *kinds))
    assert with_method(run, settings) == replace(settings, method="rtn")
    assert heard.lines == ["quantize: by the method rtn, no other was asked for"]


@pytest.mark.torch
def test_most_weights_decide(tmp_path: Path) -> None:
    assert most_bits(file_of(tmp_path, "Q4_K", "Q8_0")) == 4
    assert most_bits(file_of(tmp_path, "Q8_0", "Q4_K")) == 8
    plain = numbers(random_rows("Q4_0", 4, 64), "Q4_0").astype("float16")
    assert most_bits(write_gguf(tmp_path / "plain.gguf", {"w": ("F16", plain)})) is None
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "plain.gguf").read_bytes()[:40])
    with raises(QuantizationError, "unreadable"):
        most_bits(cut)


def test_a_folder_is_rounded_to_nearest_and_what_was_asked_for_stays(tmp_path: Path) -> None:
    run, heard = run_of(tmp_path)
    assert with_method(run, INT4) == replace(INT4, method="rtn")
    assert len(heard.lines) == 1
    for settings in (replace(INT4, method="hqq"), QuantizeSettings("int8-dynamic")):
        assert with_method(run, settings) == settings
    assert len(heard.lines) == 1
