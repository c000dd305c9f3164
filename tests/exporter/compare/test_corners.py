"""The whole and the cut model, in float and quantised: one comparison of four arms."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import ComparisonReport
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.compare.timing.statistics import estimate_between, verdict_of_interval
from exporter.errors import ComparisonError, UnsafeInputError
from exporter.report.sections.blocks import plain
from exporter.report.sections.latency import corners_grid
from exporter.report.terminal import comparison_grids, plain_lines
from tests.compared import EIGHT, QUICK, accuracy_of, four_models, noted, quantized, quick
from tests.present import present
from tests.raising import raises
from tests.text_graphs import write_tiny_lm

OPTIONS = quick(decode_past_lengths=(4,), rounds=6, eval_tokens=64)
FLOATS = ("float baseline", "float candidate")
OTHER_PLAN = [{"layer": 1, "kind": "attention", "replacement": "none"}]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return four_models(tmp_path_factory.mktemp("four"))


def together(four: dict[str, Path], options: CompareOptions = OPTIONS, **more: Any) -> Any:
    """All four in one comparison."""
    floats = (four["whole"], four["cut"])
    return compare(four["whole-q"], four["cut-q"], options, floats=floats, **more)


@pytest.fixture(scope="module")
def report(four: dict[str, Path]) -> ComparisonReport:
    return together(four)


def test_all_four_stand_in_the_report_with_speedups_as_the_pair_s(
    report: ComparisonReport,
) -> None:
    assert report.arms.baseline.quantization == EIGHT
    assert report.arms.references["float baseline"].quantization is None
    whole, *others = report.corners
    assert whole.speedups == {}
    for row in report.latency:
        assert estimate_between(row, "baseline", "candidate").speedup() == row.speedup
        back = estimate_between(row, "candidate", "baseline").speedup()
        assert back.ratio == pytest.approx(1 / row.speedup.ratio, rel=1e-9)
        for corner in others:
            speedup, result = (
                corner.speedups[row.shape_name],
                estimate_between(row, "float baseline", corner.arm).speedup(),
            )
            assert (speedup.value, speedup.ci95) == (result.ratio, result.ci95)


@pytest.mark.usefixtures("no_timing")
def test_each_corner_says_what_a_comparison_with_the_whole_float_model_says(
    report: ComparisonReport, four: dict[str, Path]
) -> None:
    own = {corner.arm: corner for corner in report.corners}
    folders = {"float candidate": "cut", "baseline": "whole-q", "candidate": "cut-q"}
    for arm, folder in folders.items():
        alone = accuracy_of(four["whole"], four[folder], options=OPTIONS)
        assert own["float baseline"].figures == {"perplexity": present(alone.perplexity).baseline}
        assert own[arm].figures == {
            "perplexity": present(alone.perplexity).candidate,
            "kl_divergence": alone.kl_divergence,
            "top1_agreement": alone.top1_agreement,
            "exact_match": alone.figures["exact_match"],
        }
        assert present(alone.kl_divergence) > 0
    assert report.accuracy == accuracy_of(four["whole-q"], four["cut-q"], options=OPTIONS)


@pytest.mark.parametrize(
    ("baseline", "floats", "fields"),
    [
        ("whole-q", ("whole-q", "cut"), ("whole-q", "int8")),
        ("whole-q", ("cut", "cut"), ("baseline",)),
        ("whole-q", ("whole", "whole"), ("candidate",)),
        ("whole", ("whole", "cut"), ("--float",)),
    ],
)
def test_arms_that_are_no_corners_are_refused(
    four: dict[str, Path], baseline: str, floats: tuple[str, str], fields: tuple[str, ...]
) -> None:
    with raises(ComparisonError, "no-grid", *fields):
        compare(four[baseline], four["cut-q"], OPTIONS, floats=tuple(four[f] for f in floats))


@pytest.mark.parametrize(
    ("plan", "error"), [("{", ComparisonError), ("[" * 9999, UnsafeInputError)]
)
def test_a_record_of_a_cut_that_cannot_be_read_is_refused(
    four: dict[str, Path], tmp_path: Path, plan: str, error: type[Exception]
) -> None:
    cut = noted(Path(shutil.copytree(four["cut"], tmp_path / "cut")), "plan", plan)
    with pytest.raises(error):
        together({**four, "cut": cut})


@pytest.mark.usefixtures("no_timing")
def test_arms_that_are_quantised_otherwise_are_refused(
    four: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(four["cut-q"], tmp_path / "cut-q"))
    quantized(other, block_size=64)
    with raises(ComparisonError, "no-grid", "block_size", 32, 64):
        together({**four, "cut-q": other})
    quantized(other, bits={"8": 9})  # the cut one has other products
    assert len(together({**four, "cut-q": other}).corners) == 4


def test_further_cuts_stand_in_one_table_with_the_four(four: dict[str, Path]) -> None:
    root = four["whole"].parent
    made = {
        "other": write_tiny_lm(root / "other-cut", layers=(0,), noise=0.4, plan=OTHER_PLAN),
        "other-q": write_tiny_lm(root / "other-cut-int8", layers=(0,), noise=0.5, plan=OTHER_PLAN),
    }
    quantized(made["other-q"])
    also = tuple(made.values())
    outcome = together(four, also=also)
    names = ("other-cut", "other-cut-int8")
    assert [(c.arm, c.whole, c.pruned, c.quantized) for c in outcome.corners] == [
        ("float baseline", None, False, False),
        ("float candidate", "float baseline", True, False),
        ("baseline", None, False, True),
        ("candidate", "baseline", True, True),
        ("other-cut", "float baseline", True, False),
        ("other-cut-int8", "baseline", True, True),
    ]
    assert outcome.also == [str(folder / "model.onnx") for folder in also]
    row = outcome.latency[0]
    for corner in outcome.corners:
        if corner.whole is None:
            assert corner.over_whole == {}
        else:
            result = corner.over_whole[row.shape_name]
            assert result.value == estimate_between(row, corner.whole, corner.arm).speedup().ratio
            is_pair = (corner.whole, corner.arm) == ("baseline", "candidate")
            assert corner.verdicts[row.shape_name] == (
                row.verdict if is_pair else verdict_of_interval(result.ci95, row.rounds)
            )
    other, other_q = outcome.corners[-2:]
    alone = accuracy_of(four["whole"], made["other-q"], options=OPTIONS)
    assert other_q.figures["perplexity"] == present(alone.perplexity).candidate
    assert other.figures["perplexity"] != other_q.figures["perplexity"]
    quantised = accuracy_of(four["whole-q"], made["other-q"], options=OPTIONS)
    assert other_q.rises == {"perplexity": quantised.intervals["perplexity"]}
    assert [corner.rises == {} for corner in outcome.corners] == [
        corner.whole is None for corner in outcome.corners
    ]
    grid = corners_grid(outcome)
    assert [row[0] for row in grid.rows] == [
        "whole, fp32", "cut, fp32", "other-cut, fp32",
        "whole, int8", "cut, int8", "other-cut, int8",
    ]  # fmt: skip
    for narrow in comparison_grids(outcome)[1:3]:
        assert max(map(len, plain_lines(narrow.header, narrow.rows, narrow.right))) <= 80
    verdicts, perplexities = (
        [str(plain(row[grid.header.index(name)])) for row in grid.rows]
        for name in ("verdict", "perplexity")
    )
    assert [bool(word) for word in verdicts] == [False, True, True] * 2
    assert [words.endswith("]") for words in perplexities] == [False, True, True] * 2
    assert list(outcome.arms.references) == [*FLOATS, *names]


@pytest.mark.usefixtures("no_timing")
def test_a_further_cut_beside_a_pair_needs_no_floats(four: dict[str, Path]) -> None:
    result = compare(four["whole"], four["cut"], OPTIONS, also=(four["cut-q"],))
    assert [(c.arm, c.whole, c.quantized) for c in result.corners] == [
        ("baseline", None, False),
        ("candidate", "baseline", False),
        ("cut-q", None, True),  # no whole model is quantised so
    ]


@pytest.mark.usefixtures("no_timing")
def test_a_second_text_has_a_perplexity_of_its_own(four: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("b c a a c b " * 200)
    result = together(four, replace(OPTIONS, other_text=str(text)))
    there = together(four, replace(OPTIONS, eval_text=str(text)))
    other = result.accuracy.other
    assert other.perplexity == there.accuracy.perplexity
    assert other.text_sha256 == there.accuracy.text_sha256
    own = [corner.figures["other_perplexity"] for corner in result.corners]
    assert own == [corner.figures["perplexity"] for corner in there.corners]
    without = together(four)
    assert without.accuracy == result.accuracy.model_copy(update={"other": None})
    assert not any("other_perplexity" in corner.figures for corner in without.corners)
    with raises(ComparisonError, "same-text", "--other-text"):
        together(four, replace(OPTIONS, other_text="pydoc"))


def test_a_reference_can_not_take_an_arm_s_name(four: dict[str, Path], tmp_path: Path) -> None:
    reference = write_tiny_lm(tmp_path / "baseline", noise=0.1)
    result = compare(four["whole-q"], four["cut-q"], QUICK, references=[reference])
    assert list(result.arms.references) == [str(reference)]
    assert result.latency[0].baseline != result.latency[0].references[str(reference)]
