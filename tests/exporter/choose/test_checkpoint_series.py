"""Which folders are a training's checkpoints, and which can't be one training's. No PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_series import FIRST, SECOND, write_scores

import exporter.cli as command_line
from exporter.artifacts import ImportanceReport
from exporter.choose.studies.checkpoints import check_series, find_checkpoints
from exporter.choose.studies.series import SeriesPoint, folder_names, score_series
from exporter.errors import ModelSourceError, ScoringError, UsageError
from tests.raising import ends_in, raises

STEPS = (200, 1000, 3000)


def checkpoint(folder: Path, words: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True)
    told = {"architectures": ["A"], "num_hidden_layers": 2, "hidden_size": 8} | config
    (folder / "config.json").write_text(json.dumps(told))
    vocab = {"model": {"vocab": {str(n): n for n in range(words)}}, "padding": len(folder.name)}
    (folder / "tokenizer.json").write_text(json.dumps(vocab))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of three checkpoints, and something else."""
    for step in STEPS:
        checkpoint(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "logs").mkdir()
    return tmp_path / "run"


def in_order(run: Path) -> list[str]:
    return [str(run / f"checkpoint-{step}") for step in STEPS]


def test_a_folder_and_a_pattern_go_by_step(run: Path) -> None:
    assert find_checkpoints([str(run)]) == in_order(run)
    assert find_checkpoints([f"{run}/checkpoint-*"]) == in_order(run)
    assert find_checkpoints([f"{run.parent}/*/checkpoint-?000"]) == in_order(run)[1:]


def test_gguf_files_are_checkpoints_too(tmp_path: Path) -> None:
    names = [tmp_path / f"step-{step}.Q4_1.gguf" for step in (90, 800)]
    for path in (*names, tmp_path / "notes.txt"):
        path.write_text("")
    assert find_checkpoints([str(tmp_path)]) == [str(path) for path in names]


def test_the_alphabets_order_is_a_shells(run: Path) -> None:
    assert find_checkpoints(sorted(in_order(run))) == in_order(run)


def test_another_order_is_the_users(run: Path) -> None:
    backwards = in_order(run)[::-1]
    assert find_checkpoints(backwards) == backwards
    named = [*in_order(run)[1:], str(checkpoint(run / "best"))]
    assert find_checkpoints(named) == named


def test_a_trainers_folder_with_its_last_model_stands_for_what_is_in_it(run: Path) -> None:
    (run / "config.json").write_text("{}")
    assert find_checkpoints([str(run)]) == in_order(run)
    both = [str(run), in_order(run)[0]]
    assert find_checkpoints(both) == both


def test_hub_ids_are_left_alone() -> None:
    assert find_checkpoints(["a/m-step1", "a/m-step2"]) == ["a/m-step1", "a/m-step2"]


def test_wrong_places_are_refused(run: Path) -> None:
    with raises(ModelSourceError, "no-checkpoint", run / "logs"):
        find_checkpoints([str(run / "logs")])
    with raises(ModelSourceError, "pattern-without-match", run / "step-*"):
        find_checkpoints([f"{run}/step-*"])
    with raises(UsageError, "one-checkpoint", in_order(run)[0]):
        find_checkpoints([in_order(run)[0]])
    with raises(UsageError, "named-twice", in_order(run)[0]):
        find_checkpoints([in_order(run)[0], f"{run}/logs/../checkpoint-200"])


def test_shapes_must_be_the_same(run: Path) -> None:
    check_series(in_order(run))
    other = str(checkpoint(run / "checkpoint-4000", hidden_size=16))
    with raises(ModelSourceError, "other-shapes", "checkpoint-3000", other, "hidden_size", 8, 16):
        check_series([*in_order(run), other])
    nested = checkpoint(run / "checkpoint-5000", text_config={"num_hidden_layers": 3})
    with raises(ModelSourceError, "other-shapes", nested, "num_hidden_layers", 2, 3):
        check_series([in_order(run)[0], str(nested)])


def test_text_must_be_split_alike(run: Path) -> None:
    other = str(checkpoint(run / "checkpoint-40000", words=3))
    with raises(ModelSourceError, "other-tokens", other):
        check_series([*in_order(run), other])


def test_a_broken_config_is_named(run: Path) -> None:
    (run / "checkpoint-1000" / "config.json").write_text("{")
    with raises(ModelSourceError, "unreadable", run / "checkpoint-1000" / "config.json"):
        check_series(in_order(run))


def scorer(path: Path, values: list[float], sha: str, calls: list[str]) -> Any:
    def score() -> ImportanceReport:
        calls.append(sha)
        return ImportanceReport.read(write_scores(path, values, model=f"step-{sha}", sha=sha))

    return score


@pytest.fixture
def points(tmp_path: Path) -> Callable[[list[str], str], list[SeriesPoint]]:
    """Two points that note when they are scored; the second's key is the caller's."""

    def make(calls: list[str], key: str) -> list[SeriesPoint]:
        scratch = tmp_path / "scratch.json"
        return [
            SeriesPoint("one", {"model": 1}, scorer(scratch, FIRST, "a", calls)),
            SeriesPoint("two", {"model": key}, scorer(scratch, SECOND, "b", calls)),
        ]

    return make


def test_finished_points_are_kept(tmp_path: Path, points: Any) -> None:
    out, calls = tmp_path / "out", list[str]()
    report = score_series(points(calls, "x"), out)
    assert [point.file for point in report.points] == [
        str(out / "one" / "importance.json"), str(out / "two" / "importance.json"),
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "stability.html", "stability.json", "stability.md",
    ]  # fmt: skip
    again = score_series(points(calls, "x"), out)
    assert calls == ["a", "b"]
    assert again.kinds == report.kinds
    score_series(points(calls, "changed"), out)
    assert calls == ["a", "b", "b"]
    (out / "one" / "importance.json").write_text("{}")
    score_series(points(calls, "changed"), out)
    assert calls == ["a", "b", "b", "a"]


def test_what_is_finished_outlives_an_interruption(tmp_path: Path, points: Any) -> None:
    out, calls = tmp_path / "out", list[str]()
    one, two = points(calls, "x")

    def stop() -> ImportanceReport:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_series([one, SeriesPoint("two", {"model": "x"}, stop)], out)
    assert ImportanceReport.read(out / "one" / "importance.json").metric == "cosine"
    assert not (out / "two").exists()
    score_series([one, two], out)
    assert calls == ["a", "b"]


def test_what_was_scored_when_a_call_was_killed_is_published(
    tmp_path: Path, points: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.artifacts.ledger import StageLedger

    out, calls = tmp_path / "out", list[str]()
    series = points(calls, "x")
    publish, told = StageLedger.publish, list[int]()

    def killed(self: StageLedger) -> None:
        told.append(1)
        if len(told) == 2:
            raise KeyboardInterrupt
        publish(self)

    monkeypatch.setattr(StageLedger, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        score_series(series, out)
    monkeypatch.undo()
    assert len(score_series(series, out).points) == 2
    assert calls == ["a", "b"]


@pytest.mark.parametrize("name", ["two", "stability.md"])
def test_what_no_series_wrote_stays(tmp_path: Path, points: Any, name: str) -> None:
    out, calls = tmp_path / "out", list[str]()
    (out / name).mkdir(parents=True)
    (out / name / "model.safetensors").write_text("of a training")
    with raises(UsageError, "not-ours", out / name):
        score_series(points(calls, "x"), out)
    assert calls == []
    assert [path.name for path in out.rglob("*")] == [name, "model.safetensors"]


def test_a_run_is_no_place_for_its_own_scores(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would take the place of the checkpoint of its name, weights and all."""
    from exporter.models.loading import sources

    monkeypatch.setattr(sources, "source_sha256", lambda source, **_: source)
    before = sorted(run.rglob("*"))
    with ends_in(UsageError, "not-ours"):
        assert command_line.run(["score", "--checkpoints", str(run), "-o", str(run)]) == 2
    assert sorted(run.rglob("*")) == before


def test_points_that_don_t_belong_together_keep_their_scores(tmp_path: Path) -> None:
    scratch, calls = tmp_path / "scratch.json", list[str]()
    short = SeriesPoint("two", {}, scorer(scratch, SECOND[:4], "b", calls))
    with raises(ScoringError, "other-shapes", 6, 4):
        score_series(
            [SeriesPoint("one", {}, scorer(scratch, FIRST, "a", calls)), short], tmp_path / "o"
        )
    assert (tmp_path / "o" / "two" / "importance.json").is_file()
    assert not (tmp_path / "o" / "stability.json").exists()


def test_folders_have_plain_names_that_differ() -> None:
    assert folder_names(["a/b", "a-b", "hf:x:y", "..", "c=1.0"]) == [
        "a-b", "a-b-2", "hf-x-y", "point", "c=1.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "option"),
    [
        (["a", "b"], "", "--checkpoints"),
        (["a", "--vary-samples", "4"], "one-point", "--vary-calibration"),
        (["a", "b", "--vary-samples", "4,8"], "not-one-model", "--checkpoints"),
        (["a", "--checkpoints", "--vary-samples", "4,8"], "text-and-model-differ", "--revisions"),
        (["a", "--vary-samples", "4,8", "--samples", "2"], "samples-given-twice", "--samples"),
        (["a", "--vary-calibration", "x", "--calibration", "y"], "text-given-twice",
         "--calibration"),
        (["o/m", "--revisions", "a"], "one-point", "a "),
        (["o/m", "--revisions", "a,b", "--revision", "c"], "not-one-hub-model", "--revisions"),
        ([".", "--revisions", "a,b"], "not-one-hub-model", "--revisions"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(arguments: list[str], code: str, option: str) -> None:
    with ends_in(UsageError, code, option):
        assert command_line.run(["score", *arguments]) == 2


def test_a_series_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(["score", "--checkpoints"]) == 2
    assert "MODEL" in capsys.readouterr().err


def test_a_text_of_each_models_own_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["score", "--checkpoints", str(run), "--calibration", "self"]
    with ends_in(UsageError, "text-per-model"):
        assert command_line.run(call) == 2


def test_revisions_are_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporter.cli import score_series
    from exporter.models.loading import sources

    def scored(model: str, call_: Any, *_: Any, **__: Any) -> ImportanceReport:
        step = call_.load.revision
        values, sha = (FIRST, "a") if step == "step1" else (SECOND, "b")
        assert call_.score.calibration == ("pydoc",)
        return ImportanceReport.read(write_scores(tmp_path / "s", values, model=model, sha=sha))

    monkeypatch.setattr(sources, "source_sha256", lambda *_, revision, **__: revision)
    monkeypatch.setattr(score_series, "scored", scored)
    out = tmp_path / "out"
    call = ["score", "owner/name", "--revisions", "step1,step3000", "-o", str(out), "--json"]
    assert command_line.run(call) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(point["label"], point["step"]) for point in points] == [
        ("step1", 1),
        ("step3000", 3000),
    ]
    assert {point["model"]["source"] for point in points} == {"owner/name"}


def test_copies_of_one_checkpoint_are_no_training(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.models.loading import sources

    monkeypatch.setattr(sources, "source_sha256", lambda _source, **_: "same")
    with ends_in(UsageError, "one-point", "checkpoint-200", "checkpoint-1000"):
        assert command_line.run(["score", "--checkpoints", str(run), "-o", str(run / "o")]) == 2


def test_a_file_is_no_place_for_a_series(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "there").write_text("")
    call = ["score", "--checkpoints", str(run), "-o", str(run / "there")]
    with ends_in(UsageError, "is-a-file", run / "there"):
        assert command_line.run(call) == 2


def test_a_folder_beside_the_checkpoints_may_be_filled_again(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.cli import score_series
    from exporter.models.loading import sources

    shas = {str(run / f"checkpoint-{step}"): "abc"[n] for n, step in enumerate(STEPS)}

    def scored(model: str, *_: Any, **__: Any) -> ImportanceReport:
        values = FIRST if shas[model] == "a" else SECOND
        return ImportanceReport.read(
            write_scores(run / "logs" / "s", values, model=model, sha=shas[model])
        )

    monkeypatch.setattr(sources, "source_sha256", lambda source, **__: source)
    monkeypatch.setattr(score_series, "scored", scored)
    inside = ["score", "--checkpoints", str(run), "-o", str(run / "importance")]
    assert command_line.run(inside) == 0
    assert command_line.run(inside) == 0
    assert "checkpoint-3000" in capsys.readouterr().err
    (run / "checkpoint-200" / "scores").mkdir()
    over = ["score", "--checkpoints", str(run), "-o", str(run / "checkpoint-200" / "scores")]
    with ends_in(UsageError, "overwrites-input", over[-1]):
        assert command_line.run(over) == 2
