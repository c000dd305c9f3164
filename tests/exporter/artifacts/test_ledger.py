from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts.store import StageLedger, in_turn, locked
from exporter.errors import TargetInUseError

KEY = {"model": "abc", "samples": 20}


@pytest.fixture
def result(tmp_path: Path) -> Path:
    ledger = StageLedger(tmp_path)
    _finish(ledger, "{}")
    ledger.publish()
    return tmp_path / "importance.json"


def _finish(ledger: StageLedger, text: str) -> Path:
    ledger.work.mkdir(parents=True, exist_ok=True)
    path = ledger.work / "importance.json"
    path.write_text(text, encoding="utf-8")
    ledger.record("score", KEY, [path], notes=[1])
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


def test_a_broken_memory_is_no_memory(result: Path) -> None:
    (result.parent / ".depthcut" / "stages.json").write_text("{", encoding="utf-8")
    assert not StageLedger(result.parent).valid("score", KEY)
    assert not StageLedger(result.parent).is_new


@pytest.mark.parametrize("text", [
    "[]", "1", '"stages"', "[" * 100_000, '{"score": {}}', '{"score": 1}', '{"score": {"key": 1}}',
    '{"stages": [], "published": {}}', '{"stages": {}, "published": []}', '{"stages": {}}',
    '{"stages": {"score": 1}, "published": {}}', '{"stages": {"score": {}}, "published": {}}',
    '{"stages": {"score": {"key": "", "files": [], "value": 1}}, "published": {}}',
    '{"stages": {"score": {"key": "", "files": {"a": 1}, "value": 1}}, "published": {}}',
])  # fmt: skip
def test_an_odd_memory_is_no_memory(result: Path, text: str) -> None:
    (result.parent / ".depthcut" / "stages.json").write_text(text, encoding="utf-8")
    assert not StageLedger(result.parent).valid("score", KEY)


def test_new_results_appear_only_when_published(result: Path) -> None:
    ledger = StageLedger(result.parent)
    new = _finish(ledger, '["new"]')
    assert result.read_text() == "{}"
    assert ledger.path("importance.json") == new
    assert StageLedger(result.parent).valid("score", KEY)
    ledger.publish()
    assert result.read_text() == '["new"]'
    assert not ledger.work.exists()
    assert StageLedger(result.parent).valid("score", KEY)


def test_what_a_forced_run_made_itself_is_valid(result: Path) -> None:
    ledger = StageLedger(result.parent, force=True)
    _finish(ledger, "new")
    assert ledger.valid("score", KEY)


def elsewhere(work: Callable[[], Any]) -> Any:
    """Runs something in another thread, to which a lock of this one is another's."""
    with ThreadPoolExecutor(1) as jobs:
        return jobs.submit(work).result(timeout=60)


def enter(root: Path) -> None:
    with locked(root):
        pass


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TargetInUseError):
        elsewhere(lambda: enter(tmp_path))
    elsewhere(lambda: enter(tmp_path))


def test_a_run_that_made_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "new" / "out"):
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "report.json").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def test_what_a_failed_run_finished_stays(tmp_path: Path) -> None:
    def fails() -> None:
        with locked(tmp_path / "out"):
            _finish(StageLedger(tmp_path / "out"), "{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert StageLedger(tmp_path / "out").valid("score", KEY)


def test_turns_wait_for_one_another_and_not_for_a_run(tmp_path: Path) -> None:
    seen: list[str] = []

    def other() -> None:
        with in_turn(tmp_path):
            seen.append("second")

    with locked(tmp_path), ThreadPoolExecutor(1) as jobs:
        with in_turn(tmp_path):
            job = jobs.submit(other)
            with pytest.raises(TimeoutError):
                job.result(timeout=0.1)
            seen.append("first")
        job.result(timeout=30)
    assert seen == ["first", "second"]
