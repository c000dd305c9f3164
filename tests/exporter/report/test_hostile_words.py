"""Words of strangers in reports, cards and what commands print: no link, no HTML, no command."""

from __future__ import annotations

import functools
import html
import io
import json
import math
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from exporter.artifacts import (
    Arms,
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
from exporter.cli.console import VERBOSE, ConsoleProgress
from exporter.errors import DepthcutError
from exporter.gate.gate import check
from exporter.gate.history import entry_of
from exporter.gate.limits import Limits
from exporter.printable import one_line
from exporter.report.ci import annotation_lines, comment, github_benchmark, junit, summary
from exporter.report.markdown import _target as target
from exporter.report.markdown import code, escaped, fenced
from graph_passes import save_model
from graph_passes.plan_record import PLAN_KEY, recorded
from tests.made_reports import (
    as_markdown,
    as_page,
    as_text,
    full_importance,
    full_report,
    gate_accuracy,
    gate_arm,
    gate_report,
    gate_row,
    made_parts,
)
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

EVIL = (
    "![x](http://evil.example/x) <img src=y> [z](www.evil.example) | @someone `c` "
    "\n# h\n\n- i\x1b[m"
)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_AUTOLINK = re.compile(r"://evil|www\.evil|@some")


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


def marked(text: str) -> ComparisonReport:
    """A report with these words wherever a model or a machine has some, and a regression."""
    task = TaskResult(
        task=text, metric=text, items=9, baseline=0.6, candidate=0.5,
        difference=Interval(value=-0.1, ci95=(-0.12, -0.08)),
    )  # fmt: skip
    pair = SampleAnswer(prompt=text, baseline=text, candidate=text)
    said = gate_accuracy(tasks=[task], answers=SampleAnswers(source=text, answers=[pair]))
    changes = {"latency": [gate_row(candidate_ms=120.0)], "accuracy": said}
    return full_report(layers=3, rows=1, samples=48, text=text).model_copy(update=changes)


def checked(text: str) -> CheckReport:
    result = check(marked(text), Limits(max_task_drop=0.01))
    return result.model_copy(update={"notes": [text]})


@pytest.fixture(scope="module")
def report() -> ComparisonReport:
    return marked(EVIL)


def test_what_is_to_be_found_would_be() -> None:
    assert {"image", "link_open"} <= set(foreign(EVIL))
    assert foreign("<b>") == ["html_inline"] or foreign("<b>") == ["html_block"]
    assert foreign("x\n\n# h") == ["h"]


def test_a_report(report: ComparisonReport, tmp_path: Path) -> None:
    markdown = as_markdown(report)
    assert "evil.example" in markdown
    assert foreign(markdown) == []
    saved = report.write(tmp_path / "report.json")
    assert run(["report", str(saved), "-o", str(tmp_path / "report.md")]) == 0
    assert foreign((tmp_path / "report.md").read_text()) == []


def test_answers_on_a_terminal_and_on_the_page(report: ComparisonReport) -> None:
    assert "evil.example" in as_text(report)
    for line in as_text(report).splitlines():
        assert line.isprintable()
    shown = as_page(report).split("What the models say</h2>")[1].split("</section>")[0]
    assert shown.count("&lt;img src=y&gt;") >= 4
    assert not re.search("<img|<a |\\x1b", shown)


def test_the_summary_and_the_annotations_of_github() -> None:
    found = checked(EVIL)
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


ACTIVE = (
    "]]>&<b>, 100 % x\x1b[31m \u202eevil\r\n::error::no\n##vso[task.x]y \x00\ufffe ##teamcity[z]"
)
_LOG_COMMAND = re.compile(r"^\s*::|##\w*\[", re.MULTILINE)


OUTPUTS: dict[str, Callable[[], str]] = {
    "page": lambda: as_page(marked(ACTIVE)),
    "notebook": lambda: marked(ACTIVE)._repr_html_() or "",
    "Markdown": lambda: as_markdown(marked(ACTIVE)),
    "JUnit": lambda: junit(checked(ACTIVE)),
    "summary": lambda: summary(checked(ACTIVE)),
    "comment": lambda: comment(checked(ACTIVE), marked(ACTIVE)),
    "benchmark": lambda: "".join(github_benchmark(marked(ACTIVE)).values()),
    "annotations": lambda: "\n".join(
        line.removeprefix("::error") for line in annotation_lines(checked(ACTIVE))
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_format_holds_is_visible_and_no_command(name: str) -> None:
    text = OUTPUTS[name]()
    assert "evil" in text
    assert "<b>" not in text or name in ("benchmark", "annotations", "Markdown")  # no HTML, or code
    assert [char for char in text if not (char.isprintable() or char in "\n\t")] == []
    assert name in ("page", "notebook") or not _LOG_COMMAND.search(text)
    if name == "annotations":
        titles = re.findall(r"^ title=([^:,]*)::.*evil", text, re.MULTILINE)
        assert titles
        assert len(titles) == len(text.splitlines())
    if name == "JUnit":  # what is read of it goes to logs, too
        root = Xml.fromstring(text)
        read = [value for one in root.iter() for value in (one.text or "", *one.attrib.values())]
        assert not any(_LOG_COMMAND.search(value) for value in read)


BEYOND_BOUNDS: list[tuple[str, Any]] = [
    ("arms.baseline.encoder_layers", 10**8),
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
    ("latency.0.noise_floor", math.inf),
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
    with raises(DepthcutError, "too-many-values" if too_long else "") as caught:
        ComparisonReport.read(file)
    assert too_long or place in str(caught.value)
    assert run(["report", str(file)]) == 2


@pytest.mark.parametrize(
    ("path", "value"),
    [("model.num_layers", 10**8), ("scores.0.layer", 10**8), ("calibration.samples", 10**30)],
)
def test_scores_of_no_model_are_refused(path: str, value: int, tmp_path: Path) -> None:
    scores, plan = tmp_path / "importance.json", tmp_path / "plan.json"
    scores.write_text(spoilt(full_importance(layers=3).to_json(), path, value))
    assert run(["plan", str(scores), "-o", str(plan), "--drop-attn", "1"]) == 2
    assert not plan.exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [("rows.0.speedup", 1e300), ("rows.0.ci95", [5e-324, 1.0]), ("rows.0.speedup", math.nan)],
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


# What strangers wrote stays text in Markdown: read by a parser, it is what it was.

HOSTILE = [
    "![x](http://evil/x.png)", "[x](http://evil)", "[x]: http://evil", "[x][y]",
    "a](http://evil)[b", "<img src=x onerror=y>", "<!-- hidden", "`code`", "``",
    "**bold** *it* __b__ _i_ ~~gone~~", "# heading", "> quote", ">quote", "- item", "1. item",
    "---", "===", "```sh", "~~~", "a | b", "\\", "\\[x](http://evil)", "&lt;b&gt; &#60;",
    "$\\href{http://evil}{x}$", "line\n\n# heading", "\x1b[31m\u202e",
]  # fmt: skip
texts = st.text(st.sampled_from([*"ab1 .)(!`*_[]<>|\\#-+=~&;:/@$%,{}'\"\n\t\x1b"]), min_size=1)


def plain(text: str) -> str:
    """How a text reads: on one line, control characters visible."""
    return one_line(" ".join(text.split()))


def read_as_text(tokens: list[Token] | None) -> Iterator[str]:
    """The text, and a mark for all that is more than text."""
    for token in tokens or []:
        if token.type == "inline":
            yield from read_as_text(token.children)
        elif token.type in ("text", "text_special"):
            yield token.content
        elif token.type == "html_inline" and token.content == "<!-- -->":
            yield ""
        elif token.type not in ("softbreak",):
            yield f"<{token.type}>"


def rendered(page: str) -> str:
    return "".join(read_as_text(PARSER.parse(page)))


CONTEXTS = {
    "{}": "<paragraph_open>{}<paragraph_close>",
    "- a {}": "<bullet_list_open><list_item_open><paragraph_open>a {}<paragraph_close>"
    "<list_item_close><bullet_list_close>",
    "a **{}** b": "<paragraph_open>a <strong_open>{}<strong_close> b<paragraph_close>",
    "[{}](<beside.md>)": "<paragraph_open><link_open>{}<link_close><paragraph_close>",
    "| h | i |\n|---|---|\n| {} | b |": "<table_open><thead_open><tr_open><th_open>h<th_close>"
    "<th_open>i<th_close><tr_close><thead_close><tbody_open><tr_open><td_open>{}<td_close>"
    "<td_open>b<td_close><tr_close><tbody_close><table_close>",
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_it_reads_as_it_was_written(text: str, context: str) -> None:
    page = context.replace("{}", escaped(text))
    assert rendered(page) == CONTEXTS[context].replace("{}", plain(text))


def test_unescaped_it_would_not() -> None:
    wrong = [t for t in HOSTILE if rendered(t) != CONTEXTS["{}"].replace("{}", plain(t))]
    assert len(wrong) > len(HOSTILE) / 2


@given(texts, st.sampled_from(list(CONTEXTS)))
def test_whatever_it_is_it_is_text(text: str, context: str) -> None:
    words = f"w{text}w" if context == "a **{}** b" else text  # bold begins and ends at words
    if plain(words) in ("", "-", "+"):
        return
    page = context.replace("{}", escaped(words))
    assert rendered(page) == CONTEXTS[context].replace("{}", plain(words))


@pytest.mark.parametrize(
    "text",
    ["https://evil.example", "see www.evil.example", "ftp://x", "a@evil.example", "@someone"],
)
def test_what_github_would_make_a_link_of_is_cut(text: str) -> None:
    result = escaped(text)
    assert re.search(r"://|www\.|@\w", result) is None
    assert html.unescape(result.replace("<!-- -->", "")) == text


@pytest.mark.parametrize(
    "text",
    ["1.130x [1.101, 1.153]", "[-3.2 %, +4.1 %]", "layers.0.self_attn/Add_1", "2 > 1, 3 - 2",
     "std::vector, 50 %", "-0.3", "-", "1.5 GB"],
)  # fmt: skip
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert escaped(text) == text


def test_our_own_code_and_stress_stay_in_notes() -> None:
    text = "the hash `ab_c*d` is *faster* than ` and a*b*"
    result = escaped(text, own_marks=True)
    assert result == "the hash `ab_c*d` is *faster* than \\` and a\\*b\\*"
    assert rendered(result).count("code_inline") == 1
    assert "`" not in escaped("`a`").replace("\\`", "")


@given(texts)
def test_notes_hold_no_links_or_html_either(text: str) -> None:
    result = rendered(f"a {escaped(text, own_marks=True)}")
    matches = set(re.findall(r"<(\w+)>", result)) - set(re.findall(r"<(\w+)>", text))
    assert matches <= {"paragraph_open", "paragraph_close", "code_inline", "em_open", "em_close"}


@given(texts)
def test_code_is_code(text: str) -> None:
    tokens = PARSER.parse(f"a {code(text)} b")
    kinds = [token.type for token in tokens[1].children or []]
    assert kinds == ["text", "code_inline", "text"]


@given(texts, st.sampled_from(["", "```", "`````"]))
def test_nothing_ends_a_block_of_code(text: str, more: str) -> None:
    tokens = PARSER.parse("\n".join(fenced(f"{text}\n{more}\n{text}", "sh")))
    assert [token.type for token in tokens] == ["fence"]


@given(texts)
def test_a_link_leads_where_we_say(text: str) -> None:
    tokens = PARSER.parse(f"[a]({target(text)})")
    kinds = [token.type for token in tokens[1].children or []]
    assert kinds == ["link_open", "text", "link_close"]
    assert target("cell 1/report.html") == "<cell 1/report.html>"


# Names that hold terminal sequences and commands to CI: no command passes them on.


NAME = "\n::error::x\x1b[31m\r\x9b2J\u202e##[error]y\u2028"


def unsafe_lines(text: str) -> list[str]:
    """The lines that a terminal or a CI system would act on."""
    return [
        line
        for line in text.split("\n")
        if not line.replace("\t", "").replace("‍", "").isprintable()
        or line.lstrip().startswith("::")
        or re.search(r"##\w*\[", line)
    ]


def rename(model: onnx.ModelProto, mark: str) -> None:
    """Puts a mark into every name that nothing else must know."""
    renamed = {
        name: f"{name}{mark}"
        for node in model.graph.node
        for name in node.output
        if name not in {output.name for output in model.graph.output}
    }
    for node in model.graph.node:
        node.name += mark
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = renamed.get(name, name)
    del model.graph.value_info[:]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    plain = tmp_path / "plain.onnx"
    save_model(tiny_model(TinySpec(layers=2)), plain)
    model = onnx.load(plain)
    rename(model, NAME)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def told(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = run(list(map(str, arguments)))
    out, err = capfd.readouterr()
    return code, out + err


def test_what_would_act_is_found() -> None:
    assert unsafe_lines(f"a{NAME}")
    assert unsafe_lines("  ::error::x")
    assert not unsafe_lines("std::vector\nname: 1")


CALLS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{model}"),
    "inspect --json": ("inspect", "{model}", "--json"),
    "inspect what can't be cut": ("inspect", "{broken}"),
    "prune what can't be cut": ("prune", "{broken}", "--drop", "attention:0", "-o", "{out}", "-v"),
    "prune": ("prune", "{model}", "--drop", "mlp:1", "-o", "{out}", "-v"),
    "score a config of an unknown type": ("score", "{folder}", "-o", "{out}", "-v"),
    "plan": ("plan", "{scores}", "--drop-joint", "1", "-o", "{out}", "-v"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_command_passes_on_what_a_model_names(
    name: str, hostile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = onnx.load(hostile)
    next(node for node in broken.graph.node if node.op_type == "Add").op_type = "Sub"
    onnx.save(broken, tmp_path / "broken.onnx")
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model_type": f"gone{NAME}", "architectures": [f"Gone{NAME}"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    scores = {"schema": NAME, "scores": [{"kind": NAME}], NAME: 1}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    places = {
        "model": hostile, "broken": tmp_path / "broken.onnx", "folder": folder,
        "scores": tmp_path / "scores.json", "out": tmp_path / "out" / "out.onnx",
    }  # fmt: skip
    code, text = told(capfd, *(word.format(**places) for word in CALLS[name]))
    assert text
    assert unsafe_lines(text) == []
    assert (code == 0) == (name == "prune" or name.startswith("inspect"))
    if name == "inspect --json":
        assert NAME in json.loads(text)["sites"][0]["residual_add"]


def test_a_name_that_the_caller_gives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model\n::error::x\x1b[31m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for command in (
        ("score", folder, "-o", tmp_path / "scores.json", "-v"),
        ("inspect", folder),
        ("inspect", tmp_path / "gone\n::error::x\x1b[31m"),
        ("gone\n::error::x\x1b[31m",),
        ("inspect", tmp_path, "extra\n::error::x\x1b[31m"),
    ):
        code, text = told(capfd, *command)
        assert code in (1, 2)
        assert text
        assert unsafe_lines(text) == [], command


def test_check_and_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = Arms(
        **{name: gate_arm(name, backend=f"cpu{NAME}") for name in ("baseline", "candidate")}
    )
    report = gate_report((gate_row(candidate_ms=120.0),), arms=arms)
    path = tmp_path / f"name{NAME}".replace("/", "") / "report.json"
    path.parent.mkdir()
    report.model_copy(update={"title": NAME}).write(path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, text = told(capfd, "check", path, "--max-slowdown", "1%")
    assert code == 1
    commands = [line for line in text.split("\n") if line.startswith("::error title=")]
    assert len(commands) == 1
    assert unsafe_lines(text) == commands
    assert all(line.isprintable() for line in text.split("\n"))
    for command in (("report", path), ("check", path, "--max-kl", "nonsense")):
        _, text = told(capfd, *command)
        assert unsafe_lines(text) == []


def test_a_library_s_warning_and_log(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, logging, warnings, exporter.cli as c\n"
        f"mark = {NAME!r}\n"
        "@c.cli.command()\n"
        "def loud():\n"
        "    warnings.warn(mark)\n"
        "    logging.getLogger('library').warning(mark)\n"
        "    print(mark)\n"
        "    raise ValueError('first' + mark.replace('\\n', ''))\n"
        "sys.exit(c.run(['loud']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 2
    text = (done.stdout + done.stderr).decode()
    assert "UserWarning" in text
    assert unsafe_lines(text) == []


class Terminal(io.StringIO):
    """A terminal, as far as bars see."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "400")
    progress = ConsoleProgress(VERBOSE)
    with progress.task(f"load :x: [bold]{NAME}", 2) as task:
        task.advance()
        progress.say(f"said :x: [bold]{NAME}")
        progress.detail(f"line\nnext{NAME}")
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", stream.getvalue())  # the bars' own
    assert "said :x: [bold]\\n::error" in text
    assert "load :x: [bold]\\n::error" in text
    assert unsafe_lines(text) == []
    if not terminal:
        assert text == stream.getvalue()
        assert len(text.splitlines()) == 5
