"""Blocks that a GGUF file brings: read as they are, found again, and kept in a graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.choose.budgets.budget import Budget
from exporter.cli import run as run_command
from exporter.cli.export import export
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import OptionError, QuantizationError
from exporter.pipeline.quantizing import with_method
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.quantize.gguf_blocks import GgufBlocks, KeptBlocks, most_bits, read_blocks
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model
from tests.raising import raises
from tests.reading import Heard, in_file
from tests.text_graphs import INNER, TIED, VOCABULARY, WIDTH, set_weight, written
from tests.tiny_gguf import numbers, random_rows, write_gguf

pytestmark = pytest.mark.torch  # whose environment has the package gguf


KINDS = {
    "Q4_0": (4, 32), "Q4_1": (4, 32), "Q5_0": (8, 32), "Q5_1": (8, 32), "Q8_0": (8, 32),
    "Q4_K": (4, 32), "Q5_K": (8, 32), "Q6_K": (8, 16),
}  # fmt: skip
IDS = {"input_ids": np.arange(12).reshape(2, 6) % VOCABULARY}


def as_written(blocks: Any, shape: tuple[int, ...]) -> Any:
    steps = blocks.quants.astype(np.float32) - blocks.offsets[..., None]
    return (steps * blocks.scales[..., None]).reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_file_s_own_numbers(kind: str) -> None:
    rows = random_rows(kind, 6, 512)
    if kind in ("Q4_0", "Q4_1"):
        rows[0, :2] = 0  # a block of one number
        assert len(set(numbers(rows, kind)[0, :32])) == 1
    wanted = numbers(rows, kind)
    blocks = read_blocks(rows, wanted, kind)
    assert (blocks.bits, blocks.block) == KINDS[kind]
    made = as_written(blocks, wanted.shape)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert blocks.quants.max() < 1 << blocks.bits


def test_numbers_of_another_type_are_told() -> None:
    rows = random_rows("Q4_1", 2, 64)
    with pytest.raises(ValueError, match="Q4_1"):
        read_blocks(rows, numbers(rows, "Q4_1") * np.float32(1.3), "Q4_1")


def test_rows_are_found_in_any_order_and_across_tensors(tmp_path: Path) -> None:
    query, value = random_rows("Q4_0", 8, 256), random_rows("Q6_K", 4, 256, seed=1)
    path = write_gguf(tmp_path / "m.gguf", {"q": ("Q4_0", query), "v": ("Q6_K", value)})
    matrix = np.concatenate([numbers(value, "Q6_K"), numbers(query, "Q4_0")[::-1]])
    result = GgufBlocks(path).find(np.ascontiguousarray(matrix.T))
    assert isinstance(result, KeptBlocks)
    assert result.kinds == "Q4_0+Q6_K"
    assert (result.blocks.bits, result.blocks.block) == (8, 16)
    np.testing.assert_allclose(as_written(result.blocks, matrix.shape), matrix, rtol=0, atol=1e-6)
    matrix[3, 5] += 1e-3
    missing = GgufBlocks(path).find(np.ascontiguousarray(matrix.T))
    assert missing == "its row 3 is not in m.gguf"


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Path]:
    """A graph whose table is Q8_0, one product Q4_1 and one Q4_0, and the file they come from."""
    made = {
        "table": ("Q8_0", random_rows("Q8_0", VOCABULARY, WIDTH)),
        "up": ("Q4_1", random_rows("Q4_1", INNER, WIDTH, seed=1)),
        "down": ("Q4_0", random_rows("Q4_0", WIDTH, INNER, seed=2)),
    }
    gguf = write_gguf(tmp_path / "m.gguf", made)
    graph = written(TIED, tmp_path / "float.onnx")
    for name, (kind, rows) in made.items():
        array = numbers(rows, kind)
        graph = set_weight(
            graph, name, array if name == "table" else array.T.copy(), tmp_path / f"{name}.onnx"
        )
    return graph, gguf


def gap(path: Path, wanted: Any) -> float:
    with OnnxRuntimeRunner(path, threads=1) as runner:
        return float(np.abs(runner.run(IDS)["logits"] - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("level", "limit"), [(1, 1e-5), (4, 0.02)], ids=["fp32", "int8"])
def test_a_graph_keeps_the_blocks(
    kept: tuple[Path, Path], tmp_path: Path, level: int, limit: float
) -> None:
    graph, gguf = kept
    output = tmp_path / "out" / "model.onnx"
    settings = QuantizeSettings(method="gguf", gguf=gguf, accuracy_level=level)
    result = quantize_file(graph, output, settings)
    record = result.record
    assert record.kept_blocks == {"Q8_0": 1, "Q4_1": 1, "Q4_0": 1}
    assert record.bits == {"4": 2, "8": 1}
    assert (record.head_bits, record.embedding_bits) == (8, 8)
    assert record.gguf is not None
    assert record.gguf.startswith("m.gguf, sha256 ")
    assert result.rounded_anew == {}
    names = [node.name for node in load_model(output).graph]
    assert [name for name in names if name and "sums" in name] == [
        "up_node/block_sums", "up_node/followed_by_sums",
    ]  # fmt: skip
    with OnnxRuntimeRunner(graph, threads=1) as runner:
        wanted = runner.run(IDS)["logits"]
    assert gap(output, wanted) <= limit
    if level == 1:
        quantize_file(graph, tmp_path / "anew.onnx", QuantizeSettings(accuracy_level=1))
        assert gap(output, wanted) < gap(tmp_path / "anew.onnx", wanted) / 100


def test_a_weight_of_other_numbers_is_rounded_and_told(
    kept: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, gguf = kept
    other = np.ones((INNER, WIDTH), np.float32)
    changed = set_weight(graph, "down", other, tmp_path / "changed.onnx")
    settings = QuantizeSettings(method="gguf", gguf=gguf)
    result = quantize_file(changed, tmp_path / "out.onnx", settings)
    assert result.rounded_anew == {"down_node": "its row 0 is not in m.gguf"}
    assert result.record.bits == {"4": 2, "8": 1}
    assert result.record.kept_blocks == {"Q8_0": 1, "Q4_1": 1}
    call = ["quantize", str(graph), "-o", str(tmp_path / "out" / "model.onnx")]
    assert run_command([*call, "--quantize-method", "gguf", "--gguf", str(gguf)]) == 0
    assert "blocks kept as they are: 1 Q4_1, 1 Q4_0, 1 Q8_0" in capsys.readouterr().out


def test_a_model_that_is_a_gguf_file_keeps_its_own_blocks(tmp_path: Path) -> None:
    def asked(model: str, *more: str) -> Path | None:
        words = ["--drop-attn", "1", "--quantize", "int4", "quantize_method: gguf", *more]
        settings = export.read([model, "-o", "out", *in_file(tmp_path, words)]).request.quantize
        return None if settings is None else settings.gguf

    (tmp_path / "b.gguf").write_text("")
    assert asked("a/model.gguf") == Path("a/model.gguf")
    assert asked("a/model.gguf", f"gguf: {tmp_path / 'b.gguf'}") == tmp_path / "b.gguf"
    with raises(OptionError, "options-clash", "quantize_method", "gguf"):
        asked("a/folder")


def test_files_that_keep_nothing(kept: tuple[Path, Path], tmp_path: Path) -> None:
    graph, gguf = kept
    output, cut = tmp_path / "out.onnx", tmp_path / "cut.gguf"
    foreign = {"w": ("Q4_0", random_rows("Q4_0", 4, 64, seed=9))}
    half = {"w": ("F16", np.zeros((4, 64), np.float16))}
    cut.write_bytes(gguf.read_bytes()[:40])
    for file, code, named in (
        (write_gguf(tmp_path / "foreign.gguf", foreign), "nothing-to-quantize", "row 0"),
        (cut, "unreadable", "cut.gguf"),
        (write_gguf(tmp_path / "plain.gguf", half), "nothing-to-quantize", "F16"),
    ):
        with raises(QuantizationError, code, named):
            quantize_file(graph, output, QuantizeSettings(method="gguf", gguf=file))
    assert most_bits(tmp_path / "plain.gguf") is None
    with raises(QuantizationError, "unreadable"):
        most_bits(cut)
    assert not output.exists()


INT4 = QuantizeSettings()


def chosen_for(source: Path, settings: QuantizeSettings) -> tuple[QuantizeSettings | None, Heard]:
    heard, drops = Heard(), DropRequest(Budget(joint=1))
    request = ExportRequest(source=str(source), out=source.parent, drops=drops, quantize=settings)
    return with_method(request, heard).quantize, heard


@pytest.mark.parametrize(
    ("kinds", "settings", "kept", "bits"),
    [
        (["Q4_1", "Q6_K"], INT4, True, 4),
        (["Q4_1", "Q6_K"], QuantizeSettings("int8"), True, 4),
        (["Q4_K", "Q8_0"], INT4, True, 4),
        (["Q8_0", "Q4_K"], INT4, False, 8),  # 8 bits where 4 are asked for
        (["Q4_0"], replace(INT4, block_size=64), False, 4),
        (["Q4_0"], replace(INT4, symmetric=True), False, 4),
    ],
)
def test_a_gguf_file_s_blocks_are_kept_where_they_are_what_was_asked_for(
    tmp_path: Path, kinds: list[str], settings: QuantizeSettings, kept: bool, bits: int
) -> None:
    """By the type of most weights."""
    rows = range(2 * len(kinds), 0, -2)
    made = {kind: (kind, random_rows(kind, n, 256)) for kind, n in zip(kinds, rows, strict=True)}
    file = write_gguf(tmp_path / "m.gguf", made)
    assert most_bits(file) == bits
    chosen, heard = chosen_for(file, settings)
    if kept:
        assert chosen == replace(settings, method="gguf", gguf=file)
        assert heard.lines == ["quantize: by the method gguf, which keeps the blocks of m.gguf"]
        return
    assert chosen == replace(settings, method="rtn")
    assert heard.lines == ["quantize: by the method rtn, no other was asked for"]
