"""What an interrupted command leaves to the next: found under its key alone, and never half."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from exporter.artifacts import EngineCheck, PerplexityPair
from exporter.artifacts.store import StageLedger, Store, in_turn, locked
from exporter.engines.build.engine_set import EngineRecord
from exporter.errors import UnsafeInputError, UsageError
from graph_passes.files.hashing import sha256_bytes
from tests.engine_support import written
from tests.present import present

ABOUT = {"model": "m", "text": [1, 2]}
KEY = {"model": "abc", "samples": 20}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "entries.jsonl"


def test_a_later_call_finds_what_was_kept(path: Path) -> None:
    first = Store(path, ABOUT)
    first.keep("a", 1)
    first.keep("a", {"x": 1.5})
    first.keep("b", [2], key="narrower")
    for store in (first, Store(path, ABOUT)):
        assert store.find("a") == {"x": 1.5}
        assert store.find("b", key="narrower") == [2]
        assert store.find("c") is None
        assert store.count == 1


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


CHECK = EngineCheck(card="a card", worst="x", error=0.1, tolerance=0.5)


@pytest.mark.parametrize(("change", "how"), [
    ({"check": CHECK}, "reused"), ({"precision": "fp32"}, "made"), (None, "made"),
])  # fmt: skip
def test_engines_stay_finished_when_they_are_checked_on_another_card(
    change: dict[str, Any] | None, how: str, tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        (folder / "engines").mkdir()
        written(folder / "engines")

    first = StageLedger(tmp_path)
    assert first.once("engines", KEY, make) == "made"
    first.publish()
    path = tmp_path / "engines" / "m.engine.json"
    if change is None:
        path.write_text("[1]")
    else:
        EngineRecord.read(path).model_copy(update=change).write(path)
    later = StageLedger(tmp_path)
    assert later.once("engines", KEY, make) == how
    later.publish()
    assert (EngineRecord.read(path).check == CHECK) == (how == "reused")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_comes_back_as_it_was(path: Path, value: float) -> None:
    Store(path, ABOUT).keep("a", {"kl": [value]})
    assert repr(Store(path, ABOUT).find("a")) == repr({"kl": [value]})
    root = path.parent
    (root / "work").mkdir()
    StageLedger(root).once("scored", {}, lambda _: {"kl": value})
    assert repr(StageLedger(root).notes("scored")) == repr({"kl": value})


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
    value, arrays = present(Store(path, ABOUT).find_arrays("fit"))
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


@pytest.mark.parametrize("text", ["", '{"na', '{"name": "a", "ke'])
def test_a_first_line_that_was_cut_short_is_no_other_file(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    assert Store(path, ABOUT).find("a") is None


@pytest.mark.parametrize(
    ("text", "kind"), [("Dear diary\n", UsageError), ("[" * 200_000 + "\n", UnsafeInputError)]
)
def test_another_file_is_left_alone(path: Path, text: str, kind: type[Exception]) -> None:
    Store(path, ABOUT).keep("a", 1)
    path.write_text(text if kind is UsageError else path.read_text() + text)
    before = path.read_text()
    with pytest.raises(kind):
        Store(path, ABOUT)
    assert path.read_text() == before


def test_what_is_found_once_is_not_made_again(path: Path) -> None:
    made: list[int] = []
    met: list[int] = []

    def once() -> list[int]:
        def make() -> list[int]:
            made.append(1)
            return [1, 2]

        kind = TypeAdapter(list[int])
        return Store(path, ABOUT).once("a", kind, make, on_found=lambda: met.append(1))

    assert once() == once() == [1, 2]
    assert (made, met) == ([1], [1])
    Store(path, ABOUT).keep("a", "of another version")
    assert once() == [1, 2]
    assert (made, met) == ([1, 1], [1])
    infinite = PerplexityPair(baseline=2.0, candidate=math.inf)
    for make in (lambda: infinite, pytest.fail):
        assert Store(path, ABOUT).once("b", TypeAdapter(PerplexityPair), make) == infinite


# The stages of an output folder.


@pytest.fixture
def result(tmp_path: Path) -> Path:
    ledger = StageLedger(tmp_path)
    finish(ledger, "{}")
    ledger.publish()
    return tmp_path / "importance.json"


def finish(ledger: StageLedger, text: str, key: Any = KEY, **how: Any) -> str:
    def make(folder: Path) -> list[int]:
        (folder / "importance.json").write_text(text, encoding="utf-8")
        return [1]

    return ledger.once("score", key, make, **how)


def is_valid(root: Path, key: Any = KEY, **how: Any) -> bool:
    """Whether a later run would find the stage; it changes nothing."""

    def make(folder: Path) -> None:
        raise LookupError

    try:
        return StageLedger(root, **how).once("score", key, make) == "reused"
    except LookupError:
        return False


def test_the_same_key_and_files_are_valid_in_a_later_run(result: Path) -> None:
    assert is_valid(result.parent, dict(reversed(KEY.items())))
    later = StageLedger(result.parent)
    assert later.notes("score") == [1]
    assert not later.is_new
    assert not is_valid(result.parent, {**KEY, "samples": 21})
    assert not is_valid(result.parent, force=True)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_result_that_is_not_as_it_was_is_not_valid(result: Path, damage: str) -> None:
    result.write_text("{ }", encoding="utf-8") if damage == "changed" else result.unlink()
    assert not is_valid(result.parent)


@pytest.mark.parametrize("text", [
    "{", "[]", "1", '"stages"', "[" * 100_000, '{"score": {}}', '{"score": 1}',
    '{"score": {"key": 1}}', '{"stages": [], "published": {}}', '{"stages": {}, "published": []}',
    '{"stages": {}}', '{"stages": {"score": 1}, "published": {}}',
    '{"stages": {"score": {}}, "published": {}}',
    '{"stages": {"score": {"key": "", "files": [], "value": 1}}, "published": {}}',
    '{"stages": {"score": {"key": "", "files": {"a": 1}, "value": 1}}, "published": {}}',
])  # fmt: skip
def test_a_broken_memory_is_no_memory(result: Path, text: str) -> None:
    (result.parent / ".depthcut" / "stages.json").write_text(text, encoding="utf-8")
    assert not is_valid(result.parent)
    assert not StageLedger(result.parent).is_new


@pytest.mark.parametrize("force", [False, True])
def test_results_of_another_request_stand_until_all_new_ones_are_there(
    result: Path, force: bool
) -> None:
    root, first = result.parent, StageLedger(result.parent)
    assert finish(first, "") == "reused"
    first.once("plan", KEY, lambda folder: (folder / "plan.json").write_text("{}"))
    ledger = StageLedger(root, force=force)
    assert finish(ledger, '["new"]', KEY if force else {}) == "made"
    assert finish(ledger, "", KEY if force else {}) == "reused"
    assert result.read_text() == "{}"
    new = ledger.path("importance.json")
    assert new.read_text() == '["new"]'
    assert ledger.final(new) == result
    assert ledger.path("plan.json") == root / "plan.json"
    ledger.publish()
    assert result.read_text() == '["new"]'
    assert not (root / ".depthcut" / "work").exists()
    assert is_valid(root, KEY if force else {})


def test_each_stage_of_a_new_folder_appears_at_once(tmp_path: Path) -> None:
    ledger = StageLedger(tmp_path)
    for name in ("a", "b"):
        ledger.once(name, KEY, lambda folder, name=name: (folder / name).write_text(name))
        assert (tmp_path / name).read_text() == name
    later = StageLedger(tmp_path)
    assert later.once("a", KEY, pytest.fail) == "reused"
    later.once("b", {}, lambda folder: (folder / "b").write_text("other"), of=["a"])
    assert (tmp_path / "b").read_text() == "other"  # all that is there is of this request


def test_what_was_made_of_others_goes_and_what_is_of_the_same_stays(tmp_path: Path) -> None:
    def walked(whole: str, cut: str, model: str = "m", *, ends: bool = True) -> set[str]:
        ledger = StageLedger(tmp_path, given={"model": model})
        for name, text, of in (("whole", whole, ["model"]), ("cut", cut, ["whole"])):
            ledger.once(name, {"": text}, lambda f, n=name, t=text: (f / n).write_text(t), of=of)
        if ends:
            for name, of in (("engines", ["cut"]), ("score", ["model"]), ("report", ["engines"])):
                ledger.once(name, {}, lambda f, n=name: (f / n).write_text(whole + cut), of=of)
        ledger.publish()
        return {path.name for path in tmp_path.iterdir()} - {".depthcut"}

    every = {"whole", "cut", "engines", "score", "report"}
    assert walked("1", "1") == every
    assert walked("1", "1", ends=False) == every
    assert walked("1", "2", ends=False) == {"whole", "cut", "score"}
    assert walked("1", "2") == every
    assert walked("1", "2", "other", ends=False) == every - {"score"}


def test_what_an_earlier_version_left_is_made_anew(tmp_path: Path) -> None:
    """Its entries don't say what they were made from."""
    stages = {"score": {"key": "k", "files": {}, "value": None}}
    stages |= {"hf": {"key": "k", "files": {"candidate/hf/w": sha256_bytes(b"")}, "value": None}}
    (tmp_path / "candidate" / "hf").mkdir(parents=True)
    (tmp_path / "candidate" / "hf" / "w").touch()
    (tmp_path / ".depthcut").mkdir()
    published = {"candidate/hf/w": sha256_bytes(b"")}
    text = json.dumps({"stages": stages, "published": published})
    (tmp_path / ".depthcut" / "stages.json").write_text(text)
    for name in ("importance.json", "healing/importance.json"):  # of an interrupted run
        (tmp_path / ".depthcut" / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".depthcut" / "work" / name).touch()
    ledger = StageLedger(tmp_path)
    assert finish(ledger, "{}") == "made"
    assert ledger.path("importance.json").read_text() == "{}"
    assert ledger.publish() == ["hf"]
    assert {path.name for path in tmp_path.iterdir()} == {".depthcut", "importance.json"}


def test_what_a_failed_run_finished_stays(tmp_path: Path) -> None:
    def fails() -> None:
        with locked(tmp_path / "out"):
            finish(StageLedger(tmp_path / "out"), "{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert is_valid(tmp_path / "out")


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
