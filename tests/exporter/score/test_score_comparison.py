"""How far rankings agree, against sums over pairs written out. No PyTorch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import exporter.cli as command_line
from exporter.artifacts import CalibrationRef, ImportanceReport, ModelRef, ScoreComparison
from exporter.errors import ScoringError, UsageError
from exporter.score.comparison import compare_files
from tests.made_tables import FIRST, SECOND, THIRD, scores_of, training, write_scores
from tests.raising import ends_in, raises

COSINE = [0.9, 0.2, 0.1, 0.4, 0.5, 0.3]
KL = [0.8, 0.1, 0.2, 0.3, 0.6, 0.3]


def _write(
    path: Path, metrics: dict[str, Sequence[float]], *, sha: str = "a", text: str = "t"
) -> Path:
    (first, values), *further = metrics.items()
    ref = CalibrationRef(source=text, samples=1, sequence_length=2, tokens=2, sha256="1" * 64)
    return ImportanceReport(
        model=ModelRef(source=f"model-{sha}", architecture="A", num_layers=6, sha256=sha * 64),
        metric=first,
        calibration=ref,
        scores=scores_of(values),
        further={name: scores_of(v) for name, v in further},
    ).write(path)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    left, right = _ranks(one), _ranks(other)
    mean = (len(one) + 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(left, right, strict=True))
    spreads = [sum((a - mean) ** 2 for a in ranks) for ranks in (left, right)]
    return product / (spreads[0] * spreads[1]) ** 0.5


def _kendall(one: Sequence[float], other: Sequence[float]) -> float:
    def sign(a: float, b: float) -> int:
        return (a > b) - (a < b)

    pairs = list(itertools.combinations(range(len(one)), 2))
    signs = [(sign(one[i], one[j]), sign(other[i], other[j])) for i, j in pairs]
    totals = [sum(s[n] != 0 for s in signs) for n in (0, 1)]
    return sum(a * b for a, b in signs) / (totals[0] * totals[1]) ** 0.5


def test_two_metrics_of_one_file(path: Path) -> None:
    (result,) = compare_files([path, path]).agreements
    assert (result.kind, result.first.metric, result.second.metric) == ("attention", "cosine", "kl")
    assert result.sublayers == 6
    # Sums of a few small numbers.
    assert result.spearman == pytest.approx(_spearman(COSINE, KL), abs=1e-12)
    assert result.kendall == pytest.approx(_kendall(COSINE, KL), abs=1e-12)
    assert result.spearman != pytest.approx(result.kendall, abs=1e-3)
    # The four lowest are 2, 1, 5, 3 and, ties by layer, 1, 2, 3, 5.
    assert result.shared_first == {4: 4}


def test_every_pair_of_two_files(tmp_path: Path) -> None:
    one = _write(tmp_path / "a.json", {"cosine": COSINE, "kl": KL}, text="here")
    two = _write(tmp_path / "b.json", {"cosine": COSINE[::-1]}, text="there")
    result = compare_files([one, two])
    pairs = [
        (a.first.metric, a.first.file, a.second.metric, a.second.file) for a in result.agreements
    ]
    assert pairs == [
        ("cosine", str(one), "kl", str(one)),
        ("cosine", str(one), "cosine", str(two)),
        ("kl", str(one), "cosine", str(two)),
    ]
    assert {name: text.source for name, text in result.texts.items()} == {
        str(one): "here", str(two): "there",
    }  # fmt: skip
    assert result.agreements[1].spearman == pytest.approx(_spearman(COSINE, COSINE[::-1]))


@pytest.mark.parametrize(
    ("change", "code", "fields"),
    [
        ({"architecture": "B"}, "not-comparable", ["run/checkpoint-1", "B"]),
        ({"text": "self"}, "not-comparable", ["a.json", "b.json", "--calibration"]),
        ({"values": [*FIRST[:5], float("nan")]}, "not-finite", ["cosine", "attention 5"]),
        ({}, None, []),  # checkpoints, on one text
    ],
)
def test_what_can_not_be_compared_is_refused(
    tmp_path: Path, change: Any, code: str | None, fields: list[str]
) -> None:
    one = write_scores(tmp_path / "a.json", FIRST, sha="a")
    two = write_scores(tmp_path / "b.json", sha="b", **{"values": FIRST, **change})
    if code is None:
        assert compare_files([one, two]).models[str(two)].sha256 == "b" * 64
        return
    with raises(ScoringError, code, *fields):
        compare_files([one, two])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return _write(tmp_path / "a.json", {"cosine": COSINE, "kl": KL})


def _compared(*words: object) -> int:
    return command_line.run(["score", "--compare", *map(str, words)])


def test_the_command_prints_and_writes(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _compared(path, path) == 0
    header, row = capsys.readouterr().out.splitlines()[2:4]
    assert header.startswith("kind       ranking  compared with  Spearman  Kendall")
    figures = [f"{agreement(COSINE, KL):.3f}" for agreement in (_spearman, _kendall)]
    assert row.split() == ["attention", "cosine", "kl", *figures, "4"]
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]
    assert _compared(path, path, "--json", "-o", tmp_path / "c.json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["agreements"][0]["shared_first"] == {"4": 4}
    written = ScoreComparison.read(tmp_path / "c.json")
    assert written.agreements == compare_files([path, path]).agreements


def test_a_training_is_one_table_of_pairs_and_one_of_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's figure: layers down, checkpoints across, with how far each two agree."""
    files = training(tmp_path)
    out = tmp_path / "out" / "scores.json"
    call = ["score", "--compare", *map(str, files), "-o", str(out)]
    assert command_line.run(call) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:4] for line in shown.splitlines() if line.startswith("attention")] == [
        ["attention", "200", "1000", f"{_spearman(FIRST, SECOND):.3f}"],
        ["attention", "200", "3000", f"{_spearman(FIRST, THIRD):.3f}"],
        ["attention", "1000", "3000", f"{_spearman(SECOND, THIRD):.3f}"],
    ]
    assert str(out.with_suffix(".html")) in shown
    text = out.with_suffix(".md").read_text()
    assert "| layer | 200 | 1000 | 3000 |" in text
    assert f"| 2 | {FIRST[2]:.3f} | {SECOND[2]:.3f} | {THIRD[2]:.3f} |" in text
    assert command_line.run([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "score_comparison"


@pytest.mark.parametrize(
    "option", [["--calibration", "pydoc"], ["--blocks"], ["--samples", "3"], ["-o", "a.json"]]
)
def test_comparing_heeds_no_option_of_scoring_and_writes_over_no_scores(
    path: Path, capsys: pytest.CaptureFixture[str], option: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(path.parent)
    before = path.read_bytes()
    assert _compared(path, path, "-q") == 0
    if option[0] == "-o":
        with ends_in(UsageError, "overwrites-input", "a.json"):
            assert _compared(path, path, "-q", *option) == 2
    else:
        assert _compared(path, path, "-q", *option) == 2
        assert option[0] in capsys.readouterr().err
    assert path.read_bytes() == before
    assert command_line.run(["score", "nothing", "-o", str(path.parent)]) == 2
    assert "is a directory" in capsys.readouterr().err
