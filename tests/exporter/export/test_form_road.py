"""`depthcut export --target onnxruntime-cpu`: both folders are fused, and who runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import FORM_KEY, ComparisonReport, FormRecord
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.cache_form import read_cache_form
from graph_passes.files.storage import load_model
from graph_passes.fusing.logits_to_keep import KEEP
from tests.reading import Heard
from tests.text_graphs import write_tokenizer

pytestmark = pytest.mark.genai

PROMPT, NEW = [5, 9, 20, 33, 7, 11, 13], 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama of three layers and a word tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128,
        initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def walked(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ComparisonReport, Heard]:
    from exporter.choose.budgets.budget import Budget
    from exporter.compare.options import CompareOptions
    from exporter.pipeline.request import DropRequest, ExportRequest
    from exporter.pipeline.road import export_model
    from exporter.score import ScoreOptions

    out, heard = tmp_path_factory.mktemp("road") / "out", Heard()
    request = ExportRequest(
        source=str(checkpoint),
        out=out,
        drops=DropRequest(Budget(attention=1)),
        target="onnxruntime-cpu",
        score=ScoreOptions(samples=4, sequence_length=16, batch_size=2),
        compare=CompareOptions(
            prefill_lengths=(8,), decode_past_lengths=(8,), rounds=2, eval_tokens=64,
            eval_sequence_length=16,
        ),
    )  # fmt: skip
    return out, export_model(request, heard), heard


def test_both_folders_are_written_for_the_target(walked: Any) -> None:
    out, report, heard = walked
    for arm, layers in (("baseline", 3), ("candidate", 2)):
        model = load_model(out / arm / "model.onnx")
        record = FormRecord.model_validate_json(model.metadata_props[FORM_KEY])
        assert record.target == "onnxruntime-cpu"
        assert record.writer.startswith("onnxruntime-genai 0.")
        assert record.passes == [KEEP]
        assert record.remark is None
        assert record.fused["GroupQueryAttention"] == layers
        assert sum(node.op_type == "GroupQueryAttention" for node in model.graph) == layers
        assert len(read_cache_form(out / arm / "model.onnx").shared) == 2 * layers
        assert KEEP in {value.name for value in model.graph.inputs}
        assert getattr(report.arms, arm).form == record
    assert any("written by onnxruntime-genai" in line for line in heard.lines)
    assert all(check.passed for check in report.parity)


def test_the_runtime_s_config_fits_both(walked: Any) -> None:
    out, _, _ = walked
    for arm, layers in (("baseline", 3), ("candidate", 2)):
        config = json.loads((out / arm / "genai_config.json").read_text())
        assert config["model"]["decoder"]["num_hidden_layers"] == layers
        assert config["model"]["decoder"]["filename"] == "model.onnx"


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
def test_onnxruntime_genai_runs_the_folder_as_it_is(walked: Any, arm: str) -> None:
    import onnxruntime_genai as runtime

    folder = walked[0] / arm
    model = runtime.Model(str(folder))
    parameters = runtime.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = runtime.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    wanted = [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]
    with open_decoder(folder, threads=1) as decoder:
        token_ids = generate(decoder, PROMPT, new_tokens=NEW).token_ids
    assert [*token_ids][: len(wanted)] == wanted
