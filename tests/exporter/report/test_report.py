"""What people read: the Markdown report and the table."""

from __future__ import annotations

from typing import Any

import pytest
from markdown_it import MarkdownIt

from exporter.artifacts import (
    Accuracy,
    Arm,
    Arms,
    CalibrationRef,
    ComparisonReport,
    Interval,
    JudgedText,
    LatencyRow,
    ParityCheck,
    PerplexityPair,
    PlannedDeletion,
    PlanParts,
    Speedup,
)
from exporter.printable import significant
from tests.made_reports import (
    as_markdown,
    full_report,
    gate_report,
    gate_row,
    made_environment,
    model_arm,
)


def row(phase: Any, length: int, past: int, ratio: float, word: Any, **changes: Any) -> LatencyRow:
    interval = changes.pop("ci95", (ratio - 0.02, ratio + 0.02))
    values: dict[str, Any] = {
        "phase": phase, "past_length": past, "baseline_ms": 100.0 * ratio, "candidate_ms": 100.0,
        "rounds": 6, "speedup": Speedup(ratio=ratio, ci95=interval), "verdict": word,
        "settled": True,
    }  # fmt: skip
    return gate_row(length, **{**values, **changes})


def arm(name: str, **changes: Any) -> Arm:
    return model_arm(name, **{"path": f"{name} model/model.onnx", **changes})


def _text(source: str) -> CalibrationRef:
    return CalibrationRef(source=source, samples=3, sequence_length=4, tokens=12, sha256="0" * 64)


ACCURACY = Accuracy(
    text_source="wiki | <b>text</b>", text_sha256="e" * 64, tokens=8192,
    perplexity=PerplexityPair(baseline=26.6, candidate=41.4), kl_divergence=0.631,
    top1_agreement=0.609,
)  # fmt: skip


@pytest.fixture
def report() -> ComparisonReport:
    checks = {"logits": 4e-5, "kv": 1.0}
    return gate_report(
        [
            row("prefill", 512, 0, 1.13, "faster"),
            row("decode", 1, 512, 1.06, "inconclusive", ci95=(1.008, 1.11)),
        ],
        command=["depthcut", "export", "my model", "-o", "out"],
        environment=made_environment(other_cpu_share=0.03),
        arms=Arms(
            baseline=arm("base"),
            candidate=arm("cand", nodes=1773, kv_cache_bytes_per_token=33792),
        ),
        plan=[
            PlannedDeletion(layer=25, kind="attention"),
            PlannedDeletion(layer=7, kind="attention", replacement="linear"),
            PlannedDeletion(layer=3, kind="mlp"),
        ],
        calibration=_text("self, seed 0"),
        parity=[
            ParityCheck(
                name=n, phase="decode", max_abs_error=e, tolerance=3e-3, passed=e < 3e-3
            )
            for n, e in checks.items()
        ],
        accuracy=ACCURACY,
    )  # fmt: skip


def of(report: ComparisonReport, **accuracy: Any) -> ComparisonReport:
    """The same with other figures of accuracy."""
    assert report.accuracy is not None
    changed = report.accuracy.model_copy(update=accuracy)
    return report.model_copy(update={"accuracy": changed})


def test_all_parts_are_there_and_the_verdict_comes_first(report: ComparisonReport) -> None:
    text = as_markdown(report)
    head = text.split("## Latency")[0]
    assert head.startswith("# depthcut comparison: Without 2 attentions and 1 MLP\n")
    for words in (
        "faster in 1", "without a verdict in 1 of 2 shapes",
        "perplexity goes from 26.60 to 41.40 (+55.6 %)",
    ):  # fmt: skip
        assert words in head
    for title in (
        "Latency", "Accuracy", "Size", "What was dropped", "Parity", "Environment",
        "How to reproduce",
    ):  # fmt: skip
        assert f"\n## {title}\n" in text
    for words in (
        "- 2 attentions: layers 7 (linear), 25\n- 1 MLP: layer 3",
        "| decode after 512 tokens | baseline | 106 | 127 | 159 | 12 | 1.060x",
        "| kv | decode | 1.0 | 0.0030 | **does not hold** |",
        "other text: 3 samples of self, seed 0 (12 tokens) (SHA-256 `000000000000`)",
        "depthcut export 'my model' -o out",
        "the candidate cand model/model.onnx (SHA-256",
        "| other processes while timing | 3 % of all CPU time |",
    ):
        assert words in text


def test_every_table_is_one_to_a_reader_of_markdown(report: ComparisonReport) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    for text in (as_markdown(report), as_markdown(full_report())):
        tokens = [token.type for token in parser.parse(text)]
        rows = sum(line.startswith("|") for line in text.splitlines())
        rules = tokens.count("table_open")
        assert rules > 4
        assert tokens.count("tr_open") == rows - rules


CUDA = {"provider": "CUDAExecutionProvider"}
LAUNCHES = {"whole-arm": "", "cut-arm": "CUDA graph"}
SETTLED = row("decode", 1, 512, 1.0, "same")
REMARKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "busy": (
        {"environment": made_environment(other_cpu_share=0.25)},
        ["Other processes took 25 % of the machine's CPU time"],
    ),
    "unknown load": (
        {"environment": made_environment()}, ["| other processes while timing | unknown |"]
    ),
    "few rounds": (
        {"latency": [row("prefill", 512, 0, 1.13, "inconclusive", rounds=5), SETTLED]},
        ["**Too few rounds:** prefill of 512 tokens. With fewer than 6"],
    ),
    "not settled": (
        {"latency": [row("prefill", 512, 0, 1.13, "faster", settled=False), SETTLED]},
        ["**Not settled:** prefill of 512 tokens. Times"],
    ),
    "budget": (
        {"latency": [row("prefill", 512, 0, 1.13, "inconclusive", stopped="budget"), SETTLED]},
        ["**Ended by the time budget:** prefill of 512 tokens, before"],
    ),
    "shortened": ({"left_out": ["a cache of 7 for 9"]}, ["**Not timed as asked:** a cache of 7"]),
    "intervals": (
        {"accuracy": ACCURACY.model_copy(
            update={"intervals": {"kl_divergence": Interval(value=0.631, ci95=(0.6, 0.7))}}
        )},
        ["In brackets: the 95 % interval"],
    ),
    "launches": (
        {"latency": [row("prefill", 512, 0, 1.13, "faster", launches=LAUNCHES)]},
        ["cut-arm: CUDA graph"],
    ),
    "on a GPU": (
        {"arms": Arms(baseline=arm("base", **CUDA), candidate=arm("cand", **CUDA))},
        ["These checks ran on the CPU (CPUExecutionProvider), not on CUDAExecutionProvider"],
    ),
    "nothing known": (
        {"accuracy": None, "parity": [], "calibration": None, "plan": []},
        ["Not measured", "# depthcut comparison: Candidate against baseline\n",
         "No deletion is on record."],
    ),
    "a plan's texts": (
        {"parts": PlanParts(
            chosen_on=[_text("one"), _text("two")], stopped_on=[_text("three")],
            judged_apart=[JudgedText(text=_text("four"), figures={
                "kl": 0.125, "log_perplexity_increase": 0.5, "top1_agreement": 0.75,
            })],
        )},
        ["3 samples of one (12 tokens) and 3 samples of two (12 tokens).",
         "3 samples of three (12 tokens).", "| four | +64.9 % | 0.125 |"],
    ),
    "no perplexity": (
        {"accuracy": ACCURACY.model_copy(update={"perplexity": None}), "calibration": None},
        ["There is no perplexity", "not on record here"],
    ),
    **{f"collapsed to {ppl}": (
        {"accuracy": ACCURACY.model_copy(
            update={"perplexity": PerplexityPair(baseline=20.0, candidate=ppl)}
        )},
        ["perplexity goes from 20.00"],
    ) for ppl in (float("inf"), 1e300)},
}  # fmt: skip


@pytest.mark.parametrize("name", REMARKS)
def test_what_a_reader_must_know_is_told_where_it_is_so(
    report: ComparisonReport, name: str
) -> None:
    changes, result = REMARKS[name]
    text = as_markdown(report.model_copy(update=changes))
    assert all(words in text for words in result)
    assert not any(words in as_markdown(report) for words in result)
    assert ("erplexity goes" in text) == (name not in ("no perplexity", "nothing known"))
    assert "whole-arm:" not in text
    assert ("## Parity" in text) == (name != "nothing known")


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (845.4, 3, "845"),
        (1234.5, 3, "1,234"),
        (35.12, 3, "35.1"),
        (0.12345, 3, "0.123"),
        (0.5, 3, "0.500"),
        (1.5, 3, "1.50"),
        (-0.0204, 2, "-0.020"),
        (0.99996, 4, "1.000"),
        (9.9996, 4, "10.00"),
        (0.001, 2, "0.0010"),
        (999999.7, 4, "1.000e+06"),
        (float("nan"), 4, "nan"),
        (26.604, 4, "26.60"),
        (4e-5, 2, "4.0e-05"),
        (1.5e9, 4, "1.500e+09"),
        (0.0, 4, "0"),
    ],
)
def test_numbers_have_significant_digits(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


@pytest.mark.parametrize(
    ("source", "judged", "is_told"),
    [
        ("pydoc (calibration half)", "pydoc (evaluation half)", True),
        ("hf:wiki:v2:train:text", "hf:wiki:v2:test:text", True),
        ("hf:wiki:v2:train:text", "hf:wiki:v1:test:text", False),
        ("valid.txt", "test.txt", False),
    ],
)
def test_another_part_of_a_text_that_decided_is_told(
    report: ComparisonReport, source: str, judged: str, is_told: bool
) -> None:
    for role in ("chosen_on", "fitted_on", "stopped_on", "judged_on"):
        parts = PlanParts(**{role: [_text("other"), _text(source)]})
        markdown = as_markdown(of(report, text_source=judged).model_copy(update={"parts": parts}))
        assert ("In the domain" in markdown) is (is_told and role != "judged_on")
