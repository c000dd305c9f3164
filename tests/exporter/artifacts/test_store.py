"""What an interrupted command leaves to the next: found under its key alone, and never half."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from exporter.artifacts import PerplexityPair
from exporter.artifacts.store import StageLedger, Store
from exporter.errors import UnsafeInputError, UsageError

ABOUT = {"model": "m", "text": [1, 2]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "entries.jsonl"


def test_a_later_call_finds_what_was_kept(path: Path) -> None:
    first = Store(path, ABOUT)
    first.keep("a", {"x": 1.5})
    first.keep("b", [2], key="narrower")
    again = Store(path, ABOUT)
    assert again.find("a") == {"x": 1.5}
    assert again.find("b", key="narrower") == [2]
    assert again.find("c") is None
    assert again.count == 1


def test_under_another_key_it_is_stale_until_its_name_is_kept_again(path: Path) -> None:
    Store(path, ABOUT).keep("a", 1)
    other = Store(path, {**ABOUT, "model": "n"})
    assert other.find("a") is None
    assert (other.is_stale("a"), other.is_stale("b")) == (True, False)
    assert other.count == 0
    assert Store(path, ABOUT).find("a", key="narrower") is None
    assert not Store(path, ABOUT).is_stale("a")
    other.keep("a", 2)
    assert not other.is_stale("a")
    assert Store(path, ABOUT).find("a") is None
    assert len(path.read_text().splitlines()) == 1


def test_a_value_that_was_kept_again_takes_the_place_of_the_first(path: Path) -> None:
    store = Store(path, ABOUT)
    store.keep("a", 1)
    store.keep("a", 2)
    assert store.find("a") == Store(path, ABOUT).find("a") == 2


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_comes_back_as_it_was(path: Path, value: float) -> None:
    Store(path, ABOUT).keep("a", {"kl": [value]})
    assert repr(Store(path, ABOUT).find("a")) == repr({"kl": [value]})
    root = path.parent
    (root / "work").mkdir()
    StageLedger(root).record("scored", {}, [], {"kl": value})
    assert repr(StageLedger(root).notes("scored")) == repr({"kl": value})


def test_an_infinite_perplexity_is_not_measured_again(path: Path) -> None:
    kind, measured = TypeAdapter(PerplexityPair), PerplexityPair(baseline=2.0, candidate=math.inf)
    assert Store(path, ABOUT).once("perplexity", kind, lambda: measured) == measured
    assert Store(path, ABOUT).once("perplexity", kind, pytest.fail) == measured


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_file_that_is_not_as_it_was_makes_an_entry_stale(path: Path, damage: str) -> None:
    path.parent.mkdir()
    file = path.parent / "below.bin"
    file.write_text("made")
    Store(path, ABOUT).keep("a", 1, files=[file])
    assert Store(path, ABOUT).find("a") == 1
    file.write_text("other") if damage == "changed" else file.unlink()
    assert Store(path, ABOUT).find("a") is None


@pytest.mark.parametrize("name", ["../victim", "/etc/passwd", "a/../../b", ".depthcut/lock", "."])
def test_an_entry_whose_files_lead_out_is_none(path: Path, name: str) -> None:
    Store(path, ABOUT).keep("a", 1)
    path.write_text(path.read_text().replace('"files": {}', f'"files": {{"{name}": ""}}'))
    assert Store(path, ABOUT).find("a") is None


def test_arrays_are_kept_whole_or_not_at_all(path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    Store(path, ABOUT).keep_arrays("fit", {"ridge": 0.1}, {"w": array})
    result = Store(path, ABOUT).find_arrays("fit")
    assert result is not None
    value, arrays = result
    assert value == {"ridge": 0.1}
    assert np.array_equal(arrays["w"], array)
    (file,) = path.with_suffix("").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert Store(path, ABOUT).find_arrays("fit") is None


@pytest.mark.parametrize("line", ['{"name": "b', "{", "[]", "5", '{"name": "b", "key": 7}', "\n"])
def test_a_line_that_was_cut_short_or_is_no_entry_counts_as_missing(path: Path, line: str) -> None:
    Store(path, ABOUT).keep("a", 1)
    path.write_text(path.read_text() + line)
    again = Store(path, ABOUT)
    assert again.find("a") == 1
    assert again.find("b") is None
    again.keep("b", 2)
    assert len(path.read_text().splitlines()) == 2
    assert Store(path, ABOUT).find("b") == 2


def test_a_first_line_that_was_cut_short_is_no_other_file(path: Path) -> None:
    path.parent.mkdir()
    for text in ("", '{"na', '{"name": "a", "ke'):
        path.write_text(text)
        assert Store(path, ABOUT).find("a") is None


def test_another_file_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("Dear diary\n")
    with pytest.raises(UsageError):
        Store(path, ABOUT)
    assert path.read_text() == "Dear diary\n"


def test_a_bottomless_line_is_refused(path: Path) -> None:
    Store(path, ABOUT).keep("a", 1)
    path.write_text(path.read_text() + "[" * 200_000 + "\n")
    with pytest.raises(UnsafeInputError):
        Store(path, ABOUT)


def test_a_store_without_a_file_lasts_as_long_as_its_call() -> None:
    store = Store(None, ABOUT)
    store.keep("a", 1)
    assert store.find("a") == 1
    assert Store(None, ABOUT).find("a") is None


def test_what_is_found_once_is_not_made_again(path: Path) -> None:
    calls: list[str] = []

    def make() -> list[int]:
        calls.append("made")
        return [1, 2]

    numbers = TypeAdapter(list[int])
    for _ in range(2):
        assert Store(path, ABOUT).once("a", numbers, make) == [1, 2]
    assert calls == ["made"]
    Store(path, ABOUT).keep("a", "of another version")
    results: list[Any] = []
    assert Store(path, ABOUT).once("a", numbers, make, on_found=lambda: results.append(1)) == [1, 2]
    assert calls == ["made"] * 2
    assert not results


def test_nothing_that_is_empty_is_kept(path: Path) -> None:
    assert Store(path, ABOUT).once("a", TypeAdapter(list[int]), list) == []
    assert not path.exists()
