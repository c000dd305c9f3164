"""How work is divided among workers, and where a local Ray keeps its files; without Ray."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from exporter import cli
from exporter.errors import ClusterError, MissingDependencyError
from exporter.progress import QUIET
from exporter.score.cluster import pool
from exporter.score.cluster.pool import allocate, open_pool
from exporter.score.cluster.scoring import cut_pieces
from exporter.score.cluster.worker import versions
from tests.raising import raises


@pytest.mark.parametrize(
    ("nodes", "workers", "options", "expected"),
    [
        ([8], None, {"local": True}, (2, 4)),  # a machine of one's own: two workers
        ([1], None, {"local": True}, (1, 1)),
        ([8, 4, 0], None, {}, (2, 4)),  # one a machine, as the smaller has; one without CPUs
        ([8], 3, {"local": True}, (3, 2)),
        ([8, 8], 3, {}, (3, 4)),
        ([8, 2], 4, {}, (4, 2)),
        ([4], 4, {"local": True}, (4, 1)),
        ([16, 16, 8], None, {"whole_nodes": True}, (2, 16)),
        ([16, 16], 1, {"whole_nodes": True}, (1, 16)),
    ],
)
def test_machines_are_divided(
    nodes: list[int], workers: int | None, options: Any, expected: Any, monkeypatch: Any
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    room = allocate(nodes, workers, **{"local": False, **options})
    assert (room.workers, room.cpus) == expected
    assert room.threads == room.cpus


def test_more_workers_than_processors_are_refused() -> None:
    with raises(ClusterError, "too-many-workers", 5, 4):
        allocate([2, 2], 5, local=False)
    with raises(ClusterError, "too-many-workers"):
        allocate([0], None, local=False)


@pytest.mark.parametrize(("workers", "parts"), [(1, 1), (2, 1), (3, 3), (4, 2), (8, 4)])
def test_cuts_are_shared_out_where_batches_are_too_few(workers: int, parts: int) -> None:
    others = [((layer, "mlp"),) for layer in range(16)]
    jobs = cut_pieces([0, 4], workers, others)
    assert [job.first for job in jobs] == [0] * parts + [4] * parts
    for start in (0, 4):
        cuts = [cut for job in jobs if job.first == start for cut in job.cuts]
        assert cuts == others


def test_another_state_of_the_code_is_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.__file__", str(tmp_path / "exporter/__init__.py"))
    own = []
    for name in ("exporter/a.py", "graph_passes/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
        own.append(versions())
    assert own[0] != own[1]
    (tmp_path / name).write_text("1")
    assert versions() not in own


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with raises(MissingDependencyError, "", "depthcut[cluster]"), open_pool():
        pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["score", "m", "--ray-workers", "2"], "--ray-workers is for --ray"),
        (["score", "--ray", "m"], "put --ray last"),
        (["score", "m", "--ray", "ray://host:1"], "on a machine"),
        (["score", "m", "--ray", "host"], "no host:port"),
    ],
)
def test_wrong_calls_say_what_is_meant(
    arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    assert told in " ".join(capfd.readouterr().err.split())


def test_its_folder_lies_in_one_that_only_this_user_can_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def init(**options: Any) -> None:
        """As Ray does, it opens its folder to all users."""
        folders.append(Path(options["_temp_dir"]))
        folders[0].mkdir(exist_ok=True)
        folders[0].chmod(0o777)

    ray = Mock(init=init, is_initialized=lambda: False, _private=Mock())
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pool, "require", lambda *_args, **_options: ray)
    with pool.connected(None, 1, QUIET):
        (folder,) = folders
        above = folder.parent.lstat()
        assert stat.S_ISDIR(above.st_mode)
        assert stat.S_IMODE(above.st_mode) == 0o700
        assert above.st_uid == os.geteuid()
        assert len(os.fsencode(folder)) <= 43
    assert not folder.exists()
