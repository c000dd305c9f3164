"""Scores of a model that is read a layer at a time are those of the whole one, to the last bit."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport
from exporter.errors import (
    ModelSourceError,
    ScoringError,
    UnknownArchitectureError,
    UsageError,
)
from exporter.models.loading.checkpoint_shards import CheckpointShards
from exporter.models.loading.meta_model import MetaModel, ShardedWeights, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import load_model
from exporter.progress import Quiet
from exporter.score import CalibrationText, ScoreOptions, score, score_on
from exporter.score.streaming import filled_in_turn, states_in_file
from tests.raising import raises
from tests.reading import Heard
from tests.tiny_models import hook_count, made_text, random_text, tiny_model

pytestmark = pytest.mark.torch

STATES = "exporter.score.streaming"
ALL = ("cosine", "angular-last", "relative-l2", "kl", "perplexity", "random", "depth")


def saved(folder: Path, family: str, **changes: Any) -> str:
    with quiet_transformers():
        tiny_model(family, **changes).save_pretrained(folder, max_shard_size="30KB")
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


def padded_text() -> CalibrationText:
    """The last batch is smaller, and two samples end early."""
    text = random_text(5, 12)
    mask = np.ones(text.input_ids.shape, dtype=bool)
    mask[1, 9:] = mask[4, 5:] = False
    return made_text(text.input_ids, mask)


def expect_equal(found: ImportanceReport, expected: ImportanceReport) -> None:
    assert found.metric == expected.metric
    assert found.scores == expected.scores
    assert found.further == expected.further
    assert found.calibration == expected.calibration
    assert found.made_from == expected.made_from


def expect_empty(meta: MetaModel) -> None:
    """Neither weights, nor hooks, nor forwards of the walk are left."""
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert hook_count(meta.model) == 0
    assert not [name for name, module in meta.model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("family", "in_file"),
    [
        ("llama", True), ("gpt2", True), ("gpt_neox", False), ("mixtral", False),
        ("gemma3_text", False), ("bloom", False), ("granite", False), ("opt", False),
        ("bert", True),
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


def test_two_layers_at_most_are_in_memory(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = load_meta(llama)
    layers = [f"model.layers.{number}" for number in range(3)]
    seen: list[tuple[str, ...]] = []
    fill = MetaModel.materialise

    def watched(self: MetaModel, prefix: str = "", fetched: Any = None) -> None:
        fill(self, prefix, fetched)
        filled = [name for name, p in meta.model.named_parameters() if not p.is_meta]
        seen.append(tuple(x for x in layers if any(name.startswith(x) for name in filled)))

    monkeypatch.setattr(MetaModel, "materialise", watched)
    score_on(meta, random_text(), metrics=["cosine"])
    assert [item for item in seen if item] == [(layer,) for layer in layers]


def test_the_embedding_goes_behind_the_first_layer(llama: str) -> None:
    meta = load_meta(llama)
    empty: list[bool] = []

    class Watching(Quiet):
        def task(self, description: str, total: int | None = None, unit: str = "") -> Any:
            meta.model.model.layers[2].register_forward_pre_hook(
                lambda *_: empty.append(meta.model.get_input_embeddings().weight.is_meta)
            )
            return super().task(description, total)

    score_on(meta, random_text(), progress=Watching())
    assert not empty[0]  # while the first layer runs, the others are asked, too
    assert empty[-1]


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_activations_that_are_not_finite_are_named(tmp_path: Path, metric: str) -> None:
    import torch

    model, text = tiny_model("llama"), random_text(5)
    text.input_ids[text.input_ids == 63] = 62
    text.input_ids[3, 4] = 63
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("inf")
    model.save_pretrained(tmp_path)
    meta = load_meta(str(tmp_path))
    with raises(ScoringError, "not-finite", "attention", 0, 3):
        score_on(meta, text, metrics=[metric], batch_size=2)
    expect_empty(meta)


def test_a_layout_that_does_not_add_up_is_refused_at_once(tmp_path: Path) -> None:
    source = saved(tmp_path, "bloom", apply_residual_connection_post_layernorm=True)
    meta = load_meta(source)
    with raises(UnknownArchitectureError, "not-additive", "BloomForCausalLM"):
        score_on(meta, random_text(), stream_dir=tmp_path / "states")
    expect_empty(meta)
    assert not (tmp_path / "states").exists()  # no text went through any layer


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_family_that_is_not_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    from exporter.models.families import FAMILIES

    source = saved(tmp_path, family)
    row = FAMILIES[family]
    monkeypatch.delitem(FAMILIES, family)
    monkeypatch.setitem(FAMILIES, "an_alias", row)
    expected = score_on(load_model(source), random_text(), metrics=ALL)
    meta = load_meta(source)
    expect_equal(score_on(meta, random_text(), metrics=ALL), expected)
    expect_empty(meta)


def test_a_family_that_no_row_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.models.families import FAMILIES

    meta = load_meta(saved(tmp_path, "bloom"))
    monkeypatch.delitem(FAMILIES, "bloom")
    with raises(UnknownArchitectureError, "unknown-family", "bloom"):
        score_on(meta, random_text())
    expect_empty(meta)


def test_a_shard_that_goes_bad_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = load_meta(saved(tmp_path, "llama"))
    name = "model.layers.2.mlp.up_proj.weight"
    shard = meta.shards.entries[name].file
    shard.write_bytes(shard.read_bytes()[:100])
    with raises(ModelSourceError, "file-shrank", shard.name, "model."):
        score_on(meta, random_text())
    expect_empty(meta)


def test_ctrl_c_leaves_nothing(llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meta = load_meta(llama)
    read = CheckpointShards.read

    def interrupted(self: CheckpointShards, name: str, stop: Any = None) -> Any:
        if name.startswith("model.layers.2"):
            raise KeyboardInterrupt
        return read(self, name, stop)

    monkeypatch.setattr(CheckpointShards, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_on(meta, random_text(), stream_dir=tmp_path)
    expect_empty(meta)
    assert not list(tmp_path.iterdir())


def _full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_fills_up(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    meta = load_meta(llama)
    monkeypatch.setattr(os, call, _full)
    with raises(ScoringError, "no-room", "--stream-dir") as caught:
        score_on(meta, random_text(), stream_dir=tmp_path)
    assert "--stream-dir" in caught.value.hint
    expect_empty(meta)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_at_the_first_layer(llama: str, tmp_path: Path) -> None:
    import torch

    with (
        raises(ScoringError, "no-room"),
        states_in_file(tmp_path, 1, [(1 << 30, 1 << 30)], torch.float32),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_can_not_reserve_is_written_all_the_same(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unable)
    expected = score_on(load_model(llama), random_text())
    expect_equal(score_on(load_meta(llama), random_text(), stream_dir=tmp_path), expected)


@pytest.mark.parametrize("named", [True, False])
def test_states_that_do_not_fit_go_to_the_disk(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    lasting, own, heard = tmp_path / "var", tmp_path / "own", Heard()
    for folder in (lasting, own):
        folder.mkdir()
    monkeypatch.setattr(f"{STATES}.available_bytes", lambda: 1000)
    monkeypatch.setattr(f"{STATES}._LASTING", lasting)
    monkeypatch.setattr("tempfile.tempdir", str(own))
    monkeypatch.delenv("TMPDIR", raising=False)
    if named:
        monkeypatch.setenv("TMPDIR", str(own))
    score_on(load_meta(llama), random_text(), progress=heard)
    assert any(str(own if named else lasting) in line for line in heard.lines)
    (tmp_path / "file").write_text("")
    with raises(ScoringError, "not-kept", tmp_path / "file" / "x"):
        score_on(load_meta(llama), random_text(), stream_dir=tmp_path / "file" / "x")


def test_only_folders_that_it_made_are_removed(tmp_path: Path) -> None:
    import torch

    for name in ("there", "new/kept", "new/gone"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with states_in_file(tmp_path / name, 1, [(1,)], torch.float32):
            if name == "new/kept":
                (tmp_path / name / "another's").touch()
    result = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert result == {"there", "new", "new/kept", "new/kept/another's"}


@pytest.mark.parametrize(
    ("asked", "code", "told"),
    [
        (ScoreOptions(("cosine", "taylor")), "needs-whole-model", ("taylor",)),
        (ScoreOptions(calibration=("self",)), "self-text-streamed", ("--calibration",)),
    ],
)
def test_what_a_streamed_model_can_not_give(
    llama: str, asked: ScoreOptions, code: str, told: tuple[str, ...]
) -> None:
    with raises(UsageError, code, *told):
        score(load_meta(llama), asked)


def test_answers_need_a_head_and_a_next_token(tmp_path: Path, llama: str) -> None:
    with raises(ScoringError, "no-next-token", "kl", "BertModel"):
        score_on(load_meta(saved(tmp_path, "bert")), random_text(), metrics=["kl"])
    with raises(ScoringError, "no-tokens"):
        score_on(load_meta(llama), random_text(2, 1), metrics=["kl"])


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


def test_the_next_layer_is_read_meanwhile_and_no_other(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = load_meta(llama)
    layers = [f"model.layers.{number}" for number in range(3)]
    read: queue.Queue[str] = queue.Queue()
    fetch = ShardedWeights.fetch

    def told(self: ShardedWeights, prefix: str = "", stop: Any = None) -> Any:
        read.put(prefix)
        return fetch(self, prefix, stop)

    monkeypatch.setattr(ShardedWeights, "fetch", told)
    with contextlib.closing(filled_in_turn(meta, layers)) as turns:
        assert next(turns) == 0
        assert [read.get(timeout=60), read.get(timeout=60)] == layers[:2]
        assert read.empty()
        assert next(turns) == 1
        assert read.get(timeout=60) == layers[2]
        assert {
            name.split(".")[2] for name, p in meta.model.named_parameters() if not p.is_meta
        } == {"1"}
    expect_empty(meta)


def test_an_interruption_does_not_wait_for_what_is_read_ahead(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = load_meta(llama)
    ends: queue.Queue[bool] = queue.Queue()

    def slow(self: ShardedWeights, prefix: str = "", stop: Any = None) -> Any:
        if prefix == "model.layers.1":
            ends.put(stop.wait(60))  # a disk that gives nothing
        return fetch(self, prefix, stop)

    fetch = ShardedWeights.fetch
    monkeypatch.setattr(ShardedWeights, "fetch", slow)
    with contextlib.closing(filled_in_turn(meta, [f"model.layers.{n}" for n in (0, 1)])) as turns:
        assert next(turns) == 0
    assert ends.get_nowait(), "it was told to stop, and heard it"
    expect_empty(meta)
