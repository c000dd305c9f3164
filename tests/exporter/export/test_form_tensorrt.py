"""`--target tensorrt-rtx`: caches in place where that can be, and what is said where it can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import FORM_KEY, FormRecord
from exporter.cli import run
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.cache_form import read_cache_form
from exporter.errors import UsageError
from exporter.export.forms.tensorrt import rewrite_decoder
from graph_passes.files.storage import load_model as load_graph
from tests.graph_passes.decoder_graphs import DecoderSpec, decoder_model
from tests.raising import raises
from tests.reading import in_file

PROMPT, NEW = [5, 9, 20, 33, 7, 11, 13], 6
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


def checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def form(source: Path, folder: Path, **options: Any) -> tuple[Path, FormRecord]:
    from exporter.export.forms.targets import write_form
    from exporter.export.parity import check_export
    from exporter.models.loading.model_source import load_model

    loaded = load_model(str(source), dtype="float32")
    folder.mkdir()
    onnx, record = write_form(loaded, folder, target="tensorrt-rtx", **options)
    assert all(check.passed for check in check_export(loaded, onnx))
    assert FormRecord.model_validate_json(load_graph(onnx).metadata_props[FORM_KEY]) == record
    return onnx, record


@pytest.mark.torch
def test_caches_lie_in_place(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "llama", "llama")
    onnx, record = form(source, tmp_path / "out", room=100)
    assert record.passes == ["GroupedAttentionPass", "CacheInPlacePass(128)"]
    assert record.fused == {
        "Attention": 1, "RMSNormalization": 3, "RotaryEmbedding": 2, "TensorScatter": 2,
    }  # fmt: skip
    assert (record.cache_room, record.remark) == (128, None)
    assert read_cache_form(onnx).buffer == 128
    with open_decoder(onnx, threads=1) as decoder:
        assert len(generate(decoder, PROMPT, new_tokens=NEW).token_ids) == NEW


@pytest.mark.parametrize(
    ("spec", "room", "passes", "remark"),
    [
        (DecoderSpec(), 32, ("GroupedAttentionPass", "CacheInPlacePass(32)"), None),
        (DecoderSpec(), None, ("GroupedAttentionPass",), None),
        (DecoderSpec(mask="all"), 32, ("GroupedAttentionPass",), "window and padding alone, so"),
        (DecoderSpec(softcap=2.0), 32, (), "bounds its scores, so its caches grow"),
    ],
)
def test_what_can_not_be_rewritten_is_told(
    spec: DecoderSpec, room: int | None, passes: tuple[str, ...], remark: str | None
) -> None:
    model, done, result = rewrite_decoder(decoder_model(spec), room)
    assert done == passes
    assert result == remark if remark is None else remark in str(result)
    assert any(node.op_type == "TensorScatter" for node in model.graph) == (len(passes) == 2)


@pytest.mark.torch
def test_a_longer_cache_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "llama", "llama")
    with raises(UsageError, "cache-too-long", 128, 129):
        form(source, tmp_path / "out", room=129)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cache_length: 64"], "caches of --target portable have no fixed length"),
        (
            ["--target", "tensorrt-rtx", "cache_length: 256", "--decode-past", "256"],
            "Caches of 256 positions are too short for what is measured",
        ),
        (["builds: 2"], "--engine"),
    ],
)
def test_what_contradicts_is_told_before_anything_is_loaded(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = ["export", "nowhere", "-o", str(out), "--drop-attn", "1"]
    assert run([*call, *in_file(tmp_path, arguments)]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
