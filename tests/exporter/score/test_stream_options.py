"""`depthcut score --stream`: the same scores as without it, refusals before a model is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport
from exporter.cli.score import score
from exporter.errors import OptionError
from tests.reading import in_file

WORDS = "w1 w2 w3 w5 w8 w13 w21 w34 " * 20


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--stream-dir", "x"], "stream_dir"),
        (["--device-map", "auto", "--ray=local"], "device_map"),
        (["--stream", "--device-map", "auto"], "device_map"),
        (["--stream", "--trust-remote-code"], "trust_remote_code"),
        (["--stream", "allow_pickle: true"], "allow_pickle"),
        (["--stream", "--ray=local"], "ray"),
    ],
)
def test_options_that_exclude_each_other(words: list[str], key: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        score.read(["model", *in_file(tmp_path, words)])
    assert key in caught.value.keys
    assert caught.value.hint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import tiny_model, tiny_tokenizer

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
    result = ("--calibration", str(checkpoint / "text.txt"), "--metric", "cosine", "--metric", "kl")
    outcome = []
    for name, options in (
        ("whole", ()), ("streamed", ("--stream", "--stream-dir", str(tmp_path / "states")))
    ):  # fmt: skip
        out = tmp_path / f"{name}.json"
        assert _score(checkpoint, out, *result, *options) == 0
        outcome.append(ImportanceReport.read(out))
    assert outcome[0].scores == outcome[1].scores
    assert outcome[0].further == outcome[1].further
    assert outcome[0].made_from == outcome[1].made_from


@pytest.mark.torch
def test_without_a_text_it_is_pydoc_and_that_is_told(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _score(checkpoint, tmp_path / "x.json", "--stream") == 0
    assert "calibration: pydoc" in capfd.readouterr().err
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
