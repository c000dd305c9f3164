"""Models' names in what is published: reports, summaries and cards hold no link of theirs."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import onnx_ir as ir
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from exporter.artifacts import (
    Answer,
    CheckReport,
    ComparisonReport,
    Interval,
    PruningPlan,
    SampleAnswer,
    SampleAnswers,
    TaskResult,
)
from exporter.checkpoint.facts import CheckpointFacts, Weights
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.cli import run
from exporter.errors import DepthcutError
from exporter.gate.gate import check
from exporter.gate.history import entry_of
from exporter.gate.limits import Limits
from exporter.report.ci import annotation_lines, comment, github_benchmark, junit, summary
from graph_passes.plan_record import PLAN_KEY, recorded
from tests.made_reports import (
    as_markdown,
    as_page,
    as_text,
    full_importance,
    full_report,
    gate_accuracy,
    gate_report,
    gate_row,
    made_parts,
)
from tests.raising import raises

EVIL = (
    "![x](http://evil.example/x) <img src=y> [z](www.evil.example) | @someone `c` "
    "\n# h\n\n- i\x1b[m"
)
_AUTOLINK = re.compile(r"://evil|www\.evil|@some")
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def tokens(text: str) -> Iterator[Token]:
    for token in PARSER.parse(text):
        yield token
        yield from token.children or []


def foreign(text: str) -> list[str]:
    """What a page holds that names from a model must not make."""
    types = [
        token.type
        for token in tokens(text)
        if token.type in ("link_open", "image", "html_block")
        or (token.type == "html_inline" and token.content != "<!-- -->")
    ]
    headings = [t.content for t in PARSER.parse(text) if t.type == "inline" and t.content == "h"]
    words = [token.content for token in tokens(text) if token.type == "text"]
    return [*types, *headings, *(word for word in words if _AUTOLINK.search(word))]


@pytest.fixture
def report() -> ComparisonReport:
    task = TaskResult(
        task=EVIL, metric=EVIL, items=9, baseline=0.6, candidate=0.5,
        difference=Interval(value=-0.1, ci95=(-0.12, -0.08)),
    )  # fmt: skip
    answer = Answer(text=EVIL, ended=True)
    said = gate_accuracy(
        tasks=[task],
        answers=SampleAnswers(
            source=EVIL, answers=[SampleAnswer(prompt=EVIL, baseline=answer, candidate=answer)]
        ),
    )
    made = gate_report((gate_row(candidate_ms=120.0),), accuracy=said)
    arms = {
        name: arm.model_copy(update={"backend": EVIL, "provider": EVIL})
        for name, arm in (("baseline", made.arms.baseline), ("candidate", made.arms.candidate))
    }
    machine = made.environment.model_copy(update={"processor": EVIL, "gpu": EVIL})
    return made.model_copy(
        update={"arms": made.arms.model_copy(update=arms), "environment": machine,
                "command": ["depthcut", EVIL]}
    )  # fmt: skip


@pytest.fixture
def found(report: ComparisonReport) -> CheckReport:
    checked = check(report, Limits(max_slowdown=0.01, max_task_drop=0.01))
    return checked.model_copy(update={"notes": [EVIL]})


def test_what_is_to_be_found_would_be() -> None:
    assert {"image", "link_open"} <= set(foreign(EVIL))
    assert foreign("<b>") == ["html_inline"] or foreign("<b>") == ["html_block"]
    assert foreign("x\n\n# h") == ["h"]


def test_a_report(report: ComparisonReport) -> None:
    markdown = as_markdown(report)
    assert "evil.example" in markdown
    assert foreign(markdown) == []


def test_answers_on_a_terminal_and_on_the_page(report: ComparisonReport) -> None:
    assert "evil.example" in as_text(report)
    for line in as_text(report).splitlines():
        assert line.isprintable()
    shown = as_page(report).split("What the models say</h2>")[1].split("</section>")[0]
    assert shown.count("&lt;img src=y&gt;") >= 4
    assert not re.search("<img|<a |\\x1b", shown)


def test_the_summary_and_the_annotations_of_github(found: CheckReport) -> None:
    text = summary(found)
    assert "evil.example" in text
    assert foreign(text) == []
    assert [token.type for token in PARSER.parse(text)].count("tr_open") == 1 + len(found.checks)
    lines = annotation_lines(found)
    assert any("evil.example" in line for line in lines)
    assert all(line.startswith("::error title=") and line.isprintable() for line in lines)


def test_a_model_card(report: ComparisonReport) -> None:
    facts = CheckpointFacts(
        base=EVIL.replace("/", ""), on_hub=True, base_sha256="0" * 64, architecture=EVIL, layers=3,
        deletions=[], kept=None, plain=True, transformers="5", dtype="float32",
        before=Weights(parameters=2, bytes=8), after=Weights(parameters=1, bytes=4),
        license={"license": "mit", "license_link": '[x, "y": z] # ' + EVIL.replace("\n", " ")},
    )  # fmt: skip
    plan = PruningPlan(deletions=[], **made_parts(EVIL).model_dump())
    card = model_card(facts, CardSources(plan, report=report))
    _, head, body = card.split("---\n", 2)
    assert foreign(body) == []
    lines = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    assert lines["license"] == "mit"
    assert json.loads(lines["license_link"]).startswith("[x, ")
    assert json.loads(lines["base_model"]) == facts.base


def test_the_page_of_the_command(report: ComparisonReport, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    assert run(["report", str(tmp_path / "report.json"), "-o", str(tmp_path / "report.md")]) == 0
    assert foreign((tmp_path / "report.md").read_text()) == []


ACTIVE = (
    "]]>&<b>, 100 % x\x1b[31m \u202eevil\r\n::error::no\n##vso[task.x]y \x00\ufffe ##teamcity[z]"
)
_LOG_COMMAND = re.compile(r"^\s*::|##\w*\[", re.MULTILINE)


def _active_report() -> ComparisonReport:
    task = TaskResult(
        task=ACTIVE, metric=ACTIVE, items=9, baseline=0.6, candidate=0.5,
        difference=Interval(value=-0.1, ci95=(-0.12, -0.08)),
    )  # fmt: skip
    base = full_report(layers=3, rows=1, samples=48, text=ACTIVE)
    accuracy = gate_accuracy(tasks=[task])
    changes = {"latency": [gate_row()], "accuracy": accuracy}
    return base.model_copy(update=changes)


def _active_check() -> CheckReport:
    checked = check(_active_report(), Limits(max_task_drop=0.01))
    return checked.model_copy(update={"notes": [ACTIVE]})


OUTPUTS: dict[str, Callable[[], str]] = {
    "page": lambda: as_page(_active_report()),
    "Markdown": lambda: as_markdown(_active_report()),
    "JUnit": lambda: junit(_active_check()),
    "summary": lambda: summary(_active_check()),
    "comment": lambda: comment(_active_check(), _active_report()),
    "benchmark": lambda: "".join(github_benchmark(_active_report()).values()),
    "annotations": lambda: "\n".join(
        line.removeprefix("::error") for line in annotation_lines(_active_check())
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_format_holds_is_visible_and_no_command(name: str) -> None:
    text = OUTPUTS[name]()
    assert "evil" in text
    assert "<b>" not in text or name in ("benchmark", "annotations", "Markdown")  # no HTML, or code
    assert [char for char in text if not (char.isprintable() or char in "\n\t")] == []
    assert name == "page" or not _LOG_COMMAND.search(text)
    if name == "annotations":
        titles = re.findall(r"^ title=([^:,]*)::.*evil", text, re.MULTILINE)
        assert titles
        assert len(titles) == len(text.splitlines())
    if name == "JUnit":  # what is read of it goes to logs, too
        root = Xml.fromstring(text)
        read = [value for one in root.iter() for value in (one.text or "", *one.attrib.values())]
        assert not any(_LOG_COMMAND.search(value) for value in read)


BEYOND_BOUNDS: list[tuple[str, Any]] = [
    ("arms.baseline.layers", 10**8),
    ("arms.baseline.file_bytes", 10**399),
    ("arms.candidate.nodes", -1),
    ("plan.0.layer", 10**8),
    ("environment.threads", 10**12),
    ("latency.0.rounds", 0),
    ("latency.0.candidate.samples_ms.0", math.nan),
    ("latency.0.candidate.samples_ms", []),
    ("latency.0.speedup.ratio", 1e300),
    ("latency.0.speedup.ci95", [5e-324, 2.0]),
    ("latency.0.speedup.ci95", [1.2, 0.8]),
    ("latency.0.verdict_interval", [1.0, math.nan]),
    ("latency.0.noise_floor.ratio", math.inf),
    ("accuracy.perplexity.baseline", 0.0),
    ("accuracy.tokens", 10**30),
    ("plan", [{"layer": 1, "kind": "mlp"}] * 20_000),
    ("latency.0.candidate.samples_ms", [1.0] * 1_100_000),
    ("arms.baseline.path", "x" * 1_100_000),
]


def spoilt(text: str, path: str, value: Any) -> str:
    """JSON with another value at a place."""
    data = json.loads(text)
    *holders, last = (int(key) if key.isdigit() else key for key in path.split("."))
    functools.reduce(operator.getitem, holders, data)[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(("path", "value"), BEYOND_BOUNDS, ids=lambda value: str(value)[:40])
def test_a_number_beyond_its_bound_is_refused_with_its_place(
    path: str, value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    file.write_text(spoilt(full_report(layers=3, rows=1, samples=48).to_json(), path, value))
    place = re.sub(r"\.(\d+)", r"[\1]", path)
    too_long = isinstance(value, int) and len(str(value)) > 40
    with raises(DepthcutError, "number-too-long" if too_long else "") as caught:
        ComparisonReport.read(file)
    assert too_long or place in str(caught.value)
    assert run(["report", str(file)]) == 2


@pytest.mark.parametrize(
    ("path", "value"),
    [("model.num_layers", 10**8), ("scores.0.layer", 10**8), ("calibration.samples", 10**30)],
)
def test_scores_of_no_model_are_refused(path: str, value: int, tmp_path: Path) -> None:
    report = full_report(layers=3, rows=1, samples=48).write(tmp_path / "report.json")
    scores = tmp_path / "importance.json"
    scores.write_text(spoilt(full_importance(layers=3).to_json(), path, value))
    assert run(["report", str(report), "--importance", str(scores)]) == 2
    assert not report.with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rows.0.speedup", 1e300),
        ("rows.0.ci95", [5e-324, 1.0]),
        ("rows.0.speedup", math.nan),
    ],
)
def test_a_line_of_a_history_keeps_to_the_bounds(path: str, value: Any, tmp_path: Path) -> None:
    report, history = gate_report(), tmp_path / "history.jsonl"
    entry = entry_of(report, check(report, Limits(max_kl=9)), commit="c")
    history.write_text(spoilt(entry.model_dump_json(), path, value) + "\n")
    saved = str(report.write(tmp_path / "report.json"))
    assert run(["check", saved, "--max-kl", "9", "--history", str(history)]) == 2


@pytest.mark.parametrize("layer", [10**8, 10**399, -1, "1\u0663"])
def test_a_plan_in_a_graph_names_layers_of_a_model(layer: Any) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10)
    model.metadata_props[PLAN_KEY] = json.dumps([{"layer": layer, "kind": "mlp"}])
    assert recorded(model) == frozenset()
