"""`--target onnxruntime-cpu`: the road writes both folders, and a plan cuts both forms alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import FORM_KEY, ComparisonReport, FormRecord, PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.choose.budgets.budget import Budget
from exporter.compare.options import CompareOptions
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.cache_form import read_cache_form
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.export.forms.targets import write_form
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.pipeline.road import export_model
from exporter.score.options import ScoreOptions
from graph_passes import ReplacementTensors, SublayerRef
from graph_passes.files.storage import load_model
from graph_passes.fusing.logits_to_keep import KEEP
from tests.engine_support import in_steps
from tests.reading import Heard
from tests.text_graphs import write_llama_folder
from tests.tiny_models import tiny_loaded

pytestmark = [pytest.mark.genai, pytest.mark.usefixtures("exports_once")]


PROMPT, NEW = [5, 9, 20, 33, 7, 11, 13], 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 96, "hidden_size": 64, "initializer_range": 0.2, "pad_token_id": 0}
    return write_llama_folder(tmp_path_factory.mktemp("llama"), **sizes)


@pytest.fixture(scope="module")
def walked(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ComparisonReport, Heard]:
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
        config = json.loads((out / arm / "genai_config.json").read_text())["model"]["decoder"]
        assert (config["num_hidden_layers"], config["filename"]) == (layers, "model.onnx")
    assert any("written by onnxruntime-genai" in line for line in heard.lines)
    assert all(check.passed for check in report.parity)


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


HIDDEN, VOCABULARY = 64, 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "head_dim": 16}
PLAN = [("attention", 1, "none"), ("mlp", 0, "bias"), ("attention", 2, "linear")]
STEPS = {"prefill": [9], "decode": [7, 1, 1], "chunk": [4, 4, 1]}
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))
FULL = np.ones((2, 9), np.int64)
LEFT = np.array([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])
"""The second row is padded on the left."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in both forms; biases that are not zero."""
    loaded = tiny_loaded("qwen2", **SIZES)
    for name, weight in loaded.model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.3)
    paths = {}
    for target in ("portable", "onnxruntime-cpu"):
        paths[target] = tmp_path_factory.mktemp(target)
        _, record = write_form(loaded, paths[target], target=target)
        assert isinstance(record, FormRecord)
        assert ("GroupQueryAttention" in record.fused) == (target != "portable")
    return paths


@pytest.fixture(scope="module")
def candidates(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both cut by the same plan, replacements included."""
    rng = np.random.default_rng(1)

    def vector() -> Any:
        return rng.standard_normal(HIDDEN).astype(np.float32)

    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5).astype(np.float32)
    tensors = {
        SublayerRef(0, "mlp"): ReplacementTensors(vector(), None),
        SublayerRef(2, "attention"): ReplacementTensors(vector(), weight),
    }
    numbers = Replacements(Path("replacements.safetensors"), "0" * 64, tensors)
    plan = [PlannedDeletion(kind=k, layer=n, replacement=r) for k, n, r in PLAN]
    result = {}
    for target, folder in folders.items():
        result[target] = tmp_path_factory.mktemp(f"cut-{target}") / "model.onnx"
        report = prune_file(folder / "model.onnx", result[target], LoadedPlan.of(plan, numbers))
        assert report.verification.passed
    return result


def answers(path: Path, mask: np.ndarray[Any, Any], steps: Sequence[int]) -> Any:
    with OnnxRuntimeRunner(path, threads=1) as runner:
        return in_steps(runner, IDS, mask, steps)[0]


def limit(wanted: np.ndarray[Any, Any]) -> float:
    return 1e-4 * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("mask", [FULL, LEFT], ids=["full", "left-padded"])
@pytest.mark.parametrize("steps", STEPS)
def test_the_plan_is_one_the_form_is_many(
    candidates: Any, steps: str, mask: np.ndarray[Any, Any]
) -> None:
    wanted = answers(candidates["portable"], mask, STEPS[steps])
    result = answers(candidates["onnxruntime-cpu"], mask, STEPS[steps])
    real = mask.astype(bool)
    assert np.abs(result - wanted)[real].max() <= limit(wanted)
    other = answers(candidates["onnxruntime-cpu"], LEFT if mask is FULL else FULL, STEPS[steps])
    assert np.abs(other - wanted)[real & (LEFT > 0)].max() > 100 * limit(wanted)


def test_another_plan_is_seen(folders: dict[str, Path], candidates: Any, tmp_path: Path) -> None:
    plan = [PlannedDeletion(kind="attention", layer=1), PlannedDeletion(kind="mlp", layer=0)]
    prune_file(folders["onnxruntime-cpu"] / "model.onnx", tmp_path / "model.onnx", plan)
    wanted = answers(candidates["portable"], FULL, [9])
    result = answers(tmp_path / "model.onnx", FULL, [9])
    assert np.abs(result - wanted).max() > 100 * limit(wanted)
