"""`depthcut score --stream`: the same scores as without it, refusals before a model is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport
from exporter.cli.stream_options import streams
from exporter.errors import UsageError

WORDS = "w1 w2 w3 w5 w8 w13 w21 w34 " * 20


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"stream": False, "stream_dir": None, "device_map": "auto"}, False),
        ({"stream": False, "ray": "local"}, False),
        ({"stream": True}, True),
        ({"stream": True, "stream_dir": Path("x"), "allow_pickle": False}, True),
    ],
)
def test_whether_the_weights_are_streamed(options: dict[str, Any], expected: bool) -> None:
    assert streams(options) == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stream_dir": Path("x")}, "--stream-dir is for --stream"),
        ({"device_map": "auto", "ray": "local"}, "--device-map spreads one model"),
        ({"stream": True, "device_map": "auto"}, "--device-map is for models that are loaded"),
        ({"stream": True, "trust_remote_code": True}, "--trust-remote-code is for"),
        ({"stream": True, "allow_pickle": True}, "--allow-pickle is for"),
        ({"stream": True, "ray": "local"}, "--ray is for"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        streams(options)
    assert caught.value.hint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_families import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder, max_shard_size="30KB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(WORDS)
    return folder


def _score(checkpoint: Path, out: Path, *options: str) -> int:
    short = ("--samples", "4", "--sequence-length", "16", "--batch-size", "3")
    return cli.run(["score", str(checkpoint), "-o", str(out), *short, *options])


@pytest.mark.torch
def test_the_file_says_the_same(checkpoint: Path, tmp_path: Path) -> None:
    asked = ("--calibration", str(checkpoint / "text.txt"), "--metric", "cosine", "--metric", "kl")
    found = []
    for name, options in (
        ("whole", ()), ("streamed", ("--stream", "--stream-dir", str(tmp_path / "states")))
    ):  # fmt: skip
        out = tmp_path / f"{name}.json"
        assert _score(checkpoint, out, *asked, *options) == 0
        found.append(ImportanceReport.read(out))
    assert found[0].scores == found[1].scores
    assert found[0].further == found[1].further
    assert found[0].made_from == found[1].made_from


@pytest.mark.torch
def test_without_a_text_it_is_pydoc_and_that_is_told(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _score(checkpoint, tmp_path / "x.json", "--stream") == 0
    assert "calibration: pydoc, since a streamed model can't" in capfd.readouterr().err
    source = ImportanceReport.read(tmp_path / "x.json").calibration.source
    assert source.startswith("pydoc")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--metric", "taylor"), "taylor follows gradients"),
        (("--calibration", "self"), "can't sample a text of its own"),
    ],
)
def test_what_can_not_be_had_is_told_before_the_model_is_opened(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.setattr(
        "exporter.models.loading.meta_model.load_meta", lambda *_, **__: pytest.fail("opened")
    )
    assert _score(checkpoint, tmp_path / "x.json", "--stream", *options) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "x.json").exists()
