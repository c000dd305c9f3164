"""Which products get 8 bits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_files import names_in

from exporter.errors import OptionError, QuantizationError
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET
from exporter.quantize import sensitivity
from exporter.quantize.products import find_products
from exporter.quantize.quantize import quantize_file
from exporter.quantize.rewrite import Blocks
from exporter.quantize.sensitivity import MixedBits, search_mixed
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model
from tests.exporter.small_graphs import (
    GEMM,
    INNER,
    TIED,
    VOCABULARY,
    WIDTH,
    set_weight,
    written,
)
from tests.exporter.tiny_lm import write_tokenizer
from tests.raising import raises

SETTINGS = QuantizeSettings(scheme="mixed", symmetric=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A graph in which one product has outliers, so that 4 bits leave nothing of the others."""
    path = written(TIED, tmp_path / "float.onnx")
    down = np.random.default_rng(1).standard_normal((INNER, WIDTH)).astype(np.float32)
    down[::16, ::2] *= 30
    path = set_weight(path, "down", down, tmp_path / "source" / "model.onnx")
    write_tokenizer(path.parent)
    return path


def searched(path: Path, stage: Path, limit: float) -> MixedBits:
    graph = load_model(path)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 64))
    stage.mkdir()
    tokens = CalibrationText.unpadded(ids, "random", "")
    return search_mixed(
        graph, find_products(graph), SETTINGS, tokens, stage,
        limit=limit, threads=1, progress=QUIET,
    )  # fmt: skip


def test_the_product_that_4_bits_hurt_gets_8(model: Path, tmp_path: Path) -> None:
    strict = searched(model, tmp_path / "strict", 0.05)
    first, second = strict.sensitivities
    assert (first.name, second.name) == ("down_node", "up_node")
    assert first.kl_divergence > 2 * second.kl_divergence > 0
    assert first.bytes_more == second.bytes_more == WIDTH * INNER // 2
    assert strict.bits_by_node == {"up_node": 4, "down_node": 8}
    assert strict.growth <= 1.05 < strict.four_bit_growth


def test_a_generous_limit_leaves_all_at_4(model: Path, tmp_path: Path) -> None:
    generous = searched(model, tmp_path / "generous", 1e9)
    assert set(generous.bits_by_node.values()) == {4}
    assert generous.growth == generous.four_bit_growth
    assert generous.sensitivities == ()


def test_where_no_subset_is_enough_all_get_8_and_the_growth_is_measured(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError) as raised:
        searched(model, tmp_path / "too hard", 0.0)
    (grown,) = re.findall(r"grows by ([\d.]+)%", str(raised.value))
    one, both = (
        searched(model, tmp_path / str(limit), limit) for limit in (0.05, float(grown) / 100 + 1e-3)
    )
    assert set(both.bits_by_node.values()) == {8}
    assert 1 < both.growth < one.growth
    assert both.growth - 1 == pytest.approx(float(grown) / 100, abs=6e-4)


@pytest.mark.parametrize(("kl", "growth"), [(0.0, 1.5), (1.0, math.e), (800.0, math.inf)])
def test_the_larger_estimate_of_a_growth_counts_be_it_infinite(kl: float, growth: float) -> None:
    damage = sensitivity._Damage(kl_divergence=kl, perplexity_ratio=1.5)
    assert damage.growth == pytest.approx(growth)


@pytest.mark.parametrize("bits", [4, 8])
def test_answers_that_are_no_numbers_are_never_enough(
    bits: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = sensitivity.rounded

    def broken(matrix: Any, width: int, *block: int, **how: bool) -> Blocks:
        found = rounded(matrix, width, *block, **how)
        return replace(found, scales=found.scales * np.nan) if width <= bits else found

    monkeypatch.setattr(sensitivity, "rounded", broken)
    if bits == 8:
        with pytest.raises(QuantizationError):
            searched(model, tmp_path / "stage", 1e9)
    else:
        assert set(searched(model, tmp_path / "stage", 1e9).bits_by_node.values()) == {8}


def test_mixed_is_searched_and_done(model: Path, tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["the", "value", "of", "list", "is"], 2000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    settings = QuantizeSettings(
        scheme="mixed", symmetric=True, calibration=(str(tmp_path / "text.txt"),)
    )
    output = tmp_path / "out" / "model.onnx"
    result = quantize_file(model, output, settings)
    assert result.mixed is not None
    wanted = result.mixed.bits_by_node | {"head_node": 8}
    bits = {
        node.name: node.attributes.get_int("bits")
        for node in load_model(output).graph
        if node.op_type == "MatMulNBits"
    }
    assert bits == wanted
    assert result.record.calibration is not None
    assert names_in(output.parent) == ["model.onnx", "model.onnx.*.data"]


def test_what_has_no_logits_or_blocks_of_its_own_is_refused(tmp_path: Path) -> None:
    with raises(QuantizationError, "no-logits"):
        searched(written(GEMM, tmp_path / "gemm.onnx"), tmp_path / "stage", 0.05)
    with raises(OptionError, "", "--quantize-method", "--quantize"):
        QuantizeSettings(
            scheme="mixed", method="gguf", gguf=tmp_path / "m.gguf", calibration=("pydoc",)
        )
