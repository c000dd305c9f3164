"""Models' names in what is published: reports, summaries and cards hold no link of theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from exporter.artifacts import (
    Answer,
    CheckReport,
    ComparisonReport,
    Interval,
    NearestNeighbours,
    Neighbour,
    PruningPlan,
    QueryNeighbours,
    SampleAnswer,
    SampleAnswers,
    TaskResult,
)
from exporter.checkpoint.facts import CheckpointFacts, Weights
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.gate.gate import check
from exporter.gate.limits import Limits
from exporter.report.ci import annotation_lines, junit, summary
from tests.made_reports import (
    as_markdown,
    as_page,
    as_text,
    gate_accuracy,
    gate_report,
    gate_row,
    made_parts,
)

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
    found = [
        token.type
        for token in tokens(text)
        if token.type in ("link_open", "image", "html_block")
        or (token.type == "html_inline" and token.content != "<!-- -->")
    ]
    headings = [t.content for t in PARSER.parse(text) if t.type == "inline" and t.content == "h"]
    words = [token.content for token in tokens(text) if token.type == "text"]
    return [*found, *headings, *(word for word in words if _AUTOLINK.search(word))]


@pytest.fixture
def report() -> ComparisonReport:
    task = TaskResult(
        task=EVIL, metric=EVIL, items=9, baseline=0.6, candidate=0.5,
        difference=Interval(value=-0.1, ci95=(-0.12, -0.08)),
    )  # fmt: skip
    answer, near = Answer(text=EVIL, ended=True), [Neighbour(sentence=EVIL, cosine=0.5)]
    said = gate_accuracy(
        tasks=[task],
        answers=SampleAnswers(
            source=EVIL, answers=[SampleAnswer(prompt=EVIL, baseline=answer, candidate=answer)]
        ),
        neighbours=NearestNeighbours(
            source=EVIL, queries=[QueryNeighbours(query=EVIL, baseline=near, candidate=near)]
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
    told = as_markdown(report)
    assert "evil.example" in told
    assert foreign(told) == []


def test_answers_on_a_terminal_and_on_the_page(report: ComparisonReport) -> None:
    assert "evil.example" in as_text(report)
    for line in as_text(report).splitlines():
        assert line.isprintable()
    shown = as_page(report).split("What the models say</h2>")[1].split("</section>")[0]
    assert shown.count("&lt;img src=y&gt;") >= 6
    assert not re.search("<img|<a |\\x1b", shown)


def test_the_summary_and_the_annotations_of_github(found: CheckReport) -> None:
    told = summary(found)
    assert "evil.example" in told
    assert foreign(told) == []
    lines = annotation_lines(found)
    assert any("evil.example" in line for line in lines)
    assert all(line.startswith("::error title=") and line.isprintable() for line in lines)


def test_junit_reads_as_it_was_written(found: CheckReport) -> None:
    root = Xml.fromstring(junit(found))
    names = [case.get("name", "") for case in root.iter("testcase")]
    assert any(EVIL.split("\n")[0].replace("\n", " ") in name for name in names)
    assert {element.tag for element in root.iter()} <= {
        "testsuites", "testsuite", "properties", "property", "testcase", "failure", "skipped",
        "system-out",
    }  # fmt: skip


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


def test_the_page_of_the_command(
    report: ComparisonReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporter.cli import run

    report.write(tmp_path / "report.json")
    assert run(["report", str(tmp_path / "report.json"), "--format", "md"]) == 0
    assert foreign((tmp_path / "report.md").read_text()) == []
