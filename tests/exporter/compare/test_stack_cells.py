"""Which lengths of an encoder-decoder are timed, as far as its positions reach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.latency import Shape
from exporter.compare.encoder_decoder.arms import Cells, StackFolder, open_stack_store
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.progress import QUIET

ASKED = CompareOptions(
    prefill_lengths=(600,), decode_past_lengths=(700,), timing=TimingOptions(generate=((600, 8),))
)
T5 = {"n_positions": 512, "relative_attention_num_buckets": 32}


def cells(folder: Path, config: dict[str, Any]) -> Cells:
    result = {"decoder_start_token_id": 0, "vocab_size": 64, **config}
    (folder / "config.json").write_text(json.dumps(result))
    return Cells(StackFolder(folder), {"input_ids": np.ones((1, 4), np.int64)}, ASKED)


def test_relative_positions_reach_as_far_as_is_asked(tmp_path: Path) -> None:
    result = cells(tmp_path, T5)
    assert list(result.shortened()) == []
    assert result.all() == [
        Shape("encode", 1, 600), Shape("prefill", 1, 1), Shape("decode", 1, 1, 700),
        Shape("prefill", 1, 600, new_tokens=8),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["n_positions", "max_position_embeddings"])
def test_a_table_of_positions_ends(name: str, tmp_path: Path) -> None:
    result = cells(tmp_path, {name: 512})
    assert len(list(result.shortened())) == 3
    assert result.all() == [
        Shape("encode", 1, 512), Shape("prefill", 1, 1), Shape("decode", 1, 1, 511),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "counts"), [("input_ids", "tokens"), ("input_features", "frames")]
)
def test_a_source_is_of_tokens_or_a_recording_of_frames(
    source: str, counts: str, tmp_path: Path
) -> None:
    made = cells(tmp_path, T5)
    encode, prefill, *_ = replace(made, source={source: np.ones((1, 4, 100), np.int64)}).all()
    assert (encode.counts, prefill.counts) == (counts, "tokens")
    assert (encode.sequence_length == 100) is (counts == "frames")


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
