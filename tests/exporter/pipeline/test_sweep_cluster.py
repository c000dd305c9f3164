"""A sweep's cells on a cluster: a machine each, in the one folder that all of them see."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import SweepError
from exporter.pipeline.sweep import job as child
from exporter.pipeline.sweep import run as on_ray
from exporter.pipeline.sweep.job import Job
from exporter.pipeline.sweep.run import run_on_ray
from exporter.progress import QUIET
from tests.raising import raises, tells

pytest.importorskip("yaml")

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


def test_a_number_of_workers_is_for_a_cluster(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from exporter.cli import cli
    from exporter.cli.console import ConsoleProgress

    (tmp_path / "m").mkdir()
    (tmp_path / "s.yaml").write_text(TEXT)
    arguments = ["sweep", str(tmp_path / "s.yaml"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*arguments, "--ray-workers", "2"], obj=ConsoleProgress())
    assert getattr(done.exception, "keys", ())[0] == "ray_workers"
