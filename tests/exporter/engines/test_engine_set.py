"""Which files serve one model together, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.engines.build.engine_set import find_builds, find_engines, has_engines
from exporter.engines.build.settings import BuildSettings
from exporter.engines.decoding.open_decoder import open_decoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import BackendError, EngineError
from tests.engine_support import decoder_record, written_as
from tests.raising import raises


def pair(folder: Path, **decode: Any) -> Path:
    """A split model: an engine for each phase."""
    written_as(folder / "m-prefill.engine", phases=("prefill",))
    written_as(folder / "m-decode.engine", phases=("decode",), **decode)
    return folder


def test_an_engine_for_each_phase_is_one_set(tmp_path: Path) -> None:
    engines = find_engines(pair(tmp_path))
    assert [path.name for path in engines.paths] == ["m-decode.engine", "m-prefill.engine"]
    result = [(slot.engine, slot.number, slot.profile.phase) for slot in engines.slots]
    assert result == [(0, 0, "decode"), (1, 0, "prefill")]


def test_a_phase_keeps_its_number_within_its_engine(tmp_path: Path) -> None:
    path = written_as(tmp_path / "m.engine", phases=("prefill", "decode"))
    slot = find_engines(path).slots[1]
    assert (slot.engine, slot.number, slot.profile.phase) == (0, 1, "decode")
    assert find_engines(path).shapes(slot, "high")["past_key_values.0.key"] == (2, 2, 8, 4)
    assert find_engines(path).shapes(slot, "low")["input_ids"] == (1, 1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"backend": "tensorrt"}, "backends"),
        ({"backend_version": "1.6.1.120"}, "library versions"),
        ({"made_from": {"model": "c" * 64}}, "graphs"),
        ({"outputs": []}, "inputs or outputs"),
    ],
)
def test_halves_of_different_models_are_refused(
    change: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with raises(EngineError, "different-engines", what):
        find_engines(pair(tmp_path, **change))


@pytest.mark.parametrize(
    ("files", "code", "named"),
    [
        ({"a": ("prefill", "decode"), "b": ("decode",)}, "several-engines",
         ("decode", "a.engine", "b.engine")),
        ({"m": ()}, "no-profile", ("m.engine",)),
        ({}, "no-engine", ()),
        ({"m-b1": ("prefill",), "m-b2": ("prefill",)}, "several-engines", ()),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_hold_one_model_is_refused(
    files: dict[str, tuple[str, ...]], code: str, named: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    for name, phases in files.items():
        written_as(tmp_path / f"{name}.engine", phases=phases)
    assert has_engines(tmp_path) == bool(files)
    with raises(EngineError, code, *named):
        find_engines(tmp_path)


def test_engines_can_be_named_one_by_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pair(tmp_path / name)
    paths = [tmp_path / "a" / "m-prefill.engine", tmp_path / "b" / "m-decode.engine"]
    assert find_engines(paths).paths == tuple(paths)


def test_a_type_that_numpy_lacks_is_told(tmp_path: Path) -> None:
    inputs = [item.model_copy(update={"dtype": "fp4"}) for item in decoder_record(()).inputs]
    path = written_as(tmp_path / "m.engine", phases=("decode",), inputs=inputs)
    with raises(BackendError, "unknown-type", "fp4"):
        open_engine(path)


def test_a_runner_tells_its_ends_without_a_gpu(tmp_path: Path) -> None:
    runner = open_engine(written_as(tmp_path / "m.engine", phases=("decode",)))
    shapes = {spec.name: (str(spec.dtype), spec.shape) for spec in runner.inputs}
    assert shapes["input_ids"] == ("int64", (None, None))
    assert shapes["past_key_values.0.key"] == ("bfloat16", (None, 2, None, 4))
    assert runner.outputs[0].name == "logits"
    with raises(BackendError, "not-entered"):
        runner.run({})


def builds(folder: Path, **second: Any) -> Path:
    """Two builds of a split model."""
    for number, changes in ((1, {}), (2, second)):
        for phase in ("prefill", "decode"):
            written_as(folder / f"m-{phase}-b{number}.engine", phases=(phase,), **changes)
    return folder


def test_builds_of_a_split_model_are_told_apart(tmp_path: Path) -> None:
    names = [[path.name for path in build.paths] for build in find_builds(builds(tmp_path))]
    assert names == [[f"m-{p}-b{n}.engine" for p in ("decode", "prefill")] for n in (1, 2)]


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        ({"settings": BuildSettings(optimization_level=5)}, "built-differently", "settings"),
        ({"profiles": decoder_record(("prefill", "decode")).profiles}, "several-engines", "decode"),
        ({"made_from": {"model": "c" * 64}}, "built-differently", "graphs"),
    ],
)
def test_engines_that_were_built_otherwise_are_no_builds_of_one(
    change: dict[str, Any], code: str, what: str, tmp_path: Path
) -> None:
    with raises(EngineError, code, what):
        find_builds(builds(tmp_path, **change))


def test_the_first_of_several_builds_generates(tmp_path: Path) -> None:
    decoder = open_decoder(builds(tmp_path))
    assert isinstance(decoder, TensorRtDecoder)
    assert "m-decode-b1.engine and" in decoder.plan.name
    assert "-b2" not in decoder.plan.name
