"""Scores of a model that is read a layer at a time are those of the whole one, to the last bit."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport
from exporter.cli.score import score as score_command
from exporter.errors import (
    ModelSourceError,
    OptionError,
    ScoringError,
    UnknownArchitectureError,
    UsageError,
)
from exporter.models.families import FAMILIES
from exporter.models.loading.checkpoint_shards import CheckpointShards
from exporter.models.loading.meta_model import MetaModel, ShardedWeights, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import load_model
from exporter.models.texts.calibration import CalibrationText
from exporter.score.scoring import score_on
from exporter.score.streaming import kept_in_file
from tests.raising import ends_in, raises
from tests.reading import Heard, in_file
from tests.tiny_models import (
    hook_count,
    made_text,
    random_text,
    tiny_model,
    tiny_tokenizer,
    write_words,
)

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

LAYERS = [f"model.layers.{number}" for number in range(3)]
ALL = ("cosine", "angular-last", "relative-l2", "kl", "perplexity", "random", "depth")


def saved(folder: Path, family: str, **changes: Any) -> str:
    with quiet_transformers():
        tiny_model(family, **changes).save_pretrained(folder, max_shard_size="30KB")
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_tokenizer().save_pretrained(folder)
    write_words(folder / "text.txt", 160, seed=0)
    return saved(folder, "llama")


def padded_text() -> CalibrationText:
    """The last batch is smaller, and two samples end early."""
    text = random_text(5, 12)
    mask = np.ones(text.input_ids.shape, dtype=bool)
    mask[1, 9:] = mask[4, 5:] = False
    return made_text(text.input_ids, mask)


def expect_equal(found: ImportanceReport, expected: ImportanceReport) -> None:
    for name in ("metric", "scores", "further", "calibration", "made_from"):
        assert getattr(found, name) == getattr(expected, name), name


def test_two_layers_at_most_are_in_memory_and_the_embedding_goes_behind_the_first(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = load_meta(llama)
    seen: list[set[str]] = []
    fill = ShardedWeights.materialise

    def watched(self: ShardedWeights, prefix: str = "", fetched: Any = None) -> None:
        fill(self, prefix, fetched)
        filled = [name for name, p in meta.model.named_parameters() if not p.is_meta]
        parts = (*LAYERS, "model.embed_tokens")
        seen.append({part for part in parts if any(name.startswith(part) for name in filled)})

    monkeypatch.setattr(ShardedWeights, "materialise", watched)
    score_on(meta, random_text(), metrics=["cosine"])
    inside = [item for item in seen if item & {*LAYERS}]
    assert [item & {*LAYERS} for item in inside] == [{name} for name in LAYERS]
    assert ["model.embed_tokens" in item for item in inside] == [True, False, False]


@pytest.mark.parametrize(
    ("case", "metric", "error", "code", "fields"),
    [
        *(
            ("infinite", metric, ScoringError, "not-finite", ["attention", 0, 3])
            for metric in ("cosine", "kl")
        ),
        ("bloom", "cosine", UnknownArchitectureError, "unknown-family", ["BloomForCausalLM"]),
        ("unknown", "cosine", UnknownArchitectureError, "unknown-family", ["bloom"]),
        ("bert", "kl", ScoringError, "no-next-token", ["BertModel"]),
        ("short", "kl", ScoringError, "no-tokens", []),
        ("shrunk", "cosine", ModelSourceError, "unreadable", ["model."]),
    ],
)
def test_what_has_no_score_is_refused_and_leaves_nothing(
    case: str, metric: str, error: Any, code: str, fields: list[object], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    text, folder, states = random_text(5), tmp_path / "model", tmp_path / "states"
    family = {"unknown": "bloom"}.get(case, case if case in ("bloom", "bert") else "llama")
    more = {"apply_residual_connection_post_layernorm": True} if case == "bloom" else {}
    model = tiny_model(family, **more)
    if case == "infinite":
        text.input_ids[text.input_ids == 63] = 62
        text.input_ids[3, 4] = 63
        model.model.embed_tokens.weight[63] = float("inf")
    elif case == "unknown":
        monkeypatch.delitem(FAMILIES, "bloom")
    elif case == "short":
        text = random_text(2, 1)
    model.save_pretrained(folder, max_shard_size="30KB")
    meta = load_meta(str(folder))
    if case == "shrunk":
        shard = meta.shards.entries["model.layers.2.mlp.up_proj.weight"].file
        shard.write_bytes(shard.read_bytes()[:100])
    with raises(error, code, *fields):
        score_on(meta, text, metrics=[metric], batch_size=2, stream_dir=states)
    expect_empty(meta)
    assert not states.exists()


def expect_empty(meta: MetaModel) -> None:
    """Neither weights, nor hooks, nor forwards of the walk are left."""
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert hook_count(meta.model) == 0
    assert not [name for name, module in meta.model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("family", "in_file"),
    [
        ("llama", True), ("gpt2", True), ("gpt_neox", False), ("mixtral", False),
        ("gemma3_text", False), ("bert", True),
    ],
)  # fmt: skip
def test_the_same_scores(tmp_path: Path, family: str, in_file: bool) -> None:
    source = saved(tmp_path / "model", family)
    metrics = ALL if family != "bert" else ("cosine", "angular")
    results: dict[str, Any] = {"metrics": metrics, "batch_size": 2, "blocks": True, "seed": 3}
    expected = score_on(load_model(source), padded_text(), **results)
    meta = load_meta(source)
    before = meta.shards.bytes_read
    folder = tmp_path / "states" if in_file else None
    expect_equal(score_on(meta, padded_text(), stream_dir=folder, **results), expected)
    expect_empty(meta)
    assert meta.shards.bytes_read - before == sum(p.nbytes for p in meta.model.parameters())
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_family_that_is_not_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    source = saved(tmp_path, family)
    monkeypatch.setitem(FAMILIES, "an_alias", FAMILIES[family])
    monkeypatch.delitem(FAMILIES, family)
    expected = score_on(load_model(source), random_text(), metrics=ALL)
    meta = load_meta(source)
    expect_equal(score_on(meta, random_text(), metrics=ALL), expected)
    expect_empty(meta)


def test_ctrl_c_leaves_nothing(llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meta, read = load_meta(llama), CheckpointShards.read

    def interrupted(self: CheckpointShards, name: str, stop: Any = None) -> Any:
        if name.startswith("model.layers.2"):
            raise KeyboardInterrupt
        return read(self, name, stop)

    monkeypatch.setattr(CheckpointShards, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_on(meta, random_text(), stream_dir=tmp_path)
    expect_empty(meta)
    assert not list(tmp_path.iterdir())


def failing(number: int) -> Mock:
    return Mock(side_effect=OSError(number, os.strerror(number)))


def test_a_disk_that_fills_up(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = load_meta(llama)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        with raises(ScoringError, "no-room", "--stream-dir"):
            score_on(meta, random_text(), stream_dir=tmp_path)
    expect_empty(meta)
    with raises(ScoringError, "no-room"):
        kept_in_file(tmp_path, 1 << 60, torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [True, False])
def test_states_that_do_not_fit_go_to_the_disk(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    lasting, own, heard = tmp_path / "var", tmp_path / "own", Heard()
    for folder in (lasting, own):
        folder.mkdir()
    monkeypatch.setattr("exporter.score.streaming.available_bytes", lambda: 1000)
    monkeypatch.setattr("exporter.score.streaming._LASTING", lasting)
    monkeypatch.setattr("tempfile.tempdir", str(own))
    monkeypatch.delenv("TMPDIR", raising=False)
    if named:
        monkeypatch.setenv("TMPDIR", str(own))
    score_on(load_meta(llama), random_text(), progress=heard)
    assert any(str(own if named else lasting) in line for line in heard.lines)
    (tmp_path / "file").write_text("")
    with raises(ScoringError, "no-room", tmp_path / "file" / "x"):
        score_on(load_meta(llama), random_text(), stream_dir=tmp_path / "file" / "x")


@pytest.mark.parametrize("place", [{"": "cpu"}, "disk"])
def test_a_model_that_is_spread_over_devices(llama: str, tmp_path: Path, place: Any) -> None:
    expected = score_on(load_model(llama), random_text(), metrics=("cosine", "kl"))
    if place == "disk":
        place = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        place |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu"}
        place |= {f"model.layers.{number}": "disk" for number in (1, 2)}
    spread = load_model(llama, device_map=place)
    report = score_on(spread, random_text(), metrics=("cosine", "kl"))
    expect_equal(report, expected)


@pytest.fixture
def call(llama: str, tmp_path: Path) -> Any:
    def made(name: str, *options: str) -> int:
        short = ("--samples", "4", "--sequence-length", "16", "--batch-size", "3")
        return cli.run(["score", llama, "-o", str(tmp_path / f"{name}.json"), *short, *options])

    return made


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
        score_command.read(["model", *in_file(tmp_path, words)])
    assert key in caught.value.keys
    assert caught.value.hint


def test_the_file_says_the_same(
    call: Any, llama: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = ("--calibration", f"{llama}/text.txt", "--metric", "cosine", "--metric", "kl")
    assert call("whole", *text) == 0
    assert call("streamed", *text, "--stream", "--stream-dir", str(tmp_path / "states")) == 0
    expect_equal(*(ImportanceReport.read(tmp_path / f"{n}.json") for n in ("streamed", "whole")))
    # Without a text it is pydoc, and that is told.
    assert call("pydoc", "--stream") == 0
    assert "calibration: pydoc" in capfd.readouterr().err
    source = ImportanceReport.read(tmp_path / "pydoc.json").calibration.source
    assert source.startswith("pydoc")


def test_what_can_not_be_had_is_told_before_the_model_is_opened(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Mock(side_effect=AssertionError)
    monkeypatch.setattr("exporter.models.loading.meta_model.load_meta", opened)
    with ends_in(UsageError, "self-text-streamed", "--calibration"):
        assert call("x", "--stream", "--calibration", "self") == 2
    assert not opened.called
    assert list(tmp_path.iterdir()) == []
