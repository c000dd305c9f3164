"""Where a local Ray keeps its sockets and logs: nobody else on the machine gets there."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.progress import QUIET
from exporter.score.cluster import connection


class OpenRay:
    """As Ray does, it opens its folder to all users."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self._private = SimpleNamespace()

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        folder = Path(options["_temp_dir"])
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        self.folders.append(folder)

    def shutdown(self) -> None:
        pass


def test_its_folder_lies_in_one_that_only_this_user_can_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = OpenRay()
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(connection, "require", lambda *_args, **_options: ray)
    with connection.connected(None, 1, QUIET):
        (folder,) = ray.folders
        above = folder.parent.lstat()
        assert stat.S_ISDIR(above.st_mode)
        assert stat.S_IMODE(above.st_mode) == 0o700
        assert above.st_uid == os.geteuid()
        assert len(os.fsencode(folder)) <= 43
    assert not folder.exists()
