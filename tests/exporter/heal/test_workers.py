"""What one process of a training makes for all."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import HealingError
from tests.raising import raises

torch = pytest.importorskip("torch")

from exporter.heal.distill.workers import Workers  # noqa: E402

pytestmark = pytest.mark.torch


def _fails() -> Any:
    raise OSError("full")


def test_the_process_that_fails_says_why_and_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Workers, "from_first", lambda _, value: told.append(value) or value)
    with pytest.raises(OSError, match="full"):
        Workers().once(_fails)
    assert told == [(None, "full")]


def test_the_others_end_with_the_first() -> None:
    class Other(Workers):
        def __init__(self) -> None:
            self.count, self._number = 2, 1

        def from_first(self, value: Any) -> Any:
            return (None, "full") if failing else (5, "")

    failing = True
    with raises(HealingError, "first-process-failed", "full"):
        Other().once(lambda: pytest.fail("only the first makes it"))
    failing = False
    assert Other().once(lambda: pytest.fail("only the first makes it")) == 5


def _exchange(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    workers, mean = Workers(), torch.tensor([2.0 * rank, 4.0])
    workers.average([mean])
    told = [
        workers.count, mean.tolist(), list(workers.share("abc")), workers.from_first(rank),
        workers.once(lambda: f"made by {rank}"),
    ]  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(told))


def test_two_processes_exchange_what_they_have(tmp_path: Path) -> None:
    """Forked, since importing PyTorch takes seconds; `long` has a whole training."""
    import accelerate.utils  # noqa: F401  # once for both

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    both = [forked.Process(target=_exchange, args=(n, port, tmp_path)) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first == [2, [1.0, 4.0], ["a", "c"], 0, "made by 0"]
    assert second == [2, [1.0, 4.0], ["b"], 0, "made by 0"]
