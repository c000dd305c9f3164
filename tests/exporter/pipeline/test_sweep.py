"""A sweep's file, the processes of its cells, and its cells on a cluster."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import OptionError, SweepError
from exporter.pipeline.sweep import job as child
from exporter.pipeline.sweep import run as on_ray
from exporter.pipeline.sweep.cells import cells_of
from exporter.pipeline.sweep.job import Job
from exporter.pipeline.sweep.run import run_on_ray
from exporter.pipeline.sweep.schema import read_sweep
from exporter.progress import QUIET
from tests.raising import raises, tells
from tests.reading import Heard as Lines

pytest.importorskip("yaml")


LEAST = "models: [m]\nplans: [attention:1]\n"


def read(folder: Path, text: str) -> object:
    (folder / "sweep.yaml").write_text(text)
    return read_sweep(folder / "sweep.yaml")


def cells(folder: Path, text: str) -> list[object]:
    (folder / "m").mkdir(exist_ok=True)
    return list(cells_of(read(folder, text), folder / "out"))  # type: ignore[arg-type]


def refused(folder: Path, text: str) -> str:
    with pytest.raises(SweepError) as caught:
        cells(folder, text)
    return str(caught.value)


def test_the_cells_are_the_product_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "n.gguf").touch()
    (tmp_path / "p.json").touch()
    text = """
        models: [m, n.gguf]
        plans:
          - attention:1,2 mlp:0
          - {drop_attn: 2, metric: angular, heal: linear}
          - p.json
        precisions: [fp16, {quantize: int4, block_size: 64, name: small}]
    """
    result = cells(tmp_path, text)
    names = ["attention-1-2_mlp-0", "attention2-angular+linear", "p"]
    assert [cell.folder for cell in result] == [
        f"cells/{model}/{plan}/{precision}"
        for model in ("m", "n")
        for plan in names
        for precision in ("fp16", "small")
    ]


def test_texts_are_relative_to_the_file_and_blocks_scored_on_demand(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    text = "precisions: [{quantize: int8-qdq, calibration: [b.txt, pydoc]}]\n"
    (cell,) = cells(tmp_path, LEAST + text + "scoring: {calibration: [a.txt, chat, b.txt]}\n")
    assert cell.request.score.calibration == (a, "chat", b)
    assert cell.request.quantize.calibration == (b, "pydoc")
    plans = (
        "{drop_block: 1, metric: kl}",
        "{drop_block: 1, metric: [cosine]}",
        "{drop_mlp: 1, metric: kl}",
    )
    text = f"models: [m]\nplans: [{', '.join(plans)}]\n"
    assert [cell.request.score.blocks for cell in cells(tmp_path, text)] == [True, False, False]
    with raises(OptionError, "no-calibration", "calibration"):
        cells(tmp_path, LEAST + "precisions: [int8-qdq]")
    assert cells(tmp_path, LEAST + "precisions: [int8-qdq]\nscoring: {calibration: pydoc}")


def test_what_a_cell_asks_the_pipeline_for(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    result = cells(
        tmp_path,
        LEAST + "precisions: [fp16, {quantize: int8, quantize_method: hqq, head_bits: none}]\n"
        "scoring: {calibration: text.txt, samples: 3}\n"
        "shapes: {prefill: [8], decode_past: [], batch: [1, 2], generate: [[4, 5]]}\n"
        "measuring: {time_budget: 2, eval_text: hf:some/text}\n"
        "export: {opset: 21, checkpoint: true}\n",
    )
    half, quantised = (cell.request for cell in result)
    assert half.source == str(tmp_path / "m")
    assert (half.load.dtype, half.choosing.dtype, half.quantize) == ("float16", "float32", None)
    assert half.score.calibration == (str(tmp_path / "text.txt"),)
    assert (half.score.samples, half.opset, half.checkpoint) == (3, 21, True)
    assert half.compare.prefill_lengths == (8,)
    assert half.compare.batches == (1, 2)
    assert half.compare.timing.generate == ((4, 5),)
    assert half.compare.timing.time_budget_s == 2.0
    assert half.compare.eval_text == "hf:some/text"
    assert quantised.quantize.method == "hqq"
    assert quantised.quantize.head_bits is None
    assert quantised.quantize.embedding_bits == 8
    assert quantised.shared == half.shared == tmp_path / "out" / ".depthcut" / "shared"
    assert not quantised.load.trust_remote_code


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "$: keys and their values"),
        # A file can't switch a danger on.
        ("models: [{source: m, trust_remote_code: true}]\nplans: [mlp:1]",
         "$.models[0].trust_remote_code:"),
        ("models: [m]", "$.plans: a list"),
        ("models: []\nplans: [mlp:1]", "$.models: "),
        (LEAST + "speed: 3", "line 3: $.speed: this key is not known here"),
        (LEAST + "shapes: {prefill: [yes]}", "$.shapes.prefill: "),
        ("models: [m]\nplans:\n- {mlp: 1, name: 2026-13-45}", "no number or date (month"),
        (LEAST + "precisions: [fp31]", "$.precisions[0]: 'fp31': "),
        ("models: [m]\nplans: [mlp:3 mlp:3]", "drops mlp 3 twice"),
        ("models: [m]\nplans: [{drop_mlp: 1, plan: a.json}]", "say what to drop in one way"),
        ("models: [m]\nplans: [{drop_mlp: 1, rank: 4}]", "$.plans[0]: rank is for heal"),
        ("models: [m]\nplans: [{drop_mlp: 1, metric: taste}]", "$.plans[0].metric: 'taste': "),
        ("models: [m]\nplans: [mlp:1, mlp:1]", "plans[0] and plans[1] are both called mlp-1"),
        ("models: [m]\nplans: [a.json]", "There is no plan "),
        (LEAST + "measuring: {eval_text: gone.txt}", "There is no text "),
        ("models: [m\nplans: 3", "line 2, column 6: this is not valid YAML"),
        ("models: [m]\nplans: [mlp:1]\nmodels: [n]", "line 3: the key 'models' is there twice"),
        ("a: !!python/object/apply:os.getcwd []", "this is not valid YAML: could not determine"),
        ("[" * 3000, "this is not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    assert told in refused(tmp_path, text)


def test_a_path_is_relative_to_the_file_and_to_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "owner" / "model").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # A hub id that is a folder beside the caller would be loaded from there.
    result = refused(tmp_path / "there", "models: [owner/model]\nplans: [mlp:1]")
    assert str(tmp_path / "there" / "owner" / "model") in result
    monkeypatch.chdir(tmp_path / "there")
    (cell,) = cells(tmp_path / "there", "models: [owner/model]\nplans: [mlp:1]")
    assert cell.request.source == "owner/model"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    text = "models: [m]\nplans: [mlp:1]\n"
    return Job(
        str(tmp_path / "s.yaml"), text, str(tmp_path / "out"), 0, "m", "m, mlp-1, fp32", "key"
    )


def run(job: Job, monkeypatch: pytest.MonkeyPatch, script: str) -> Any:
    monkeypatch.setattr(child, "WORKER", ("-c", f"import json, os, sys, time\n{script}"))
    heard = Lines()
    ((place, cell),) = child.run_in_children([job], heard)
    assert (place, heard.lines) == (0, ["sweep: 1 of 1: m, mlp-1, fp32 ..."])
    return cell


def test_its_work_goes_in_and_its_answer_comes_out(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
told = json.loads(sys.stdin.readline())
cell = dict(model='m', plan=told['name'], precision='p', folder='f', key=told['key'], status='done')
print(json.dumps({'cell': cell}))
"""
    cell = run(job, monkeypatch, script)
    assert (cell.plan, cell.key, cell.status) == ("m, mlp-1, fp32", "key", "done")


@pytest.mark.parametrize(
    ("script", "told", "hint"),
    [
        ("os.kill(os.getpid(), 9)", "was killed: Killed", "memory"),
        ("sys.exit(3)", "ended with exit code 3", None),
        ("print('{\"cell\": {\"mod', end=''); sys.exit(3)", "ended with exit code 3", None),
    ],
)
def test_one_that_crashes_is_a_cell_that_failed(
    job: Job, monkeypatch: pytest.MonkeyPatch, script: str, told: str, hint: str | None
) -> None:
    cell = run(job, monkeypatch, script)
    assert cell.status == "failed"
    assert told in cell.failure.message
    assert (cell.failure.hint is None) == (hint is None)


def test_a_full_disk_ends_the_sweep(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="Errno 28") as caught:
        run(job, monkeypatch, "print(json.dumps({'full': '/some/where', 'errno': 28}))")
    assert caught.value.filename == "/some/where"


def test_nothing_is_left_running_after_an_interruption(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = f"""
import json, os, signal, sys, time
def end(*_):
    open({str(tmp_path / "tidied")!r}, 'w').close()
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    monkeypatch.setattr(child, "WORKER", ("-c", script))
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(child.run_in_children([job], QUIET))
    assert (tmp_path / "tidied").exists()
    assert time.monotonic() - begin < 50  # it was not waited for to the end


TEXT = "models: [m]\nplans: [mlp:1, mlp:2]\n"


class Machines:
    """Stands in for a cluster: does the pieces here, the last one first."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.workers = 2

    @contextmanager
    def open_pool(self, address: str | None, **options: Any) -> Iterator[Machines]:
        self.asked = {"address": address, **options}
        yield self

    def run(self, setup: Any, work: Any, jobs: Any) -> Iterator[tuple[int, Any]]:
        state = setup()
        for place in reversed(range(len(jobs))):
            yield place, work(state, jobs[place])


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    result = Machines()
    monkeypatch.setattr(on_ray, "open_pool", result.open_pool)
    monkeypatch.setattr(child, "WORKER", ("-c", "import sys; sys.exit(3)"))
    return result


def jobs(folder: Path) -> list[Job]:
    place = str(folder / "s.yaml"), TEXT, str(folder / "out")
    return [Job(*place, index, "m", f"cell {index}", "key") for index in range(2)]


def test_each_cell_has_a_machine_and_a_process_for_itself(
    machines: Machines, tmp_path: Path
) -> None:
    outcome = list(run_on_ray(jobs(tmp_path), QUIET, address="head:6379", workers=3))
    result = {"address": "head:6379", "workers": 3, "whole_nodes": True, "progress": QUIET}
    assert machines.asked == result
    assert [place for place, _ in outcome] == [1, 0]
    assert [cell.plan for _, cell in outcome] == ["mlp-2", "mlp-1"]
    assert all(tells(cell.failure.message, 3) for _, cell in outcome if cell.failure)
    assert list((tmp_path / "out" / ".depthcut").iterdir()) == []


def test_a_machine_that_does_not_see_the_folder_is_refused(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def elsewhere(*_: Any, **__: Any) -> Iterator[Machines]:
        shutil.rmtree(tmp_path / "out")
        yield machines

    monkeypatch.setattr(on_ray, "open_pool", elsewhere)
    with raises(SweepError, "folder-not-shared", tmp_path / "out"):
        list(run_on_ray(jobs(tmp_path), QUIET, address=None))
