"""Which memory is moved to huge pages, and that it stays what it was."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from exporter.engines.runners import base as huge_pages
from exporter.engines.runners.base import HUGE_PAGE_BYTES, move_to_huge_pages, private_regions
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from tests.text_graphs import write_tiny_lm

MAPS = """\
555500000000-555500800000 rw-p 00000000 00:00 0                          [heap]
7f0000100000-7f0000900000 rw-p 00000000 00:00 0
7f0010000000-7f0010800000 r--p 00000000 00:00 0
7f0020000000-7f0020800000 rw-s 00000000 00:00 0
7f0030000000-7f0030800000 rw-p 00000000 fe:00 4711                       /some/where/weights.data
7f0040000000-7f0040200000 rw-p 00000000 00:00 0
7f0050100000-7f0050500000 rw-p 00000000 00:00 0
7fff00000000-7fff00800000 rw-p 00000000 00:00 0                          [stack]
"""


def test_whole_pages_of_large_private_regions_are_moved_and_nothing_else() -> None:
    assert list(private_regions(MAPS)) == [
        (0x555500000000, 0x555500800000),
        (0x7F0000200000, 0x7F0000800000),
    ]


def test_what_is_moved_stays_what_it_was() -> None:
    content = np.random.default_rng(0).bytes(4 * HUGE_PAGE_BYTES)
    with mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = content
        moved = move_to_huge_pages()
        assert moved % HUGE_PAGE_BYTES == 0
        assert memory[:] == content


@pytest.mark.parametrize(
    "told", ["always madvise [never]", "[always] madvise never", None, "always [madvise] never"]
)
def test_nothing_is_asked_where_the_kernel_has_decided_or_tells_no_regions(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is not None:
        (tmp_path / "enabled").write_text(told)
    monkeypatch.setattr(huge_pages, "_ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "is missing")
    assert move_to_huge_pages() == 0


@pytest.mark.parametrize("brief", [False, True])
def test_a_runner_says_how_much_was_moved_and_one_for_a_few_runs_moves_nothing(
    brief: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.engines.runners.onnxruntime.move_to_huge_pages", lambda: 7)
    model = write_tiny_lm(tmp_path) / "model.onnx"
    with OnnxRuntimeRunner(model, threads=1, brief=brief) as runner:
        assert runner.capabilities.huge_page_bytes == (0 if brief else 7)
