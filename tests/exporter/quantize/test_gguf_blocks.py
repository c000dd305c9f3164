"""Blocks that a GGUF file brings: read as they are, found again, and kept in a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.cli import run as run_command
from exporter.cli.export import export
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import OptionError, QuantizationError
from exporter.quantize.gguf_blocks import GgufBlocks, KeptBlocks, can_hold, read_blocks
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model
from tests.raising import raises
from tests.reading import in_file
from tests.text_graphs import INNER, TIED, VOCABULARY, WIDTH, set_weight, written
from tests.tiny_gguf import numbers, random_rows, write_gguf

# The package gguf comes with the environment that has PyTorch.
pytestmark = pytest.mark.torch

KINDS = {
    "Q4_0": (4, 32), "Q4_1": (4, 32), "Q5_0": (8, 32), "Q5_1": (8, 32), "Q8_0": (8, 32),
    "Q4_K": (4, 32), "Q5_K": (8, 32), "Q6_K": (8, 16),
}  # fmt: skip
IDS = {"input_ids": np.arange(12).reshape(2, 6) % VOCABULARY}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_file_s_own_numbers(kind: str) -> None:
    rows = random_rows(kind, 6, 512)
    wanted = numbers(rows, kind)
    blocks = read_blocks(rows, wanted, kind)
    assert (blocks.bits, blocks.block) == KINDS[kind]
    steps = blocks.quants.astype(np.float32) - blocks.offsets[..., None]
    made = (steps * blocks.scales[..., None]).reshape(wanted.shape)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert blocks.quants.max() < 1 << blocks.bits


def test_numbers_of_another_type_are_told() -> None:
    rows = random_rows("Q4_1", 2, 64)
    with pytest.raises(ValueError, match="Q4_1"):
        read_blocks(rows, numbers(rows, "Q4_1") * np.float32(1.3), "Q4_1")
    assert not can_hold("Q2_K")
    assert not can_hold("F16")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_block_of_one_number(kind: str) -> None:
    rows = random_rows(kind, 1, 64)
    rows[0, :2] = 0
    wanted = numbers(rows, kind)
    blocks = read_blocks(rows, wanted, kind)
    steps = blocks.quants.astype(np.float32) - blocks.offsets[..., None]
    made = (steps * blocks.scales[..., None]).reshape(wanted.shape)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6)
    assert len(set(wanted[0, :32])) == 1


def test_rows_are_found_in_any_order_and_across_tensors(tmp_path: Path) -> None:
    query, value = random_rows("Q4_0", 8, 256), random_rows("Q6_K", 4, 256, seed=1)
    path = write_gguf(tmp_path / "m.gguf", {"q": ("Q4_0", query), "v": ("Q6_K", value)})
    matrix = np.concatenate([numbers(value, "Q6_K"), numbers(query, "Q4_0")[::-1]])
    result = GgufBlocks(path).find(np.ascontiguousarray(matrix.T))
    assert isinstance(result, KeptBlocks)
    assert result.kinds == ("Q4_0", "Q6_K")
    blocks = result.blocks
    assert (blocks.bits, blocks.block) == (8, 16)
    steps = blocks.quants.astype(np.float32) - blocks.offsets[..., None]
    made = (steps * blocks.scales[..., None]).reshape(matrix.shape)
    np.testing.assert_allclose(made, matrix, rtol=0, atol=1e-6)
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


def run(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    with OnnxRuntimeRunner(path, threads=1) as runner:
        return runner.run(IDS)["logits"]


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
    wanted = run(graph)
    np.testing.assert_allclose(run(output), wanted, rtol=0, atol=limit * np.abs(wanted).max())


def test_rounding_again_is_worse(kept: tuple[Path, Path], tmp_path: Path) -> None:
    graph, gguf = kept
    wanted, gaps = run(graph), []
    for settings in (
        QuantizeSettings(method="gguf", gguf=gguf, accuracy_level=1),
        QuantizeSettings(accuracy_level=1),
    ):
        quantize_file(graph, tmp_path / f"{len(gaps)}.onnx", settings)
        gaps.append(np.abs(run(tmp_path / f"{len(gaps)}.onnx") - wanted).max())
    assert gaps[0] < gaps[1] / 100


def test_a_weight_of_other_numbers_is_rounded_and_told(
    kept: tuple[Path, Path], tmp_path: Path
) -> None:
    graph, gguf = kept
    other = np.ones((INNER, WIDTH), np.float32)
    changed = set_weight(graph, "down", other, tmp_path / "changed.onnx")
    result = quantize_file(
        changed, tmp_path / "out.onnx", QuantizeSettings(method="gguf", gguf=gguf)
    )
    assert result.rounded_anew == {"down_node": "its row 0 is not in m.gguf"}
    assert result.record.bits == {"4": 2, "8": 1}
    assert result.record.kept_blocks == {"Q8_0": 1, "Q4_1": 1}


def test_the_command_tells_what_was_kept(
    kept: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, gguf = kept
    output = tmp_path / "out" / "model.onnx"
    call = ["quantize", str(graph), "-o", str(output), "--quantize-method", "gguf"]
    assert run_command([*call, "--gguf", str(gguf)]) == 0
    assert "blocks kept as they are: 1 Q4_1, 1 Q4_0, 1 Q8_0" in capsys.readouterr().out
    assert run_command(call) == 2
    assert "--gguf" in capsys.readouterr().err


def test_a_model_that_is_a_gguf_file_keeps_its_own_blocks(tmp_path: Path) -> None:
    def asked(model: str, *more: str) -> Path | None:
        words = ["--drop-attn", "1", "--quantize", "int4", "quantize_method: gguf", *more]
        settings = export.read([model, "-o", "out", *in_file(tmp_path, words)]).request.quantize
        return None if settings is None else settings.gguf

    (tmp_path / "b.gguf").write_text("")
    assert asked("a/model.gguf") == Path("a/model.gguf")
    assert asked("a/model.gguf", f"gguf: {tmp_path / 'b.gguf'}") == tmp_path / "b.gguf"
    with raises(OptionError, "", "--quantize-method", "--gguf"):
        asked("a/folder")


def test_files_that_keep_nothing(kept: tuple[Path, Path], tmp_path: Path) -> None:
    graph, gguf = kept
    output = tmp_path / "out.onnx"
    rows = random_rows("Q4_0", 4, 64, seed=9)
    foreign = write_gguf(tmp_path / "foreign.gguf", {"w": ("Q4_0", rows)})
    with raises(QuantizationError, "no-usable-blocks", "row 0"):
        quantize_file(graph, output, QuantizeSettings(method="gguf", gguf=foreign))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:40])
    with raises(QuantizationError, "unreadable", "cut.gguf"):
        quantize_file(graph, output, QuantizeSettings(method="gguf", gguf=cut))
    half = np.zeros((4, 64), np.float16)
    plain = write_gguf(tmp_path / "plain.gguf", {"w": ("F16", half)})
    with raises(QuantizationError, "no-usable-blocks", "F16"):
        quantize_file(graph, output, QuantizeSettings(method="gguf", gguf=plain))
    assert not output.exists()
    for halved in ({"method": "gguf"}, {"gguf": gguf}):
        with raises(OptionError, "", "--quantize-method", "--gguf"):
            QuantizeSettings(**halved)  # type: ignore[arg-type]
