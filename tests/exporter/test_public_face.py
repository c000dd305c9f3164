"""What Python imports: documented in full, it costs nothing before its use, and its page runs."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import exporter
from exporter import errors
from exporter.compare.options import QualityOptions
from tests.raising import raises
from tests.text_graphs import write_llama_folder

PAGE = Path(exporter.__file__).parent / "docs" / "python.md"
NOTEBOOK = PAGE.parents[2] / "samples" / "14_notebook" / "model_to_verdict.ipynb"
SHORT = {
    "HuggingFaceTB/SmolLM2-135M": "model",
    "score_model(model)": "score_model(model, short)",
    'compare_models("whole", "cut")': 'compare_models("whole", "cut", quick)',
    'kind="linear"': 'kind="linear", calibration=("pydoc",), samples=8, sequence_length=16',
}
"""What makes the page's lines short."""
FUNCTIONS = [name for name in exporter.__all__ if name.islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.torch
def test_each_argument_and_error_is_told(name: str) -> None:
    function = getattr(exporter, name)
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    told = re.findall(r"^ {4}\**(\w+): ", text, re.MULTILINE)
    assert [item for item in parameters if item not in told and item != "path"] == []
    raised = [item for item in told if item.endswith("Error")]
    assert all(hasattr(errors, item) for item in raised)
    assert raised or name == "write_reports"


def test_importing_it_imports_no_library_and_knows_every_name() -> None:
    program = (
        "import sys, exporter\n"
        "assert not {'torch', 'onnx_ir', 'onnxruntime', 'pydantic'} & set(sys.modules)\n"
        "assert dir(exporter) == exporter.__all__\n"
        "print(exporter.Limits.__name__, exporter.PruningPlan.__name__)\n"
        "assert 'torch' not in sys.modules\n"
        "exporter.nothing_such"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "Limits PruningPlan\n"
    assert "AttributeError" in done.stderr.splitlines()[-1]


def short_options() -> dict[str, Any]:
    """What the examples are run with."""
    return {
        "short": exporter.ScoreOptions(calibration=("pydoc",), samples=8, sequence_length=16),
        "quick": exporter.CompareOptions(
            prefill_lengths=(8,), decode_past_lengths=(8,), rounds=2, threads=1, eval_tokens=64,
            quality=QualityOptions(agreement_prompts=0, answer_tokens=0),
        ),
    }  # fmt: skip


@pytest.mark.torch
@pytest.mark.usefixtures("exports_once")
def test_the_page_runs_from_a_model_to_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert max(len(example.splitlines()) for example in examples) < 20
    monkeypatch.chdir(tmp_path)
    write_llama_folder(tmp_path / "model")
    scope = short_options()
    page = "\n".join(examples)
    assert all(line in page for line in SHORT)
    for line, shorter in SHORT.items():
        page = page.replace(line, shorter)
    exec(compile(page, "python.md", "exec"), scope)
    checks = scope["depthcut"].check_report(scope["report"], scope["limits"]).checks
    printed = capsys.readouterr().out
    assert {"speedup", "perplexity"} <= {check.quantity for check in checks}
    assert all(str(check.verdict) in printed for check in checks)
    mended = scope["depthcut"].PruneReport.read(tmp_path / "mended" / "prune.json")
    assert [entry.replacement for entry in mended.deleted] == ["linear", "linear"]
    with raises(errors.UsageError, "not-ours", "whole"):
        scope["depthcut"].write_onnx(scope["model"], tmp_path / "whole")
    with raises(errors.UsageError, "options-clash"):
        exporter.write_onnx(scope["model"], tmp_path / "new", target="tensorrt", opset=18)
    names = ("whole/model.onnx", "cut/tokenizer.json", "report/report.html", "healed/plan.json")
    assert all((tmp_path / name).is_file() for name in names)


@pytest.mark.torch
@pytest.mark.usefixtures("exports_once")
def test_each_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    programs = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = {**SHORT, 'out / "cut")': 'out / "cut", quick)'}
    monkeypatch.chdir(tmp_path)
    write_llama_folder(tmp_path / "model")
    scope, shown = short_options(), 0
    for program in programs:
        for line, shorter in lines.items():
            program = program.replace(line, shorter)
        *_, last = program.splitlines()
        exec(compile(program, "notebook", "exec"), scope)
        if last.isidentifier() or last.startswith("depthcut."):
            shown += bool(eval(last, scope)._repr_html_())
    assert shown == 5
    assert (tmp_path / "out/notebook/report/report.html").is_file()
