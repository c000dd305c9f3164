"""ONNX files with what lies beside them: genai_config.json, a hub's cache, their caches' bytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import inspect_file, prune_file
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import DepthcutError, OnnxFileError, SurgeryError, UsageError
from exporter.models.genai_config import GenaiConfig, rewritten
from exporter.models.graph_facts import read_facts
from graph_passes import ResidualSite
from graph_passes.files import storage
from graph_passes.files.storage import data_files, load_model, save_model
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_graphs import TinySpec, tiny_model
from tests.tiny_models import into_cache

PLAN, MLP = ([PlannedDeletion(layer=n, kind=k)] for n, k in ((1, "attention"), (0, "mlp")))
NAMES = {
    "inputs": {
        "input_ids": "input_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {"logits": "logits", "present_key_names": "present.%d.key"},
}
CONFIG: dict[str, Any] = {
    "model": {
        "type": "llama",
        "eos_token_id": [1, 2],
        "decoder": {"filename": "model.onnx", "num_hidden_layers": 3, **NAMES},
    },
    "search": {"max_length": 128, "temperature": 1.0},
}
CACHES = [f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")]
GONE = [name for name in CACHES if ".1." in name]
DENSE = {name: name.replace(".2.", ".1.") for name in CACHES if ".2." in name}


def with_decoder(**parts: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["model"]["decoder"].update(parts)
    return config


def decoder_of(content: dict[str, Any], gone: list[str], renamed: dict[str, str]) -> dict[str, Any]:
    config = GenaiConfig(Path("genai_config.json"), content)
    text = rewritten(config, "cut.onnx", CACHES, gone, renamed)
    decoder: dict[str, Any] = json.loads(text)["model"]["decoder"]
    return decoder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "model.onnx"
    save_model(tiny_model(TinySpec()), path)
    path.with_name("genai_config.json").write_text(json.dumps(CONFIG))
    path.with_name("tokenizer.json").write_text("{}")
    path.with_name("USE.md").write_text("For people.")
    return path


def rewrite_source(source: Path, content: str) -> None:
    source.with_name("genai_config.json").write_text(content)


def cut(source: Path, target: Path, plan: Any = PLAN, **options: Any) -> Path:
    """Writes the cut; gives the path of the config beside it."""
    prune_file(source, target, plan, CutOptions(verify="none", **options))
    return target.with_name("genai_config.json")


def test_the_config_follows_the_decoder_and_all_else_stays(source: Path, tmp_path: Path) -> None:
    before = source.with_name("genai_config.json").read_bytes()
    expected = with_decoder(filename="cut.onnx", num_hidden_layers=2)
    written = json.loads(cut(source, tmp_path / "o" / "cut.onnx").read_text())
    assert written == expected
    assert list(written["model"]["decoder"]) == list(CONFIG["model"]["decoder"])
    assert source.with_name("genai_config.json").read_bytes() == before


def test_a_config_of_another_file_is_left_alone(source: Path, tmp_path: Path) -> None:
    rewrite_source(source, json.dumps(with_decoder(filename="other.onnx")))
    assert not cut(source, tmp_path / "o" / "cut.onnx").exists()
    rewrite_source(source, "{")
    assert not cut(source, tmp_path / "o" / "c.onnx", genai_config="none").exists()


def test_the_sources_config_is_not_overwritten(source: Path) -> None:
    config = source.with_name("genai_config.json")
    before = config.read_bytes()
    with raises(UsageError, "overwrites-input", "genai_config.json"):
        cut(source, config)
    assert config.read_bytes() == before


def test_an_earlier_result_is_replaced_and_another_models_config_is_not(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "o" / "cut.onnx"
    cut(source, target)
    config = json.loads(cut(source, target, MLP).read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 3
    before = target.with_name("genai_config.json").read_bytes()
    cut(source, target.with_name("other.onnx"))
    assert target.with_name("genai_config.json").read_bytes() == before
    config = json.loads(target.with_name("other.onnx.genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "other.onnx"


@pytest.mark.parametrize(("content", "code", "named"), [
    ("{", "genai-config", "genai_config.json"),
    ("[]", "genai-config", "genai_config.json"),
    ({"model": {"decoder": {"pipeline": [{"lm": {"filename": "model.onnx"}}]}}},
     "genai-config", "model.decoder.pipeline.0.lm.filename"),
    ({"model": {"encoder": {"filename": "./model.onnx"}}}, "genai-config",
     "model.encoder.filename"),
    (CONFIG | {"draft": {"filename": "model.onnx"}}, "genai-config", "draft.filename"),
    (with_decoder(shared_initializers=[{"name": "w"}]), "genai-config",
     "model.decoder.shared_initializers"),
    (with_decoder(inputs={"past_key_names": "past.%d.k", "past_value_names": "past.%d.v"}),
     "genai-config", "past_key_values"),
    ("[" * 100_000, "too-many-values", "genai_config.json"),
])  # fmt: skip
def test_layouts_that_a_cut_would_break_are_refused(
    source: Path, tmp_path: Path, content: Any, code: str, named: str
) -> None:
    rewrite_source(source, content if isinstance(content, str) else json.dumps(content))
    with raises(DepthcutError, code, named) as refused:
        cut(source, tmp_path / "o" / "cut.onnx")
    assert "--genai-config none" in str(refused.value) or code == "too-many-values"
    assert not (tmp_path / "o").exists()


def test_a_decoder_with_an_encoder_keeps_its_attentions_and_lists_are_lists() -> None:
    inputs = NAMES["inputs"] | {"cross_past_key_names": "past_key_cross_%d"}
    with raises(SurgeryError, "genai-config"):
        decoder_of(with_decoder(inputs=inputs), GONE, DENSE)
    assert decoder_of(with_decoder(inputs=inputs), [], {})["num_hidden_layers"] == 3
    window = {"slide_key_value_cache": False, "layers": "all"}
    with raises(SurgeryError, "genai-config"):
        decoder_of(with_decoder(sliding_window=window), GONE, {})
    assert decoder_of(with_decoder(inputs={}), GONE, {})["num_hidden_layers"] == 2  # usual names


@pytest.mark.parametrize("parts", [
    {"sliding_window": {"window_size": 8}},
    {"layer_types": ["full_attention"] * 3},
    {"inputs": NAMES["inputs"] | {"block_table": "block_table"}},
    {"session_options": {"provider_options": [{"NvTensorRtRtx": {}}]}},
])  # fmt: skip
def test_where_the_runtime_counts_the_caches_gaps_are_refused(parts: dict[str, Any]) -> None:
    with raises(SurgeryError, "cache-slides", "--renumber-kv"):
        decoder_of(with_decoder(**parts), GONE, {})
    assert decoder_of(with_decoder(**parts), GONE, DENSE)["num_hidden_layers"] == 2


def test_lists_of_layers_follow_the_numbers() -> None:
    window = {"window_size": 8, "slide_key_value_cache": False, "layers": [0, 1, 2]}
    content = with_decoder(sliding_window=window, layer_types=["a", "b", "c"])
    dense = decoder_of(content, GONE, DENSE)
    assert dense["sliding_window"]["layers"] == [0, 1]
    assert dense["layer_types"] == ["a", "c"]
    del content["model"]["decoder"]["layer_types"]
    assert decoder_of(content, GONE, {})["sliding_window"]["layers"] == [0, 2]
    groups = [{"kind": "paged_kv", "layer_ids": [0, 2]}, {"kind": "other", "layer_ids": [1]}]
    paged = decoder_of(with_decoder(state_groups=groups), GONE, DENSE)
    assert paged["state_groups"] == [{"kind": "paged_kv", "layer_ids": [0, 1]}]


def _cache(name: str, length: str, head_size: int | str) -> ir.Value:
    shape = ir.Shape(["batch", 2, length, head_size])
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))


@pytest.mark.parametrize("declared", [8, "kv_cache_dim"])
@pytest.mark.parametrize(("name", "expected"), [("past_key_values.0.key", 2 * 8 * 4), ("mask", 0)])
def test_a_token_in_the_cache_has_all_its_bytes(
    declared: int | str, name: str, expected: int, tmp_path: Path
) -> None:
    past, new = _cache(name, "past", declared), _cache("new", "sequence", 8)
    total = _cache("present.0.key", "total", 8)
    append = ir.node("Concat", [past, new], {"axis": 2}, outputs=[total])
    graph = ir.Graph([past, new], [total], nodes=[append], opset_imports={"": 20}, name="cache")
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    assert read_facts(path).kv_cache_bytes_per_token == expected


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as plain files."""
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "plain" / "model.onnx"
    save_model(tiny_model(TinySpec(tied=True)), path)
    return path


@pytest.fixture
def cached(plain: Path, tmp_path: Path) -> Path:
    """The same model in a cache."""
    copy = tmp_path / "download"
    copy.mkdir()
    for file in plain.parent.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return into_cache(copy, tmp_path / "hub") / "model.onnx"


@pytest.mark.parametrize("subfolder", ["", "onnx", "onnx/fp32"])
def test_sites_and_facts_are_read_in_a_cache(plain: Path, tmp_path: Path, subfolder: str) -> None:
    sites, facts = inspect_file(plain), read_facts(plain)
    assert all(isinstance(site, ResidualSite) for site in sites)
    model = into_cache(plain.parent, tmp_path / "hub", subfolder=subfolder) / "model.onnx"
    assert data_files(load_model(model)) == [data_of(model)]
    assert (inspect_file(model), read_facts(model)) == (sites, facts)


def test_a_model_is_cut_and_verified_in_a_cache(cached: Path, plain: Path, tmp_path: Path) -> None:
    blobs = {file: file.read_bytes() for file in cached.parents[3].joinpath("blobs").iterdir()}
    assert len(blobs) == 2
    report = prune_file(cached, tmp_path / "o" / "m.onnx", PLAN)
    again = prune_file(plain, tmp_path / "p" / "m.onnx", PLAN)
    assert report.verification == again.verification
    assert report.verification.passed is True
    assert report.made_from == again.made_from
    for name in ("m.onnx", data_of(tmp_path / "p" / "m.onnx").name):
        written = tmp_path / "o" / name
        assert not written.is_symlink()
        assert written.read_bytes() == (tmp_path / "p" / name).read_bytes()
    assert {file: file.read_bytes() for file in blobs} == blobs


@pytest.mark.parametrize("inside", [True, False])
def test_sharing_a_caches_weights_is_refused(cached: Path, tmp_path: Path, inside: bool) -> None:
    target = (cached.parent if inside else tmp_path / "o") / "pruned.onnx"
    with raises(OnnxFileError, "weights-linked" if inside else "other-folder"):
        prune_file(cached, target, PLAN, CutOptions(weights="share"))
    assert not target.exists()


def _redirect(cached: Path, target: Path) -> None:
    data = data_of(cached)
    content = data.read_bytes()
    data.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    data.symlink_to(target)


@pytest.mark.parametrize(
    "elsewhere",
    [
        "outside.data",
        "hub/models--owner--other/blobs/outside",
        "hub/models--owner--name/refs/outside",
        "hub/models--owner--name/blobs/below/outside",
        "hub/models--owner--name/snapshots/other/outside",
    ],
)
def test_a_link_out_of_the_blobs_is_refused(cached: Path, tmp_path: Path, elsewhere: str) -> None:
    _redirect(cached, tmp_path / elsewhere)
    with raises(OnnxFileError, "outside-folder", cached):
        load_model(cached)
    with raises(OnnxFileError, "outside-folder", cached):
        prune_file(cached, tmp_path / "o" / "m.onnx", PLAN)
    if elsewhere == "outside.data":
        with raises(OnnxFileError, "outside-folder", cached), OnnxRuntimeRunner(cached, threads=1):
            pass


@pytest.mark.parametrize("name", ["model--owner--name", "some_folder", "models--owner--name"])
def test_only_a_caches_layout_counts(cached: Path, tmp_path: Path, name: str) -> None:
    repository = cached.parents[3]
    moved = repository.rename(repository.with_name(name))
    if name.startswith("models"):
        (moved / "blobs").rename(tmp_path / "elsewhere")
        (moved / "blobs").symlink_to(tmp_path / "elsewhere")
    with raises(OnnxFileError, "outside-folder"):
        load_model(moved / cached.relative_to(repository))
