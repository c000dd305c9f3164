"""Engines as arms, on a machine without a driver: told from their records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import ComparisonReport
from exporter.compare import kinds as engine_arm
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.engines.build.engine_set import find_builds
from exporter.engines.build.libraries import Driver
from exporter.engines.build.settings import BuildSettings
from exporter.engines.decoding.open_decoder import own_decoder
from exporter.engines.decoding.runner_decoder import RunnerDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.errors import BackendError, ComparisonError, DepthcutError, EngineError
from exporter.files import sha256_file, sha256_files
from tests.engine_support import CONTENT, written_as
from tests.made_reports import as_markdown
from tests.raising import raises
from tests.text_graphs import write_tiny_lm

OPTIONS = CompareOptions(
    threads=1,
    prefill_lengths=(4,),
    decode_past_lengths=(6,),
    rounds=2,
    eval_tokens=32,
    eval_sequence_length=16,
)
PLAN = [{"layer": 0, "kind": "attention", "replacement": "none"}]


@pytest.fixture(autouse=True)
def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_arm, "ask_driver", lambda: Driver("no NVIDIA driver"))


def built(onnx: Path, folder: Path, *names: str, **changes: Any) -> Path:
    """Engine files, each with a record that names an ONNX file by its hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {
        "model": sha256_file(onnx / "model.onnx"),
        "weights": sha256_files([onnx / "model.onnx.data"], onnx),
    }
    for name in names or ("m.engine",):
        written_as(folder / name, ["prefill", "decode"], made_from=hashes, **changes)
    return folder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as ``depthcut export`` leaves it, with engines."""
    for name, layers in {"baseline": (0, 1), "candidate": (1,)}.items():
        onnx = write_tiny_lm(tmp_path / name, layers=layers)
        plan = PLAN if name == "candidate" else []
        built(onnx, tmp_path / "engines" / name, plan=plan)
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
        assert (engine.engine_bytes, engine.layers) == (len(CONTENT), {"kgen": 2})
        assert (engine.built_for, engine.network_layers) == ("sm89", 9)
    assert len(report.latency) == 2
    assert report.accuracy is not None
    text = as_markdown(report)
    assert "The engines of both arms: built, not run: no NVIDIA driver" in text
    assert "m.engine" in text


def test_without_the_onnx_files_only_the_builds_are_told(exported: Path) -> None:
    shutil.rmtree(exported / "candidate")
    report = compared(exported)
    assert report.latency == []
    assert report.accuracy is None
    assert [entry.layer for entry in report.plan] == [0]
    for arm in (report.arms.baseline, report.arms.candidate):
        assert (arm.backend, arm.provider) == ("tensorrt-rtx", "none")
        assert arm.not_run is not None
        assert "nothing was measured" in arm.not_run
        assert arm.sha256 == arm.engines[0].sha256
        assert arm.kv_cache_bytes_per_token == 2 * 2 * 4 * 2
    text = as_markdown(report)
    assert "Not measured: nothing was run" in text
    assert "logits" not in text


def test_onnx_files_elsewhere_can_be_named(exported: Path) -> None:
    moved = exported / "elsewhere"
    for name in ("baseline", "candidate"):
        shutil.move(exported / name, moved / name)
    assert compared(exported).latency == []
    report = compared(exported, onnx=(moved / "baseline", moved / "candidate" / "model.onnx"))
    assert report.arms.candidate.path == str(moved / "candidate" / "model.onnx")
    assert len(report.latency) == 2


def test_an_onnx_file_that_the_engine_was_not_built_from_is_refused(exported: Path) -> None:
    swapped = (exported / "candidate", exported / "baseline")
    with raises(ComparisonError, "not-built-from", "candidate/model.onnx"):
        compared(exported, onnx=swapped)


def test_other_weights_are_another_onnx_file(exported: Path) -> None:
    data = exported / "baseline" / "model.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    assert compared(exported).latency == []
    with raises(ComparisonError, "not-built-from"):
        compared(exported, onnx=(exported / "baseline", exported / "candidate"))


@pytest.mark.parametrize(
    ("changes", "kind", "code", "field"),
    [
        ({"backend_version": "1.6.0"}, ComparisonError, "built-differently", "libraries"),
        (
            {"settings": BuildSettings(compute_capabilities=("sm80",))},
            ComparisonError,
            "built-differently",
            "settings",
        ),
        ({"profiles": []}, EngineError, "no-profile", "m.engine"),
    ],
)
def test_arms_that_were_built_in_different_ways_are_refused(
    exported: Path, changes: dict[str, Any], kind: type[DepthcutError], code: str, field: str
) -> None:
    built(exported / "candidate", exported / "engines/candidate", **changes)
    with raises(kind, code, field):
        compared(exported)


def test_arms_for_different_shapes_are_refused(exported: Path) -> None:
    written_as(exported / "engines/candidate/m.engine", ["prefill"])
    with raises(ComparisonError, "built-differently", "profiles"):
        compared(exported)


def test_several_builds_are_all_listed(exported: Path) -> None:
    onnx = exported / "baseline"
    folder = built(onnx, exported / "many", "m-b1.engine", "m-b2.engine", "m-b10.engine")
    assert [build.paths[0].name for build in find_builds(folder)] == [
        "m-b1.engine",
        "m-b2.engine",
        "m-b10.engine",
    ]
    (picked,) = find_builds(folder / "*-b1?.engine")
    assert picked.paths == (folder / "m-b10.engine",)
    source = (onnx, exported / "candidate")
    report = compare(folder, exported / "engines/candidate", OPTIONS, onnx=source)
    assert len(report.arms.baseline.engines) == 3
    assert f"3 engines of {len(CONTENT)} bytes each" in as_markdown(report)


def test_builds_of_two_models_are_no_builds(exported: Path) -> None:
    folder = built(exported / "baseline", exported / "many", "m-b1.engine")
    built(exported / "candidate", folder, "m-b2.engine")
    with raises(EngineError, "built-differently", "graphs"):
        find_builds(folder)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nothing.engine", "file-missing"),
        ("*.engine", "no-engine"),
        ("missing/*.engine", "no-engine"),
    ],
)
def test_engines_that_are_not_there_are_told(tmp_path: Path, path: str, code: str) -> None:
    with raises(EngineError, code, tmp_path / path):
        compare(tmp_path / path, tmp_path / path, OPTIONS)


def test_an_engine_against_an_onnx_file_is_no_pair(exported: Path) -> None:
    with raises(ComparisonError, "different-kinds"):
        compare(exported / "engines/baseline", exported / "candidate/model.onnx", OPTIONS)


def test_an_engine_that_cannot_run_is_no_reference(exported: Path) -> None:
    onnx = (exported / "baseline", exported / "candidate")
    with raises(ComparisonError, "engine-not-runnable", "reference"):
        compare(*onnx, OPTIONS, references=[exported / "engines/baseline"])


def test_a_folder_with_both_means_its_onnx_file(exported: Path) -> None:
    built(exported / "baseline", exported / "baseline")
    report = compare(exported / "baseline", exported / "candidate", OPTIONS)
    assert report.arms.baseline.engines == []


def test_whole_generations_are_timed_on_every_build_of_an_arm(tmp_path: Path) -> None:
    onnx = write_tiny_lm(tmp_path / "model")
    for number in (1, 2):
        for phase in ("prefill", "decode"):
            written_as(onnx / f"m-{phase}-b{number}.engine", [phase])
    runners = tuple(TensorRtRunner(build) for build in find_builds(onnx))
    first, second = map(own_decoder, runners)
    assert isinstance(first, TensorRtDecoder)
    assert isinstance(second, TensorRtDecoder)
    assert "b1" in first.plan.name
    assert "b2" not in first.plan.name
    assert "b2" in second.plan.name
    assert isinstance(own_decoder(OnnxRuntimeRunner(onnx / "model.onnx", threads=1)), RunnerDecoder)


def test_what_no_profile_holds_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """The profiles take prompts of 1 to 6 tokens and a cache of 1 to 8."""
    for phase in ("prefill", "decode"):
        written_as(tmp_path / f"m-{phase}.engine", [phase])
    (build,) = find_builds(tmp_path)
    decoder = RunnerDecoder(TensorRtRunner(build))
    decoder.refuse_unfit(2, 6, 4)  # the last token needs a cache of 8
    for batch, prompt, new_tokens in ((2, 6, 5), (2, 7, 2), (3, 6, 2)):
        with raises(BackendError, "no-profile-fits", "m-decode.engine"):
            decoder.refuse_unfit(batch, prompt, new_tokens)
