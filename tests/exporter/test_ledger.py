from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import UsageError
from exporter.ledger import StageLedger, locked

KEY = {"model": "abc", "samples": 20}


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "importance.json"
    path.write_text("{}", encoding="utf-8")
    StageLedger(tmp_path).record("score", KEY, [path], notes=[1])
    return path


def test_the_same_key_and_files_are_valid_in_a_later_run(result: Path) -> None:
    later = StageLedger(result.parent)
    assert later.valid("score", dict(reversed(KEY.items())))
    assert later.notes("score") == [1]
    assert not later.is_new


def test_another_key_is_not_valid(result: Path) -> None:
    assert not StageLedger(result.parent).valid("score", {**KEY, "samples": 21})


def test_a_changed_file_is_not_valid(result: Path) -> None:
    result.write_text("{ }", encoding="utf-8")
    assert not StageLedger(result.parent).valid("score", KEY)


def test_a_missing_file_is_not_valid(result: Path) -> None:
    result.unlink()
    assert not StageLedger(result.parent).valid("score", KEY)


def test_force_makes_nothing_valid(result: Path) -> None:
    assert not StageLedger(result.parent, force=True).valid("score", KEY)


def test_an_unknown_stage_is_not_valid(result: Path) -> None:
    assert not StageLedger(result.parent).valid("plan", KEY)


def test_a_broken_memory_is_no_memory(result: Path) -> None:
    (result.parent / ".depthcut" / "stages.json").write_text("{", encoding="utf-8")
    assert not StageLedger(result.parent).valid("score", KEY)
    assert StageLedger(result.parent).is_new


def test_files_hash_follows_the_files(result: Path) -> None:
    ledger = StageLedger(result.parent)
    before = ledger.files_hash("score")
    result.write_text("{ }", encoding="utf-8")
    ledger.record("score", KEY, [result])
    assert ledger.files_hash("score") != before


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UsageError, match="Another depthcut"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
