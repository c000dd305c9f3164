"""The lines for ONNX Runtime on what PyTorch's exporter writes: caches that grow, and encoders."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.open_decoder import open_decoder
from exporter.engines.usage import write_graph_use
from tests.reading import lines_of, run_lines
from tests.text_graphs import write_tokenizer
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


def exported(family: str, folder: Path) -> Path:
    from exporter.export.torch_export import export_onnx
    from exporter.models.loading.model_files import save_pretrained_files

    loaded = family_loaded(family, initializer_range=0.2)
    export_onnx(loaded, folder, opset=20)
    save_pretrained_files(loaded, folder)
    write_tokenizer(folder)
    return folder / "model.onnx"


def test_a_decoder_generates_what_depthcut_does(tmp_path: Path) -> None:
    target = tmp_path / "cut" / "model.onnx"
    plan = [PlannedDeletion(layer=0, kind="attention")]
    prune_file(exported("llama", tmp_path / "whole"), target, plan)
    write_graph_use(target)
    lines = lines_of(target.with_name("USE.md").read_text())
    assert list(lines) == ["ONNX Runtime", "depthcut", "optimum"]
    _, result = run_lines(lines["ONNX Runtime"], target.parent)
    tokens = result["tokens"]
    with open_decoder(target.parent, threads=1) as decoder:
        wanted = generate(decoder, tokens[:5], new_tokens=len(tokens) - 5).token_ids
    assert tokens[5:] == [*wanted]


def test_an_encoder_s_sentences_have_cosines(tmp_path: Path) -> None:
    import numpy as np

    graph = exported("bert", tmp_path / "bert")
    write_graph_use(graph)
    lines = lines_of(graph.with_name("USE.md").read_text())
    assert list(lines) == ["ONNX Runtime", "optimum"]
    _, result = run_lines(lines["ONNX Runtime"], graph.parent)
    assert result["vectors"].shape == (2, 96)
    assert np.allclose(np.linalg.norm(result["vectors"], axis=1), 1)
