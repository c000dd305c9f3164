"""Engines compared on the stand-in of a card: clocks, graphs, and arms that don't fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import ComparisonReport
from exporter.compare import kinds as engine_arm
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.compare.session import compare
from exporter.engines.build.engine_set import EngineRecord
from exporter.engines.build.profiles import Ranges, Span
from exporter.errors import DepthcutError
from tests.made_reports import as_markdown
from tests.raising import raises
from tests.stand_in.decoders import RANGES as ROOMY
from tests.stand_in.decoders import split_engines
from tests.stand_in.engine_files import write_engine
from tests.stand_in.installed import stand_in
from tests.text_graphs import write_tiny_lm, write_tokenizer

RANGES = Ranges(batch=Span(1, 1, 1), prompt=Span(1, 8, 128), context=Span(1, 8, 128))
OPTIONS = CompareOptions(
    threads=1,
    prefill_lengths=(4,),
    decode_past_lengths=(6,),
    rounds=2,
    eval_tokens=64,
    eval_sequence_length=16,
    timing=TimingOptions(generate=((4, 3),)),
)
WEIGHTS = 1 << 22


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two engines, the second without its first attention."""
    root = tmp_path_factory.mktemp("arms")
    for name, layers in {"baseline": (0, 1), "candidate": (1,)}.items():
        folder = write_tiny_lm(root / name, layers=layers)
        write_tokenizer(folder)
        engine = root / "engines" / name / "m.engine"
        write_engine(
            folder / "model.onnx", engine, ("prefill", "decode"), RANGES, weights_bytes=WEIGHTS
        )
    return root / "engines/baseline", root / "engines/candidate"


def compared(arms: tuple[Path, Path], **machine: int) -> tuple[ComparisonReport, int, int]:
    with stand_in(**machine) as result:
        report = compare(*arms, OPTIONS)
        assert result.left_over == {}
    return report, result.most_used, result.calls["deserialize_cuda_engine"]


def test_engines_are_timed_by_the_device_and_whole_texts_by_the_host(
    arms: tuple[Path, Path],
) -> None:
    report, _, _ = compared(arms)
    clocks = {row.phase: row.clock for row in report.latency}
    assert clocks["prefill"] == clocks["decode"] == "device"
    assert clocks["generate"] == "host"
    floats = {row.phase: set(row.launches.values()) for row in report.latency}
    assert floats["decode"] == {"kernels"}  # a cache that grows has a new shape at each step
    assert all(check.passed for check in report.parity)
    assert "kernels" in as_markdown(report)


def in_place(folder: Path, backend: str, patch: pytest.MonkeyPatch, **facts: Any) -> list[Path]:
    """Two arms whose caches are in place, the second with half the weights."""

    def judge(onnx: Path, target: Path, *, profiles: Any, **how: Any) -> list[tuple[Path, None]]:
        write_engine(onnx, target, [profile.phase for profile in profiles], ROOMY, backend=backend)
        return [(target, None)]

    patch.setattr(engine_arm, "build_engines", judge)
    return [
        split_engines(folder / name, backend=backend, weights_bytes=size, **facts) / "*.engine"
        for name, size in (("whole", 1 << 21), ("cut", 1 << 20))
    ]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_steps_in_place_are_timed_as_graphs_on_the_decode_engine(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = in_place(tmp_path, backend, monkeypatch)
    options = replace(OPTIONS, timing=TimingOptions())
    with stand_in() as machine:
        report = compare(*folders, options)
        last = [run for run in machine.runs if run.as_graph][-1]  # the judges have run before
    launches = {row.phase: row.launches for row in report.latency}
    assert set(launches["decode"].values()) == {"CUDA graph"}
    assert set(launches["prefill"].values()) == {"kernels"}
    assert last.cache_bytes == last.filled_bytes > 0
    decode = next(row for row in report.latency if row.phase == "decode")
    assert decode.clock == "device"
    assert 1.5 < decode.speedup.ratio < 2  # weights of half the size, and the same caches


def test_what_is_to_be_known_of_how_arms_ran_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that failed, and a card of another name than the one that it was built on."""
    folders = in_place(tmp_path, "tensorrt", monkeypatch, capturable=False)
    for path in (tmp_path / "whole").glob("*.engine.json"):
        built_on = {"gpu": "A10", "compute_capability": "sm89"}
        EngineRecord.read(path).model_copy(update={"built_on": built_on}).write(path)
    with stand_in() as machine:
        report = compare(*folders, replace(OPTIONS, timing=TimingOptions()))
    launch = next(row.launches for row in report.latency if row.phase == "decode")
    assert [item.partition(",")[0] for item in launch.values()] == ["kernels", "kernels"]
    assert all("no CUDA graph" in item for item in launch.values())
    notes = report.arms.baseline.notes
    assert len(notes) == 2  # one for each of its engines
    assert all("A10" in note and machine.name in note for note in notes)
    assert report.arms.candidate.notes == []
    assert "A10" in as_markdown(report)


def test_arms_that_do_not_fit_together_are_loaded_in_turns(arms: tuple[Path, Path]) -> None:
    together, most, loads = compared(arms)
    apart, used, more = compared(arms, memory_bytes=most - 1)
    assert used < most
    assert more > loads
    assert [row.phase for row in apart.latency] == [row.phase for row in together.latency]
    assert {row.clock for row in apart.latency} == {"device", "host"}
    assert apart.accuracy is not None
    assert together.accuracy is not None
    assert apart.accuracy.kl_divergence == together.accuracy.kl_divergence
    assert apart.accuracy.generation == together.accuracy.generation


def test_an_arm_that_does_not_fit_alone_is_refused(arms: tuple[Path, Path]) -> None:
    with raises(DepthcutError, "out-of-memory", "batch"):
        compared(arms, memory_bytes=WEIGHTS)
