"""A sweep of a tiny random model: what it shares, keeps, tries again, and tells."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import ComparisonReport, SweepCell, SweepReport
from exporter.cli import cli
from exporter.cli.console import ConsoleProgress
from exporter.errors import OnnxFileError
from exporter.pipeline.sweep.job import run_job
from exporter.pipeline.sweep.run import look, run_sweep
from exporter.pipeline.sweep.schema import parse_sweep
from exporter.report.files import SWEEP_REPORTS
from tests.raising import tells
from tests.reading import Heard, data_of
from tests.text_graphs import write_llama_folder

pytestmark = pytest.mark.torch
pytest.importorskip("yaml")

FILE = """\
models: [llama]
plans: [attention:1, {drop: attention:9, name: too-far}]
precisions: [fp32, int8]
shapes: {prefill: [8], decode_past: [8]}
scoring: {calibration: pydoc, samples: 4, sequence_length: 16, batch_size: 2}
measuring:
  {rounds: 2, eval_tokens: 64, eval_sequence_length: 16, threads: 1, agreement_prompts: 0}
"""


@pytest.fixture(scope="module")
def folder(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's file with the random Llama of three layers that it names beside it."""
    folder = tmp_path_factory.mktemp("sweep")
    write_llama_folder(folder / "llama")
    (folder / "sweep.yaml").write_text(FILE)
    return folder


def here(jobs: Sequence[Any], progress: Any) -> Iterator[tuple[int, SweepCell]]:
    """Runs cells in this process, which has PyTorch loaded already."""
    for place, job in enumerate(jobs):
        yield place, run_job(job, progress)


def sweep(folder: Path, out: Path, text: str = FILE, **options: Any) -> SweepReport:
    result = parse_sweep(text, folder / "sweep.yaml")
    return run_sweep(result, out, **{"runner": here, **options})


def looked(folder: Path, out: Path, text: str) -> dict[str, str]:
    """What is there of each cell, without running any."""
    report = look(parse_sweep(text, folder / "sweep.yaml"), out)
    return {cell.folder.removeprefix("cells/llama/"): cell.status for cell in report.cells}


@pytest.fixture(scope="module")
def swept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepReport]:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    out = tmp_path_factory.mktemp("swept") / "out"
    report = sweep(folder, out)
    patch.undo()
    return out, report


def test_every_cell_is_told_with_what_an_export_leaves(swept: tuple[Path, SweepReport]) -> None:
    out, report = swept
    assert [cell.status for cell in report.cells] == ["done", "done", "failed", "failed"]
    failure = report.cells[2].failure
    assert failure is not None
    assert failure.error == "PlanError"
    assert tells(failure.message, 2)
    assert SweepReport.read(out / "sweep.json").cells == report.cells
    assert report.text == FILE
    for cell in report.cells[:2]:
        there = {path.name for path in (out / cell.folder).iterdir()}
        assert {"importance.json", "plan.json", "prune.json", "report.html", "baseline"} <= there
        outcome, result = ComparisonReport.read(out / cell.folder / "report.json"), cell.result
        assert result is not None
        assert [d.layer for d in result.deletions] == [1]
        assert [shape.speedup for shape in result.shapes] == [r.speedup for r in outcome.latency]
        assert [shape.name for shape in result.shapes] == ["prefill 8", "decode at 8"]
        assert outcome.accuracy is not None
        assert result.candidate_bytes == outcome.arms.candidate.file_bytes < result.whole_bytes
        if not outcome.corners:
            own = outcome.accuracy.perplexity
            assert own is not None
            assert result.figures["perplexity"] == (own.baseline, own.candidate)


def test_only_a_quantised_cell_is_held_against_another_float(
    swept: tuple[Path, SweepReport],
) -> None:
    whole, quantised = (cell.result for cell in swept[1].cells[:2])
    assert whole is not None
    assert quantised is not None
    assert all(shape.over_float is None for shape in whole.shapes)
    assert quantised.whole_bytes == whole.whole_bytes
    assert quantised.figures["perplexity"][0] == whole.figures["perplexity"][0]
    assert all(shape.over_float is not None for shape in quantised.shapes)


def test_what_cells_have_in_common_is_there_once(
    swept: tuple[Path, SweepReport],
) -> None:
    out, report = swept
    one, other = (out / cell.folder for cell in report.cells[:2])
    weights = data_of(one / "baseline" / "model.onnx").name
    for name in ("importance.json", "plan.json", f"baseline/{weights}", "candidate/model.onnx"):
        assert (one / name).samefile(other / name)
    assert not (one / "report.json").samefile(other / "report.json")
    shared = {path.name.partition("-")[0] for path in (out / ".depthcut" / "shared").iterdir()}
    assert shared == {"score", "plan", "export", "prune", "quantize"}
    text, page = ((out / f"sweep.{end}").read_text() for end in ("md", "html"))
    assert text.startswith(
        "# depthcut sweep: Sweep\n\n1 model x 2 plans x 2 precisions: 4 cells, 2 done, 2 failed."
    )
    for cell in report.cells[:2]:
        assert f"(<{cell.folder}/report.html>)" in text
        assert f'href="{cell.folder}/report.html"' in page
        assert (out / cell.folder / "report.html").is_file()
    assert text.count("**failed**") == 2
    assert "| llama, too-far, int8 | PlanError |" in text
    assert "<script" not in page


def test_a_second_run_tries_only_what_failed(
    folder: Path, swept: tuple[Path, SweepReport], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    before = (out / "cells/llama/attention-1/int8/report.json").stat().st_mtime_ns
    given: list[str] = []

    def noting(jobs: Sequence[Any], progress: Any) -> Iterator[tuple[int, SweepCell]]:
        given.extend(job.name for job in jobs)
        yield from here(jobs, progress)

    left = out / "plans" / ".depthcut"  # of a run that was killed after it had placed a plan
    left.mkdir()
    report = sweep(folder, out, runner=noting)
    assert not left.exists()
    assert given == ["llama, too-far, fp32", "llama, too-far, int8"]
    assert [cell.status for cell in report.cells] == ["done", "done", "failed", "failed"]
    assert (out / "cells/llama/attention-1/int8/report.json").stat().st_mtime_ns == before


def test_a_changed_setting_asks_for_its_cells_alone(
    folder: Path, swept: tuple[Path, SweepReport], tmp_path: Path
) -> None:
    out = swept[0]
    failed = {"too-far/fp32": "missing", "too-far/int8": "missing"}
    same = {"attention-1/fp32": "done", "attention-1/int8": "done"}
    assert looked(folder, out, FILE) == same | failed
    precision = FILE.replace("int8", "{quantize: int8, block_size: 16, name: int8}")
    assert looked(folder, out, precision) == same | failed | {"attention-1/int8": "missing"}
    plan = FILE.replace("attention:1,", "{drop: attention:2, name: attention-1},")
    assert set(looked(folder, out, plan).values()) == {"missing"}
    text = FILE.replace("eval_tokens: 64", "eval_tokens: 48")
    assert set(looked(folder, out, text).values()) == {"missing"}
    more = FILE.replace("[fp32, int8]", "[fp32, int8, fp16]")
    assert looked(folder, out, more)["attention-1/fp32"] == "done"
    assert looked(folder, out, more)["attention-1/fp16"] == "missing"


def without_table(out: Path) -> None:
    for name in SWEEP_REPORTS:
        (out / name).unlink()


def test_a_sweep_that_is_cut_short_leaves_what_it_has(
    folder: Path, swept: tuple[Path, SweepReport], tmp_path: Path
) -> None:
    done = swept[1].cells[0]

    def interrupted(jobs: Sequence[Any], _: Any) -> Iterator[tuple[int, SweepCell]]:
        yield 2, done
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(folder, tmp_path / "out", runner=interrupted)
    states = [cell.status for cell in SweepReport.read(tmp_path / "out" / "sweep.json").cells]
    assert states == ["missing", "missing", "done", "missing"]
    assert "1 done, 3 not run" in (tmp_path / "out" / "sweep.md").read_text()
    assert not (tmp_path / "out" / ".depthcut" / "lock").exists()


def test_a_model_that_can_not_be_read_fails_its_own_cells(folder: Path, tmp_path: Path) -> None:
    (folder / "broken").mkdir(exist_ok=True)
    text = FILE.replace("models: [llama]", "models: [broken]").replace("[fp32, int8]", "[fp32]")

    def nothing(jobs: Sequence[Any], _: Any) -> Iterator[tuple[int, SweepCell]]:
        assert not jobs
        yield from ()

    report = sweep(folder, tmp_path / "out", text, runner=nothing, progress=(heard := Heard()))
    assert heard.lines[1].startswith("sweep: broken, attention-1, fp32 FAILED: ")
    assert [cell.failure and cell.failure.error for cell in report.cells] == 2 * [
        "ModelSourceError"
    ]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No more"), None),
        (OSError(errno.EFBIG, "No more"), None),
        (OnnxFileError("It can't be written."), OSError(errno.ENOSPC, "No more")),
        (OnnxFileError("It can't be written."), OSError(errno.EFBIG, "No more")),
        (ValueError("what now"), None),
        (MemoryError(), None),
        (OSError(errno.EIO, "I/O error"), None),
    ],
)
def test_a_full_disk_ends_the_sweep_and_anything_else_is_a_cell_that_failed(
    folder: Path, tmp_path: Path, monkeypatch: Any, error: Exception, cause: Exception | None
) -> None:
    def fail(*_: Any) -> Any:
        raise error from cause

    monkeypatch.setattr("exporter.pipeline.sweep.job.export_model", fail)
    number = getattr(cause or error, "errno", None)
    if number in (errno.ENOSPC, errno.EFBIG):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - by its number
            sweep(folder, tmp_path / "out")
        assert caught.value.errno == number
        return
    report = sweep(folder, tmp_path / "out")
    assert {cell.status for cell in report.cells} == {"failed"}
    assert {cell.failure.error for cell in report.cells if cell.failure} == {type(error).__name__}


@pytest.mark.long
def test_a_cell_runs_in_a_process_of_its_own(
    folder: Path, swept: tuple[Path, SweepReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    text = FILE.replace(", {drop: attention:9, name: too-far}", "").replace("int8]", "int4]")
    file = folder / "one.yaml"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)  # what is kept of a cell lies below a folder that is named so
    arguments = ["sweep", str(file), "-o", out.name]
    looking = CliRunner().invoke(cli, [*arguments, "--dry-run"], obj=ConsoleProgress())
    assert "1 done, 1 not run" in looking.stdout
    done = CliRunner().invoke(cli, arguments, obj=ConsoleProgress())
    assert done.exit_code == 0, done.output
    assert "2 cells, 2 done" in done.stdout
    baseline = data_of(out / "cells/llama/attention-1/int4/baseline/model.onnx")
    # shutil.copytree has made copies of the links: what is shared now is the store's own copy.
    assert baseline.stat().st_nlink == 2


def test_the_models_go_where_only_reports_are_wanted(
    folder: Path, swept: tuple[Path, SweepReport], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    one = FILE.replace(", {drop: attention:9, name: too-far}", "").replace(", int8]", "]")
    cell = out / "cells/llama/attention-1/fp32"
    without_table(out)
    (done,) = sweep(folder, out, one + "keep: reports\n").cells
    assert done.status == "done"
    assert not (cell / "candidate").exists()
    assert not (cell / "baseline").exists()
    assert (cell / "report.html").is_file()
    assert looked(folder, out, one + "keep: reports\n") == {"attention-1/fp32": "done"}
    assert looked(folder, out, one) == {"attention-1/fp32": "missing"}


def test_a_model_that_changes_while_the_sweep_runs_fails_its_cells(
    folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "in"))
    text = FILE.replace("[fp32, int8]", "[fp32]")

    def changing(jobs: Sequence[Any], progress: Any) -> Iterator[tuple[int, SweepCell]]:
        config = place / "llama" / "config.json"
        config.write_text(config.read_text() + "\n")
        yield from here(jobs[:1], progress)
        shutil.rmtree(place / "llama")
        yield from ((1, cell) for _, cell in here(jobs[1:], progress))

    report = sweep(place, tmp_path / "out", text, runner=changing)
    messages = [cell.failure.message for cell in report.cells if cell.failure]
    assert next(cell.failure.error for cell in report.cells if cell.failure) == "SweepError"
    assert str(place / "llama") in messages[1]


def test_a_model_that_is_gone_is_not_looked_for_on_the_hub(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "models" / "llama"
    shutil.copytree(folder / "llama", place)
    text = FILE.replace("models: [llama]", "models: [models/llama]")

    def gone(jobs: Sequence[Any], _: Any) -> Iterator[tuple[int, SweepCell]]:
        shutil.rmtree(place)
        assert {job.cell().request.source for job in jobs} == {str(place)}
        yield from ()

    run_sweep(parse_sweep(text, tmp_path / "sweep.yaml"), tmp_path / "out", runner=gone)
