"""What a GPU session builds, by the real builder: it needs no card for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.engines.build.profiles import Ranges, Span
from exporter.pipeline.gpu.attention import FORMS
from exporter.pipeline.gpu.cases import TINY
from exporter.pipeline.gpu.workplace import Order, Workplace, record_of
from graph_passes.files.locking import FOLDER

pytestmark = pytest.mark.rtx
RANGES = Ranges(batch=Span(1, 4, 4), prompt=Span(8, 8, 8))


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / FOLDER / "gpu/a", Order("tensorrt-rtx", stand_in="none"))


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_told_as_was_asked(form: str, place: Workplace) -> None:
    onnx = place.model("m", replace(TINY, dtype=ir.DataType.BFLOAT16))
    engines = place.engines(onnx, form, ("decode",), RANGES, cache_reads=FORMS[form])
    attention = record_of(engines).attention
    assert attention is not None
    assert (attention.told_by, attention.remark) == (form, None)


def test_engines_are_built_once_and_anew_for_other_settings(place: Workplace) -> None:
    onnx = place.model("m", TINY)
    found = []
    for kept in ("last", "last", "all"):
        engines = place.engines(onnx, "m-engines", ("prefill",), RANGES, logits=kept)
        (engine,) = engines.glob("*.engine")
        # A file system may use an inode again.
        which = engine.stat().st_ino, engine.stat().st_mtime_ns
        found.append((record_of(engines, "prefill").logits, which))
    assert [logits for logits, _ in found] == ["last", "last", "all"]
    assert found[0] == found[1]
    assert found[1][1] != found[2][1]
    place.drop("m-engines")
    assert not engines.exists()
