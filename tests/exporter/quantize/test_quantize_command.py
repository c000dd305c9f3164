"""`depthcut quantize`: what it prints, what it copies, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.cli import run
from exporter.engines.decoding.text_model import TextModel
from exporter.quantize.quantize import RoundingDifference
from tests.reading import in_file, names_in
from tests.text_graphs import TIED, write_tokenizer, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = written(TIED, tmp_path / "float" / "model.onnx").parent
    write_tokenizer(path)
    (path / "config.json").write_text('{"eos_token_id": 3}', encoding="utf-8")
    (path / "notes.txt").write_text("mine", encoding="utf-8")
    return path


def test_a_folder_is_quantised_with_what_makes_it_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genai = {"model": {"decoder": {"filename": "model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(genai), encoding="utf-8")
    output = tmp_path / "int4" / "small.onnx"
    assert run(["quantize", str(folder), "-o", str(output), "-q"]) == 0
    printed = capsys.readouterr().out
    assert "products: 2 in 4 bits, 1 in 8 bits, the embedding in 8;" in printed
    assert printed.splitlines()[-1] == str(output)
    assert names_in(output.parent) == [
        "USE.md", "config.json", "genai_config.json", "small.onnx", "small.onnx.*.data",
        "tokenizer.json",
    ]  # fmt: skip
    assert "small.onnx" in (output.parent / "USE.md").read_text()
    assert run(["quantize", str(folder), "-o", str(output.with_name("second.onnx")), "-q"]) == 0
    assert "second.onnx" in (output.parent / "second.onnx.USE.md").read_text()
    assert "second.onnx" not in (output.parent / "USE.md").read_text()
    config = json.loads((output.parent / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["filename"] == "small.onnx"
    assert TextModel.of(output).stop_ids == {3}


def test_what_stands_in_the_outputs_folder_stays(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "int4" / "model.onnx"
    output.parent.mkdir()
    (output.parent / "config.json").write_text("{}", encoding="utf-8")
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert run(["quantize", str(folder), "-o", str(output), "-q"]) == 0
    assert (output.parent / "config.json").read_text(encoding="utf-8") == "{}"
    assert (output.parent / "tokenizer.json").is_file()
    # A broken config costs the lines, and nothing else.
    output = tmp_path / "new" / "model.onnx"
    assert run(["quantize", str(folder), "-o", str(output), "-q"]) == 0
    assert not (output.parent / "USE.md").exists()
    assert (output.parent / "config.json").read_text(encoding="utf-8") == "{"


@pytest.mark.parametrize(("kl", "told"), [(7.6, True), (1.5, False), (None, False)])
def test_a_result_far_from_the_float_model_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, kl: float | None, told: bool,
) -> None:  # fmt: skip
    far = RoundingDifference(1.0, 1.0, kl)
    monkeypatch.setattr("exporter.quantize.quantize.rounding_difference", lambda *_, **__: far)
    keys = in_file(tmp_path, ["block_size: 128", "--quantize", "int8", "head_bits: none"])
    assert (
        run(["quantize", str(folder), "-o", str(tmp_path / "o.onnx"), "-q", "--json", *keys]) == 0
    )
    content = json.loads(capsys.readouterr().out)
    assert content["record"]["bits"] == {"8": 3}
    assert content["in_float"] == {"table": "its rows of 64 are no multiple of the block of 128"}
    assert content["bytes_after"] < content["bytes_before"]
    assert content["difference"]["max_abs_error"] == 1
    assert run(["quantize", str(folder), "-o", str(tmp_path / "p.onnx"), "-q"]) == 0
    assert ("differ widely from the float model" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--quantize", "int8-qdq"], "--calibration"),
        (["--quantize-method", "gptq"], "hqq"),
        (["--quantize", "int2"], "Invalid value"),
        (["block_size: 20"], "block_size"),
        (["block_size: 0"], "block_size"),
        (["--quantize", "int8-dynamic", "--quantize-method", "hqq"], "--quantize-method"),
        (["--quantize", "int8-dynamic", "block_size: 64"], "block_size"),
        (["--quantize", "int8-qdq", "--calibration", "gone.txt"], "gone.txt"),
        (["--calibration", "pydoc"], "--calibration"),
        (["--quantize-method", "gguf"], "--gguf"),
        (["--quantize", "fp8"], "Invalid value"),
        (["--quantize", "int8-qdq", "block_size: 64", "--calibration", "pydoc"], "block_size"),
    ],
)  # fmt: skip
def test_wrong_calls_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    told: str,
) -> None:  # fmt: skip
    output = tmp_path / "out" / "model.onnx"
    call = ["quantize", str(folder), "-o", str(output)]
    assert run([*call, *in_file(tmp_path, arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not output.parent.exists()
