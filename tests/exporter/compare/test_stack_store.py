"""What an interrupted comparison of encoder-decoders has kept, and for which it counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.compare.encoder_decoder.timing import open_stack_store
from exporter.compare.options import CompareOptions
from exporter.progress import QUIET

FOLDERS: Any = {name: SimpleNamespace(sha256=name) for name in ("baseline", "candidate")}
IDS, MASK = np.arange(6)[None], np.ones((1, 6), np.int64)
SOURCE: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}


def kept(folder: Path, source: dict[str, Any]) -> int:
    return open_stack_store(FOLDERS, source, CompareOptions(), folder, QUIET).count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ({"attention_mask": MASK.copy(), "input_ids": IDS.copy()}, 1),
        ({"input_ids": IDS[:, :5], "attention_mask": MASK[:, :5]}, 0),  # a shorter one
        ({"input_ids": IDS + 1, "attention_mask": MASK}, 0),
        ({"input_features": IDS, "attention_mask": MASK}, 0),
    ],
)
def test_times_count_for_the_source_that_they_were_taken_on(
    source: dict[str, Any], count: int, tmp_path: Path
) -> None:
    store = open_stack_store(FOLDERS, SOURCE, CompareOptions(), tmp_path, QUIET)
    store.keep("a", 1)
    assert kept(tmp_path, source) == count
