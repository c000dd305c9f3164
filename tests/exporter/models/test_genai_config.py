"""genai_config.json follows its decoder through a cut, or the cut is refused with the reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cli import run
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import OnnxFileError, SurgeryError, UnsafeInputError, UsageError
from exporter.models.genai_config import GenaiConfig, rewritten
from graph_passes.files import record
from graph_passes.files.storage import save_model
from tests.raising import raises
from tests.reading import in_file
from tests.tiny_graphs import TinySpec, tiny_model

PLAN = [PlannedDeletion(layer=1, kind="attention")]
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


def test_the_config_follows_the_decoder_and_all_else_stays(source: Path, tmp_path: Path) -> None:
    before = source.with_name("genai_config.json").read_bytes()
    prune_file(source, tmp_path / "o" / "cut.onnx", PLAN, CutOptions(verify="none"))
    expected = with_decoder(filename="cut.onnx", num_hidden_layers=2)
    written = json.loads((tmp_path / "o" / "genai_config.json").read_text())
    assert written == expected
    assert list(written["model"]["decoder"]) == list(CONFIG["model"]["decoder"])
    assert source.with_name("genai_config.json").read_bytes() == before


def test_what_a_terminal_acts_on_is_escaped_in_what_is_written() -> None:
    name = "\x9b31m\u2028\u202e"
    config = GenaiConfig(Path("genai_config.json"), with_decoder(name=name))
    text = rewritten(config, "cut.onnx", CACHES, GONE, DENSE)
    assert text.isascii()
    assert json.loads(text)["model"]["decoder"]["name"] == name


def test_a_config_of_another_file_is_left_alone(source: Path, tmp_path: Path) -> None:
    rewrite_source(source, json.dumps(with_decoder(filename="other.onnx")))
    prune_file(source, tmp_path / "o" / "cut.onnx", PLAN, CutOptions(verify="none"))
    assert not (tmp_path / "o" / "genai_config.json").exists()


def test_the_config_can_be_left_out(source: Path, tmp_path: Path) -> None:
    rewrite_source(source, "{")
    prune_file(
        source, tmp_path / "o" / "c.onnx", PLAN, CutOptions(verify="none", genai_config="none")
    )
    assert not (tmp_path / "o" / "genai_config.json").exists()


def test_beside_the_source_the_config_has_a_name_of_its_own(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = source.with_name("genai_config.json").read_bytes()
    target = source.with_name("cut.onnx")
    arguments = ["prune", str(source), "-o", str(target), "--drop", "attention:1"]
    assert run([*arguments, "--verify", "none"]) == 0
    said = capsys.readouterr().err
    assert "cut.onnx.genai_config.json" in said
    assert "tokenizer.json" in said
    written = json.loads(target.with_name("cut.onnx.genai_config.json").read_text())
    assert written["model"]["decoder"]["filename"] == "cut.onnx"
    assert source.with_name("genai_config.json").read_bytes() == before


@pytest.mark.parametrize("role", ["result", "report"])
def test_the_sources_config_is_not_overwritten(source: Path, role: str) -> None:
    config = source.with_name("genai_config.json")
    before = config.read_bytes()
    target = config if role == "result" else source.with_name("cut.onnx")
    report = config if role == "report" else source.with_name("report.json")
    with raises(UsageError, "overwrites-input", "genai_config.json"):
        prune_file(source, target, PLAN, CutOptions(report_path=report, verify="none"))
    assert config.read_bytes() == before
    assert not source.with_name("cut.onnx").exists()


@pytest.mark.parametrize("copied", [True, False])
def test_the_command_line_says_what_else_the_runtime_needs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], copied: bool
) -> None:
    arguments = ["prune", str(source), "-o", str(tmp_path / "o" / "cut.onnx"), "--drop", "mlp:1"]
    assert run([*arguments, *in_file(tmp_path, ["--verify", "none", f"copy: {copied}"])]) == 0
    said = capsys.readouterr().err
    assert "genai_config.json" in said
    assert ("tokenizer.json" in said) is not copied
    assert "USE.md" not in said
    assert (str(source.parent) in said) is not copied
    assert (tmp_path / "o" / "tokenizer.json").exists() is copied


def test_an_earlier_result_is_replaced_and_another_models_config_is_not(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "o" / "cut.onnx"
    prune_file(source, target, PLAN, CutOptions(verify="none"))
    prune_file(source, target, [PlannedDeletion(layer=0, kind="mlp")], CutOptions(verify="none"))
    config = json.loads(target.with_name("genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 3
    before = target.with_name("genai_config.json").read_bytes()
    prune_file(source, target.with_name("other.onnx"), PLAN, CutOptions(verify="none"))
    assert target.with_name("genai_config.json").read_bytes() == before
    config = json.loads(target.with_name("other.onnx.genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "other.onnx"


def test_the_config_appears_with_the_result_or_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o" / "cut.onnx"
    prune_file(source, target, PLAN, CutOptions(verify="none"))
    before = {path.name: path.read_bytes() for path in target.parent.iterdir()}

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "sync_folders", fails)  # after the last move
    with pytest.raises(OnnxFileError):
        prune_file(
            source, target, [PlannedDeletion(layer=0, kind="mlp")], CutOptions(verify="none")
        )
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == before


@pytest.mark.parametrize(("content", "code", "named"), [
    ("{", "not-json", "genai_config.json"),
    ("[]", "not-an-object", "genai_config.json"),
    (json.dumps({"model": {"decoder": {"pipeline": [{"lm": {"filename": "model.onnx"}}]}}}),
     "several-models", "model.decoder.pipeline.0.lm.filename"),
    (json.dumps({"model": {"encoder": {"filename": "./model.onnx"}}}), "several-models",
     "model.encoder.filename"),
    (json.dumps(CONFIG | {"draft": {"filename": "model.onnx"}}), "several-models",
     "draft.filename"),
    (json.dumps(with_decoder(shared_initializers=[{"name": "w"}])), "shared-weights",
     "model.decoder.shared_initializers"),
])  # fmt: skip
def test_layouts_that_a_cut_would_break_are_refused(
    source: Path, tmp_path: Path, content: str, code: str, named: str
) -> None:
    rewrite_source(source, content)
    with raises(SurgeryError, code, named, "--genai-config none"):
        prune_file(source, tmp_path / "o" / "cut.onnx", PLAN, CutOptions(verify="none"))
    assert not (tmp_path / "o").exists()


def test_a_config_that_is_nested_without_end_is_refused(source: Path, tmp_path: Path) -> None:
    rewrite_source(source, "[" * 100_000)
    with pytest.raises(UnsafeInputError):
        prune_file(source, tmp_path / "o" / "cut.onnx", PLAN, CutOptions(verify="none"))
    assert not (tmp_path / "o").exists()


def test_names_that_do_not_fit_the_graph_are_refused(source: Path, tmp_path: Path) -> None:
    names = {"past_key_names": "past.%d.k", "past_value_names": "past.%d.v"}
    rewrite_source(source, json.dumps(with_decoder(inputs=names)))
    with raises(SurgeryError, "unnamed-input", "past_key_values"):
        prune_file(source, tmp_path / "o" / "cut.onnx", PLAN, CutOptions(verify="none"))


def test_the_runtimes_own_names_are_known() -> None:
    content = with_decoder(inputs={})
    assert decoder_of(content, GONE, {})["num_hidden_layers"] == 2


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


def test_a_list_of_layers_that_is_none_is_refused() -> None:
    window = {"slide_key_value_cache": False, "layers": "all"}
    with raises(SurgeryError, "not-numbers"):
        decoder_of(with_decoder(sliding_window=window), GONE, {})


def test_a_decoder_with_an_encoder_keeps_its_attentions() -> None:
    inputs = NAMES["inputs"] | {"cross_past_key_names": "past_key_cross_%d"}
    with raises(SurgeryError, "encoder-keys"):
        decoder_of(with_decoder(inputs=inputs), GONE, DENSE)
    assert decoder_of(with_decoder(inputs=inputs), [], {})["num_hidden_layers"] == 3
