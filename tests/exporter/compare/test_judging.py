"""An arm whose engines give too little to be judged is judged by an engine that is built for it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.compare import kinds as engine_arm
from exporter.compare.agreement import prefill_logits
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.options import CompareOptions
from exporter.engines.build.engine_set import AttentionRecord, find_engines
from exporter.engines.build.settings import BuildSettings
from exporter.engines.tensors import TensorSpec
from exporter.errors import BackendError, ComparisonError
from exporter.progress import QUIET
from tests.engine_support import written_as
from tests.raising import raises

FILLED = AttentionRecord(told_by="lengths", reads="filled")
ROOM = AttentionRecord(told_by="mask", reads="room")


class Loaded:
    """A runner that is on a device, or not."""

    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard

    def __enter__(self) -> Loaded:
        self.heard.append(f"+{self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.heard.append(f"-{self.name}")


def arm(name: str, heard: list[str], *, judged: bool) -> ComparedArm:
    @contextmanager
    def judge(*_: object) -> Any:
        with Loaded(f"{name}'s judge", heard) as runner:
            yield runner

    runner: Any = Loaded(name, heard)
    facts: Any = SimpleNamespace()
    return ComparedArm((runner,), facts, facts, judge=judge if judged else None)


def test_only_one_of_an_arm_s_runners_is_on_the_device() -> None:
    heard: list[str] = []
    arms = (arm("whole", heard, judged=False), arm("cut", heard, judged=True))
    pair = Pair(CompareOptions(), *arms, QUIET)
    with pair.running():
        with pair.judging() as judges:
            assert judges.baseline is pair.baseline
            assert judges.candidate.runner.name == "cut's judge"  # type: ignore[attr-defined]
        assert pair.candidate.runner.name == "cut"  # type: ignore[attr-defined]
    assert heard[:6] == ["+whole", "+cut", "-cut", "+cut's judge", "-cut's judge", "+cut"]


def test_arms_that_give_enough_are_judged_as_they_are() -> None:
    heard: list[str] = []
    pair = Pair(CompareOptions(), *(arm(n, heard, judged=False) for n in "ab"), QUIET)
    with pair.judging() as judges:
        assert judges is pair
    assert heard == []


@pytest.mark.parametrize(
    ("facts", "enough"),
    [
        ({}, True),
        ({"logits": "all", "attention": ROOM}, True),
        ({"logits": "last"}, False),
        ({"logits": "all", "attention": FILLED}, False),
    ],
)
def test_the_record_tells_what_can_be_judged(
    facts: dict[str, Any], enough: bool, tmp_path: Path
) -> None:
    engine = written_as(tmp_path / "m.engine", ["prefill", "decode"], **facts)
    assert engine_arm._gives_all(find_engines(engine)) == enough


def test_a_judge_is_built_for_the_same_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BuildSettings(compute_capabilities=("sm89",), optimization_level=2)
    for phase in ("prefill", "decode"):
        written_as(tmp_path / f"m-{phase}.engine", [phase], settings=settings, logits="last")
    build = find_engines(tmp_path)
    results: dict[str, Any] = {}

    def built(onnx: Path, target: Path, **options: Any) -> list[tuple[Path, None]]:
        results.update(options, onnx=onnx)
        return [(written_as(target, ["prefill", "decode"], logits="all"), None)]

    heard: list[str] = []
    monkeypatch.setattr(engine_arm, "build_engines", built)
    monkeypatch.setattr(engine_arm, "TensorRtRunner", lambda engines: Loaded("judge", heard))
    with engine_arm._judge(build, tmp_path / "model.onnx", QUIET, None):
        assert heard == ["+judge"]
    result = results["settings"]
    assert (result.logits, result.cache_reads, result.optimization_level) == ("all", "room", 2)
    assert {profile.phase for profile in results["profiles"]} == {"prefill", "decode"}
    assert [slot.profile for slot in build.slots] == results["profiles"]


def test_without_its_graph_an_engine_has_no_judge(tmp_path: Path) -> None:
    build = find_engines(written_as(tmp_path / "m.engine", ["prefill"], logits="last"))
    with raises(ComparisonError, "last-logits-only", "--engine-onnx"):
        engine_arm._judge(build, None, QUIET, None).__enter__()


@pytest.mark.parametrize("positions", [1, 4])
def test_the_last_logits_are_never_taken_for_all(positions: int) -> None:
    runner: Any = SimpleNamespace(
        backend="tensorrt",
        inputs=(TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence")),),
        run=lambda inputs, outputs, phase: {"logits": np.ones((1, positions, 7))},
    )
    if positions == 4:
        assert prefill_logits(runner, np.arange(4)).shape == (4, 7)
    else:
        with raises(BackendError, "last-logits-only", "--logits all", 1, 4):
            prefill_logits(runner, np.arange(4))


def test_arms_that_read_other_parts_of_their_caches_are_no_pair(tmp_path: Path) -> None:
    """What differs but for the model would be taken for what the cut has brought."""
    arms = []
    for name, attention in (("a", FILLED), ("b", ROOM), ("c", None)):
        (tmp_path / name).mkdir()
        engine = written_as(tmp_path / name / "m.engine", ["decode"], attention=attention)
        arms.append(find_engines(engine))
    with raises(ComparisonError, "built-differently", "caches"):
        engine_arm._refuse_built_differently(arms[0], arms[1])
    engine_arm._refuse_built_differently(arms[0], arms[2])  # no attention is left in that one
