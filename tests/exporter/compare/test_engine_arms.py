"""Engines as arms: told from their records without a driver, judged by others, run on a card."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ComparisonReport, Phase
from exporter.compare import kinds as engine_arm
from exporter.compare.agreement import prefill_logits
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.options import TimingOptions
from exporter.compare.session import compare
from exporter.engines.build.engine_set import EngineRecord, find_builds, find_engines
from exporter.engines.build.libraries import Driver
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import BuildSettings
from exporter.engines.decoding.generate import own_decoder
from exporter.engines.decoding.runner_decoder import RunnerDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.decoding.verify import believed
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.engines.tensors import TensorSpec
from exporter.errors import BackendError, ComparisonError, DepthcutError, EngineError
from exporter.files import sha256_file, sha256_files
from exporter.progress import QUIET
from tests.compared import PLAN, language_model, quick
from tests.engine_support import CONTENT, written_as
from tests.made_reports import as_markdown
from tests.present import present
from tests.raising import raises
from tests.stand_in.decoders import RANGES as ROOMY
from tests.stand_in.decoders import split_engines
from tests.stand_in.engine_files import write_engine
from tests.stand_in.installed import stand_in
from tests.text_graphs import write_tiny_lm

OPTIONS = quick(decode_past_lengths=(6,), eval_tokens=64)
GENERATING = replace(OPTIONS, timing=TimingOptions(generate=((4, 3),)))
BOTH: tuple[Phase, ...] = ("prefill", "decode")


def built(onnx: Path, folder: Path, *names: str, **changes: Any) -> Path:
    """Engine files, each with a record that names an ONNX file by its hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {
        "model": sha256_file(onnx / "model.onnx"),
        "weights": sha256_files([onnx / "model.onnx.data"], onnx),
    }
    for name in names or ("m.engine",):
        written_as(folder / name, BOTH, made_from=hashes, **changes)
    return folder


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as ``depthcut export`` leaves it, with engines, on a machine without a driver."""
    monkeypatch.setattr(engine_arm, "ask_driver", lambda: Driver("no NVIDIA driver"))
    for name, layers in {"baseline": (0, 1), "candidate": (1,)}.items():
        onnx = write_tiny_lm(tmp_path / name, layers=layers)
        built(onnx, tmp_path / "engines" / name, plan=PLAN if name == "candidate" else [])
    return tmp_path


def compared(root: Path, **more: Any) -> ComparisonReport:
    return compare(root / "engines/baseline", root / "engines/candidate", OPTIONS, **more)


def test_the_onnx_files_are_measured_and_the_report_says_which_is_which(exported: Path) -> None:
    report = compared(exported)
    for name in ("baseline", "candidate"):
        arm = getattr(report.arms, name)
        assert arm.backend == "onnxruntime"
        assert arm.path == str(exported / name / "model.onnx")
        assert arm.not_run == (
            "built, not run: no NVIDIA driver; what was measured is ONNX Runtime on the ONNX files "
            "that they were built from"
        )
        (engine,) = arm.engines
        assert engine.path == str(exported / "engines" / name / "m.engine")
        assert (engine.engine_bytes, engine.built_for) == (len(CONTENT), "sm89")
    assert len(report.latency) == 2
    assert report.accuracy is not None
    text = as_markdown(report)
    assert "The engines of both arms: built, not run: no NVIDIA driver" in text
    assert "m.engine" in text


def test_without_the_onnx_files_only_the_builds_are_told(exported: Path) -> None:
    shutil.rmtree(exported / "candidate")
    report = compared(exported)
    assert (report.latency, report.accuracy) == ([], None)
    assert [entry.layer for entry in report.plan] == [0]
    for arm in (report.arms.baseline, report.arms.candidate):
        assert (arm.backend, arm.provider) == ("tensorrt-rtx", "none")
        assert "nothing was measured" in str(arm.not_run)
        assert arm.sha256 == arm.engines[0].sha256
        assert arm.kv_cache_bytes_per_token == 2 * 2 * 4 * 2
    text = as_markdown(report)
    assert "Not measured: nothing was run" in text
    assert "logits" not in text


def test_onnx_files_elsewhere_can_be_named_if_the_engines_were_built_from_them(
    exported: Path,
) -> None:
    moved = exported / "elsewhere"
    for name in ("baseline", "candidate"):
        shutil.move(exported / name, moved / name)
    onnx = moved / "baseline", moved / "candidate" / "model.onnx"
    assert compared(exported).latency == []
    report = compared(exported, onnx=onnx)
    assert report.arms.candidate.path == str(onnx[1])
    assert len(report.latency) == 2
    with raises(EngineError, "not-built-from", "candidate/model.onnx"):
        compared(exported, onnx=onnx[::-1])
    data = moved / "baseline" / "model.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    with raises(EngineError, "not-built-from"):  # other weights are another file
        compared(exported, onnx=onnx)


@pytest.mark.parametrize(
    ("phases", "changes", "kind", "code", "field"),
    [
        (BOTH, {"backend_version": "1.6.0"}, ComparisonError, "different-engines", "libraries"),
        (BOTH, {"settings": BuildSettings(compute_capabilities=("sm80",))}, ComparisonError,
         "different-engines", "settings"),
        (BOTH[:1], {}, ComparisonError, "different-engines", "profiles"),
    ],
)  # fmt: skip
def test_arms_that_were_built_in_different_ways_are_refused(
    exported: Path, phases: Any, changes: Any, kind: type[DepthcutError], code: str, field: str
) -> None:
    written_as(exported / "engines/candidate/m.engine", phases, **changes)
    with raises(kind, code, field):
        compared(exported)


def test_several_builds_are_all_listed_if_they_are_of_one_model(exported: Path) -> None:
    onnx, names = exported / "baseline", ["m-b1.engine", "m-b2.engine", "m-b10.engine"]
    folder = built(onnx, exported / "many", *names)
    assert [build.paths[0].name for build in find_builds(folder)] == names
    (picked,) = find_builds(folder / "*-b1?.engine")
    assert picked.paths == (folder / "m-b10.engine",)
    source = (onnx, exported / "candidate")
    report = compare(folder, exported / "engines/candidate", OPTIONS, onnx=source)
    assert len(report.arms.baseline.engines) == 3
    built(exported / "candidate", folder, "m-b2.engine")
    with raises(EngineError, "different-engines", "graphs"):
        find_builds(folder)


@pytest.mark.parametrize(
    ("path", "code"),
    [("nothing.engine", "file-missing"), ("*.engine", "no-engine"), ("no/*.engine", "no-engine")],
)
def test_engines_that_are_not_there_are_told(tmp_path: Path, path: str, code: str) -> None:
    with raises(EngineError, code, tmp_path / path):
        compare(tmp_path / path, tmp_path / path, OPTIONS)


def test_engines_and_onnx_files_are_no_pair(exported: Path) -> None:
    onnx, engines = exported / "candidate/model.onnx", exported / "engines/baseline"
    with raises(ComparisonError, "different-kinds"):
        compare(engines, onnx, OPTIONS)
    with raises(ComparisonError, "engine-not-runnable", "reference"):
        compare(exported / "baseline", onnx, OPTIONS, references=[engines])
    built(exported / "baseline", exported / "baseline")  # a folder with both means its ONNX file
    assert compare(exported / "baseline", onnx, OPTIONS).arms.baseline.engines == []


def test_whole_generations_are_timed_on_every_build_of_an_arm(tmp_path: Path) -> None:
    onnx = write_tiny_lm(tmp_path / "model")
    for number in (1, 2):
        for phase in BOTH:
            written_as(onnx / f"m-{phase}-b{number}.engine", [phase])
    for number, build in enumerate(find_builds(onnx), 1):
        decoder = own_decoder(TensorRtRunner(build))
        assert isinstance(decoder, TensorRtDecoder)
        assert [f"b{other}" in decoder.plan.name for other in (1, 2)] == [number == 1, number == 2]
    assert isinstance(own_decoder(OnnxRuntimeRunner(onnx / "model.onnx", threads=1)), RunnerDecoder)


# An arm whose engines give too little to be judged is judged by an engine that is built for it.


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
    comparison = Comparison(dict(zip(("baseline", "candidate"), arms, strict=True)))
    with comparison.running():
        with comparison.judging() as judges:
            assert judges.whole is comparison.whole
            assert judges.arms["candidate"].runner.name == "cut's judge"
        assert comparison.arms["candidate"].runner.name == "cut"
    assert heard[:6] == ["+whole", "+cut", "-cut", "+cut's judge", "-cut's judge", "+cut"]


@pytest.mark.parametrize(
    ("facts", "enough"),
    [
        ({}, True),
        ({"logits": "all", "attention": "room"}, True),
        ({"logits": "last"}, False),
        ({"logits": "all", "attention": "new"}, False),
    ],
)
def test_the_record_tells_what_can_be_judged(
    facts: dict[str, Any], enough: bool, tmp_path: Path
) -> None:
    engine = written_as(tmp_path / "m.engine", BOTH, **facts)
    assert engine_arm._gives_all(find_engines(engine)) == enough


def test_a_judge_is_built_for_the_same_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BuildSettings(compute_capabilities=("sm89",), optimization_level=2)
    for phase in BOTH:
        written_as(tmp_path / f"m-{phase}.engine", [phase], settings=settings, logits="last")
    build = find_engines(tmp_path)
    with raises(ComparisonError, "last-logits-only", "--engine-onnx"):  # without its graph
        engine_arm._judge(build, None, QUIET, None).__enter__()
    results: dict[str, Any] = {}

    def built(onnx: Path, target: Path, **options: Any) -> list[tuple[Path, None]]:
        results.update(options, onnx=onnx)
        return [(written_as(target, BOTH, logits="all"), None)]

    heard: list[str] = []
    monkeypatch.setattr(engine_arm, "build_engines", built)
    monkeypatch.setattr(engine_arm, "TensorRtRunner", lambda engines: Loaded("judge", heard))
    with engine_arm._judge(build, tmp_path / "model.onnx", QUIET, None):
        assert heard == ["+judge"]
    result = results["settings"]
    assert (result.logits, result.optimization_level) == ("all", 2)
    assert {profile.phase for profile in results["profiles"]} == {*BOTH}
    assert [slot.profile for slot in build.slots] == results["profiles"]


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
    for name, attention in (("a", "new"), ("b", "room"), ("c", None)):
        (tmp_path / name).mkdir()
        engine = written_as(tmp_path / name / "m.engine", ["decode"], attention=attention)
        arms.append(find_engines(engine))
    with raises(ComparisonError, "different-engines", "caches"):
        engine_arm._refuse_built_differently(arms[0], arms[1])
    engine_arm._refuse_built_differently(arms[0], arms[2])  # no attention is left in that one


# On the stand-in of a card: clocks, graphs, and arms that don't fit together.

RANGES = Ranges(batch=Span(1, 1, 1), prompt=Span(1, 8, 128), context=Span(1, 8, 128))
WEIGHTS = 1 << 22


@pytest.fixture(scope="module")
def on_card(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two engines, the second without its first attention."""
    root = tmp_path_factory.mktemp("arms")
    for name, layers in {"baseline": (0, 1), "candidate": (1,)}.items():
        onnx = language_model(root / name, layers=layers) / "model.onnx"
        engine = root / "engines" / name / "m.engine"
        settings = BuildSettings(logits="all")
        write_engine(onnx, engine, BOTH, RANGES, settings=settings, weights_bytes=WEIGHTS)
        with stand_in():
            believed(find_engines(engine), onnx)
    return root / "engines/baseline", root / "engines/candidate"


def run_on_card(arms: Any, **machine: int) -> tuple[ComparisonReport, int, int]:
    with stand_in(**machine) as result:
        report = compare(*arms, GENERATING)
        assert result.left_over == {}
    return report, result.most_used, result.calls["deserialize_cuda_engine"]


def test_engines_are_timed_by_the_device_and_whole_texts_by_the_host(
    on_card: tuple[Path, Path],
) -> None:
    report, most, loads = run_on_card(on_card)
    clocks = {row.phase: row.clock for row in report.latency}
    assert clocks["prefill"] == clocks["decode"] == "device"
    assert clocks["generate"] == "host"
    floats = {row.phase: set(row.launches.values()) for row in report.latency}
    assert floats["decode"] == {"kernels"}  # a cache that grows has a new shape at each step
    engines = [*report.arms.baseline.engines, *report.arms.candidate.engines]
    assert all(engine.check and engine.check.passed for engine in engines)
    assert "kernels" in as_markdown(report)
    # Arms that don't fit together are loaded in turns.
    apart, used, more = run_on_card(on_card, memory_bytes=most - 1)
    assert used < most
    assert more > loads
    assert [row.phase for row in apart.latency] == [row.phase for row in report.latency]
    assert {row.clock for row in apart.latency} == {"device", "host"}
    first, second = (present(one.accuracy) for one in (report, apart))
    assert first.kl_divergence == second.kl_divergence
    assert first.figures == second.figures
    with raises(DepthcutError, "out-of-memory", "batch"):  # one doesn't fit alone
        run_on_card(on_card, memory_bytes=WEIGHTS)


def in_place(folder: Path, backend: str, patch: pytest.MonkeyPatch, **facts: Any) -> list[Path]:
    """Two arms whose caches are in place, the second with half the weights."""

    def judge(
        onnx: Path, target: Path, *, profiles: Any, settings: BuildSettings, **_: Any
    ) -> list[tuple[Path, None]]:
        phases = [profile.phase for profile in profiles]
        write_engine(onnx, target, phases, ROOMY, backend=backend, settings=settings)
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
    with stand_in() as machine:
        report = compare(*folders, OPTIONS)
        assert any(run.as_graph for run in machine.runs)
    launches = {row.phase: row.launches for row in report.latency}
    assert set(launches["decode"].values()) == {"CUDA graph"}
    assert set(launches["prefill"].values()) == {"kernels"}
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
        report = compare(*folders, OPTIONS)
    launch = next(row.launches for row in report.latency if row.phase == "decode")
    assert [item.partition(",")[0] for item in launch.values()] == ["kernels", "kernels"]
    assert all("no CUDA graph" in item for item in launch.values())
    notes = report.arms.baseline.notes
    assert len(notes) == 2  # one for each of its engines
    assert all("A10" in note and machine.name in note for note in notes)
    assert report.arms.candidate.notes == []
    assert "A10" in as_markdown(report)
