"""The page, whole, offline and accessible; what CI systems read, by what each format says."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from markdown_it import MarkdownIt

from exporter.artifacts import (
    CheckReport,
    ComparisonReport,
    GraphSizeEntry,
    Interval,
    PerplexityPair,
    PruneReport,
    PruningPlan,
    Speedup,
    Verification,
)
from exporter.artifacts.base import Artifact
from exporter.cli import run
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.limits import Limits
from exporter.report.ci import (
    annotation_lines,
    check_grid,
    conclusion,
    github_benchmark,
    junit,
    summary,
)
from exporter.report.sections.verdict import quality_sign
from tests.made_reports import (
    as_markdown,
    as_page,
    full_importance,
    full_report,
    gate_accuracy,
    gate_report,
    gate_row,
    samples,
)
from tests.made_tables import made_depths
from tests.present import present
from tests.reading import Page

HOSTILE = "<script>alert(1)</script>\"'`&| --></style><img src=x onerror=alert(1)>"
TEXT_COLOURS = (
    "ink", "muted", "good", "bad", "even", "unsure", "link",
)  # fmt: skip


def bare(report: ComparisonReport) -> ComparisonReport:
    """What no part of it was measured of."""
    none = {"accuracy": None, "calibration": None}
    empty = {name: [] for name in ("latency", "parity", "plan", "corners", "uses")}
    return report.model_copy(update={**none, **empty})


def with_perplexity(candidate: float, increase: Any, **more: Any) -> ComparisonReport:
    report = full_report()
    pair = PerplexityPair(baseline=16.0, candidate=candidate)
    intervals = {} if increase is None else {"perplexity": increase}
    update = {"perplexity": pair, "intervals": intervals, **more}
    accuracy = present(report.accuracy).model_copy(update=update)
    return report.model_copy(update={"accuracy": accuracy})


@pytest.fixture(scope="module")
def full() -> str:
    return as_page(full_report())


PAGES = {
    "full": lambda: as_page(full_report()),
    "bare": lambda: as_page(bare(full_report())),
    "hostile": lambda: as_page(full_report(text=HOSTILE)),
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_well_formed_closed_and_accessible(name: str) -> None:
    text = PAGES[name]()
    page = Page(text)
    ids = [item["id"] for _, item in page.elements if "id" in item]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("script") == page.all("img") == page.all("iframe") == []
    assert not any(key.startswith("on") or key == "style" for _, a in page.elements for key in a)
    for _, attributes in page.elements:
        for key in ("href", "src", "xlink:href"):
            target = attributes.get(key) or "#"
            assert target.startswith("#") or target == "data:,"
            assert not target.startswith("#") or target == "#" or target[1:] in ids
    for drawing in page.all("svg"):
        labels = str(drawing.get("aria-labelledby", "")).split()
        assert drawing.get("aria-hidden") == "true" or (labels and set(labels) <= set(ids))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in cell for cell in page.all("th"))


def test_the_policy_forbids_all_but_the_pages_own_style(full: str) -> None:
    style = re.search("<style>(.*?)</style>", full, re.DOTALL)
    policy = Page(full).all("meta")[1]["content"]
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert str(policy).startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "url(" not in style[1]
    assert "@import" not in style[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_text_stand_out(full: str, scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", full, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[0] if scheme == "light" else blocks[1]))
    for name in TEXT_COLOURS:
        for ground in ("paper", "panel"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["line"], colours["paper"]) < 4.5  # The measure tells them apart.


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two sRGB colours."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_part_is_there_and_left_out_without_its_figures(full: str) -> None:
    titles = {
        "All models", "Latency", "Accuracy", "Tasks", "What was dropped", "Engines",
        "Parity",
    }  # fmt: skip
    without = PAGES["bare"]()
    assert all(f">{title}</h2>" in full for title in titles)
    left = {title for title in titles if f">{title}</h2>" in without}
    assert left <= {"What was dropped", "Engines", "Accuracy"}
    assert "its speed was not measured" in without
    assert "accuracy not measured" in without


def test_numbers_that_are_none_still_make_a_page() -> None:
    report = with_perplexity(math.inf, None, kl_divergence=math.inf)
    wide = Speedup(ratio=1e12, ci95=(1e-12, 1e12))
    long = {"speedup": wide, "sequence_length": 1 << 30, "new_tokens": 1 << 30, "batch": 1 << 30}
    rows = [row.model_copy(update=long) for row in report.latency]
    text = as_page(report.model_copy(update={"latency": rows}))
    assert "less accurate" in Page(text).text
    assert not re.search(r'(?:d|x|y|cx|cy|width|height)="(?:[^"]*(?:nan|inf)|-)', text)


@pytest.mark.parametrize(
    ("candidate", "interval", "tone"),
    [
        (17.0, None, "unsure"), (15.0, None, "unsure"), (16.0, None, "even"),
        (math.inf, None, "bad"), (math.nan, None, "bad"),
        (17.0, (0.05, 0.07), "bad"), (15.0, (-0.07, -0.05), "good"),
        (17.0, (-0.1, 0.2), "unsure"), (16.1, (-0.01, 0.015), "even"),
    ],
)  # fmt: skip
def test_a_change_of_perplexity_is_judged_by_its_interval(
    candidate: float, interval: tuple[float, float] | None, tone: str
) -> None:
    increase = interval and Interval(value=sum(interval) / 2, ci95=interval)
    assert quality_sign(with_perplexity(candidate, increase)).tone == tone


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"figures": {"embedding_cosine": 0.98765}}, "cosine of embeddings: 0.9877"),
        ({"kl_divergence": 0.25}, "KL divergence: 0.250"),
        ({}, "accuracy not measured"),
    ],
)
def test_without_a_perplexity_the_sign_says_how_far_the_cut_moved(
    values: dict[str, Any], words: str
) -> None:
    accuracy = present(gate_accuracy()).model_copy(
        update={"perplexity": None, "kl_divergence": None, "top1_agreement": None, "figures": {}}
        | values
    )
    sign = quality_sign(full_report().model_copy(update={"accuracy": accuracy}))
    assert (sign.word, sign.tone) == (words, "unsure")


def test_saved_reports_are_rendered_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = full_report().write(tmp_path / "one" / "report.json")
    assert run(["report", str(saved)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one' / 'report.html'}\n"
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert page == as_page(full_report())
    assert run(["report", str(saved), "-o", str(tmp_path / "one.md")]) == 0
    assert (tmp_path / "one.md").read_text(encoding="utf-8") == as_markdown(full_report())


def test_reports_that_can_t_be_rendered_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = full_report().write(tmp_path / "report.json")
    before = saved.read_bytes()
    assert run(["report", str(saved), "-o", str(saved)]) == 2
    assert run(["report", str(saved), str(saved)]) == 2
    later = tmp_path / "later.json"
    later.write_text(json.dumps({**json.loads(before), "schema_version": 99}), encoding="utf-8")
    assert run(["report", str(later)]) == 2
    assert "$.schema_version is 99" in capsys.readouterr().err
    assert saved.read_bytes() == before
    assert not (tmp_path / "later.html").exists()


# What CI systems read.


LENGTHS = {128: 88.0, 256: 83.0, 512: 70.0, 1024: 80.1}
"""Slower, unsure, faster, the same."""


@pytest.fixture
def report() -> ComparisonReport:
    widths = {256: 0.05}
    rows = [
        gate_row(n, candidate_ms=ms, width=widths.get(n, 0.01), candidate=spread(ms))
        for n, ms in LENGTHS.items()
    ]
    return gate_report(rows)


def spread(median_ms: float) -> Any:
    values = [median_ms * (1 + 0.005 * (n - 11.5)) for n in range(24)]
    return samples(median_ms).model_copy(update={"samples_ms": values})


@pytest.fixture
def found(report: ComparisonReport) -> CheckReport:
    old = gate_report([gate_row(n) for n in LENGTHS])
    return check(report, Limits(max_slowdown=0.03), baseline=BaselineMatch(old))


def test_each_verdict_has_its_place_in_junit(found: CheckReport) -> None:
    root = Xml.fromstring(junit(found))
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for element in (root, suite):
        counts = [element.get(name) for name in ("tests", "failures", "errors")]
        assert counts == ["4", "1", "0"]
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert {name: [child.tag for child in case] for name, case in cases.items()} == {
        "prefill 128: time": ["failure", "system-out"],
        "prefill 256: time": ["skipped", "system-out"],
        "prefill 512: time": ["system-out"],
        "prefill 1024: time": ["system-out"],
    }
    slow = cases["prefill 128: time"]
    assert "+10.0 %" in present(slow.find("failure")).get("message", "")
    assert slow.get("time") == "0.088000"
    # Not knowing fails in JUnit where it fails in the shell.
    (suite,) = Xml.fromstring(junit(found, inconclusive_fails=True))
    assert (suite.get("failures"), suite.get("skipped")) == ("2", "0")
    assert len(list(suite.iter("failure"))) == 2


def test_junit_keeps_to_what_jenkins_and_pytest_agree_on(found: CheckReport) -> None:
    """The attributes and children that Jenkins' junit-10.xsd has, in an order that it takes."""
    allowed = {
        "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
        "testsuite": (
            {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"},
            {"properties", "testcase", "system-out", "system-err"},
        ),
        "properties": (set(), {"property"}),
        "property": ({"name", "value"}, set()),
        "testcase": (
            {"name", "classname", "time"},
            {"skipped", "error", "failure", "system-out", "system-err"},
        ),
        "failure": ({"message", "type"}, set()),
        "skipped": ({"message", "type"}, set()),
        "system-out": (set(), set()),
    }
    for element in Xml.fromstring(junit(found)).iter():
        attributes, children = allowed[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children


def test_annotations_are_errors_and_warnings_and_the_summary_a_table(found: CheckReport) -> None:
    lines = annotation_lines(found)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning"]
    assert lines[0].startswith("::error title=prefill 128%3A time::prefill 128: time +10.0 %25 [")
    both = annotation_lines(found, inconclusive_fails=True)
    assert [line.split(" ")[0] for line in both] == ["::error", "::error"]
    text = summary(found)
    read = MarkdownIt("commonmark").enable("table").parse(text)
    assert [token.type for token in read].count("tr_open") == 1 + 4
    assert "❌ regression" in text
    assert "**Regression: 1 regression, 1 can't tell, 1 improved, 1 within the limit.**" in text


def test_github_benchmark_has_a_file_for_each_direction(report: ComparisonReport) -> None:
    files = github_benchmark(report)
    smaller, bigger = (json.loads(files[f"{name}.json"]) for name in ("smaller", "bigger"))
    for entries in (smaller, bigger):
        assert entries
        for entry in entries:
            assert {"name", "unit", "value"} <= set(entry) <= {
                "name", "unit", "value", "range", "extra",
            }  # fmt: skip
            assert isinstance(entry["value"], int | float)
    by_name = {entry["name"]: entry for entry in smaller}
    time = by_name["prefill, batch 1, length 128: latency"]
    assert (time["unit"], time["value"]) == ("ms", 88.0)
    assert time["range"] == "85.47 to 90.53"
    assert {"model: file-size", "accuracy: perplexity"} <= set(by_name)
    assert {entry["name"].split(": ")[1] for entry in bigger} == {"speedup", "top1-agreement"}


def test_what_has_collapsed_or_was_not_measured_is_no_figure(report: ComparisonReport) -> None:
    collapsed = report.model_copy(update={"accuracy": gate_accuracy(math.inf)})
    assert all("Infinity" not in text for text in github_benchmark(collapsed).values())
    result = check(collapsed, Limits(max_perplexity_increase=0.1))
    assert conclusion(result) == "Regression: 1 regression."
    assert "inf" in check_grid(result).rows[0][3]
    Xml.fromstring(junit(result))
    texts = github_benchmark(gate_report(accuracy=None)).values()
    measures = {entry["name"].split(": ")[1] for text in texts for entry in json.loads(text)}
    assert measures == {"latency", "speedup", "file-size", "kv-cache-per-token", "nodes"}


@pytest.mark.parametrize("name", ["junit", "github-benchmark", "comment"])
def test_every_format_is_written_by_its_option(
    name: str, report: ComparisonReport, tmp_path: Path
) -> None:
    saved, target = report.write(tmp_path / "report.json"), tmp_path / "ci"
    assert run(["check", str(saved), "--max-slowdown", "3%", f"--{name}", str(target)]) in (0, 3)
    files = [*target.iterdir()] if target.is_dir() else [target]
    assert files
    assert all(file.stat().st_size for file in files)


SIZE = GraphSizeEntry(nodes=9, parameters=100, bytes=400)
UNCHECKED = Verification(method="none", runs=0, max_abs_error=None, tolerance=None, passed=None)
NOTEBOOK: dict[str, Callable[[str], Artifact]] = {
    "judged by": lambda _: check(gate_report(), Limits(min_speedup=1)),
    "Scores by": lambda name: full_importance(text=name, layers=3),
    "On held-out text": made_depths,
    "speedup": lambda name: full_report(text=name),
    "parameters": lambda name: PruneReport(
        target=name, deleted=[], refused=[], before=SIZE, after=SIZE, verification=UNCHECKED
    ),
}


@pytest.mark.parametrize("part", NOTEBOOK)
def test_a_notebook_shows_a_table_of_each_kind(part: str) -> None:
    shown = NOTEBOOK[part](HOSTILE)._repr_html_() or ""
    page = Page(shown)
    assert part in shown
    assert page.all("table")
    assert page.all("script") == page.all("img") == []


def test_a_notebook_shows_a_plan_as_a_list_and_the_fields_of_anything_else() -> None:
    assert "<li>" in (PruningPlan(deletions=full_report().plan)._repr_html_() or "")
    assert Artifact()._repr_html_() is None
