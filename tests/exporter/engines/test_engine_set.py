"""Engines and their records: what belongs together, what loads here, and what calls they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.engines.build.engine_set import (
    EngineSet,
    EngineTensor,
    built_for,
    choose_profile,
    find_builds,
    find_engines,
    read_sidecar,
    refuse_mismatch,
    sidecar_path,
)
from exporter.engines.build.libraries import Device
from exporter.engines.build.profiles import Span
from exporter.engines.build.settings import BuildSettings
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.decoding.runner_decoder import RunnerDecoder
from exporter.engines.decoding.tensorrt_decoder import CachePlan, TensorRtDecoder, plan_cache
from exporter.engines.runners.cache_form import padded_before
from exporter.engines.runners.tensorrt import checked_input, open_engine, refuse_untold
from exporter.engines.tensors import TensorSpec, numpy_dtype
from exporter.errors import ArtifactError, BackendError, EngineError, UnsafeInputError, UsageError
from tests.engine_support import CACHE, CARD, decoder_record, record, written, written_as
from tests.raising import raises
from tests.tiny_graphs import saved, tiny_model

PHASES = ("prefill", "decode")
HOPPER = Device("another card", "sm90", 80 << 30)
TIED: dict[str, Any] = {
    "backend": "tensorrt", "backend_version": "11.4", "settings": BuildSettings(),
    "built_on": {"gpu": "a card", "compute_capability": "sm89", "driver_cuda": "13.0"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "kind", "code", "named"),
    [
        (lambda e: e.write_bytes(e.read_bytes()[:-1]), EngineError, "wrong-hash", (19, 20)),
        (lambda e: e.write_bytes(e.read_bytes().upper()), EngineError, "wrong-hash", ()),
        (lambda e: sidecar_path(e).unlink(), EngineError, "wrong-hash", ()),
        (lambda e: sidecar_path(e).write_text("{}"), ArtifactError, None, ()),
        (lambda e: e.unlink(), EngineError, "file-missing", ()),
    ],
)
def test_what_does_not_belong_together_is_refused(
    damage: Callable[[Path], Any], kind: Any, code: str | None, named: Any, tmp_path: Path
) -> None:
    engine = written(tmp_path)
    result = read_sidecar(engine)
    assert result == record().model_copy(update={"command": result.command})
    damage(engine)
    with pytest.raises(kind) if code is None else raises(kind, code, "m.engine", *named):
        read_sidecar(engine)


@pytest.mark.parametrize("old", ["settings.cache_reads", "attention.told_by"])
def test_the_record_of_an_earlier_version_says_to_build_again(old: str, tmp_path: Path) -> None:
    """Such an engine may be told lengths."""
    engine = written(tmp_path)
    content = json.loads(sidecar_path(engine).read_text())
    place, key = old.split(".")
    content[place] = {**(content[place] or {}), key: "lengths"}
    sidecar_path(engine).write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        read_sidecar(engine)
    assert f"$.{place}" in caught.value.message
    assert caught.value.hint


def test_a_record_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    engine = written(folder)
    sidecar_path(engine).rename(tmp_path / "elsewhere.json")
    sidecar_path(engine).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UnsafeInputError):
        read_sidecar(engine)
    (folder / "here.json").write_bytes((tmp_path / "elsewhere.json").read_bytes())
    sidecar_path(engine).unlink()
    sidecar_path(engine).symlink_to("here.json")
    assert read_sidecar(engine) == record()


@pytest.mark.parametrize(
    ("facts", "version", "card", "code", "named"),
    [
        ({}, "1.7.1.116", CARD, "", ()),
        ({}, "1.6.0.1", HOPPER, "other-card", ("sm89", "1.7.1.116", "sm90", "1.6.0.1")),
        ({}, "1.7.1.116", HOPPER, "other-card", ("--compute-capability sm90",)),
        (TIED, "11.4", CARD, "", ()),
        (TIED, "11.4", HOPPER, "other-card", ("sm90",)),
        (TIED, "11.5", CARD, "other-card", ("11.5",)),
    ],
)
def test_an_engine_for_another_card_or_version_is_refused(
    facts: dict[str, Any], version: str, card: Device, code: str, named: tuple[str, ...]
) -> None:
    made = record(**facts)
    assert built_for(made) == "sm89"
    if not code:
        refuse_mismatch(made, version, [card])
        return
    with raises(EngineError, code, "m.engine", *named):
        refuse_mismatch(made, version, [card])


@pytest.mark.parametrize(
    ("backend", "prefix", "others"),
    [
        ("tensorrt-rtx", "nv", {"nv_multi_profile_enable": "1", "nv_runtime_cache_path": "c"}),
        ("tensorrt", "trt", {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": "c",
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": "c", "trt_fp16_enable": "1",
        }),
    ],
)  # fmt: skip
def test_onnx_runtime_is_told_the_profiles_of_an_engine(
    backend: str, prefix: str, others: dict[str, str]
) -> None:
    options = decoder_record(PHASES, backend=backend).provider_options(Path("c"))
    shapes = {
        "min": "input_ids:1x1,attention_mask:1x1,{0}:1x2x0x4,{1}:1x2x0x4,"
               "input_ids:1x1,attention_mask:1x2,{0}:1x2x1x4,{1}:1x2x1x4",
        "opt": "input_ids:1x4,attention_mask:1x4,{0}:1x2x0x4,{1}:1x2x0x4,"
               "input_ids:1x1,attention_mask:1x5,{0}:1x2x4x4,{1}:1x2x4x4",
        "max": "input_ids:2x6,attention_mask:2x6,{0}:2x2x0x4,{1}:2x2x0x4,"
               "input_ids:2x1,attention_mask:2x9,{0}:2x2x8x4,{1}:2x2x8x4",
    }  # fmt: skip
    wanted = {f"{prefix}_profile_{end}_shapes": s.format(*CACHE) for end, s in shapes.items()}
    assert options == wanted | others


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32-int8", "fp16-int4", "bf16-fp8"])
def test_onnx_runtime_may_take_the_floats_of_the_graph(precision: str) -> None:
    record = decoder_record(PHASES, backend="tensorrt").model_copy(update={"precision": precision})
    options, main = record.provider_options(Path("c")), precision.split("-")[0]
    halves = {f"trt_{half}_enable" for half in ("fp16", "bf16") if half == main}
    assert {key for key in options if key in ("trt_fp16_enable", "trt_bf16_enable")} == halves


def builds(folder: Path, numbers: tuple[str, ...] = ("-b1", "-b2"), **last: Any) -> Path:
    """Builds of a split model, the last of which may be another."""
    for number in numbers:
        changes = last if number == numbers[-1] else {}
        for phase in PHASES:
            written_as(folder / f"m-{phase}{number}.engine", phases=(phase,), **changes)
    return folder


def test_an_engine_for_each_phase_is_one_set(tmp_path: Path) -> None:
    engines = find_engines(builds(tmp_path, ("",)))
    assert [path.name for path in engines.paths] == ["m-decode.engine", "m-prefill.engine"]
    result = [(slot.engine, slot.number, slot.profile.phase) for slot in engines.slots]
    assert result == [(0, 0, "decode"), (1, 0, "prefill")]
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "m-prefill.engine", builds(tmp_path / "other", ("",)) / "m-decode.engine"]
    assert find_engines(paths).paths == tuple(paths)  # named one by one


@pytest.mark.parametrize(
    ("files", "code", "named"),
    [
        ({"a": (PHASES, {}), "b": (["decode"], {})}, "different-engines",
         ("decode", "a.engine", "b.engine")),
        ({}, "no-engine", ()),
        ({"m-b1": (["prefill"], {}), "m-b2": (["prefill"], {})}, "different-engines", ()),
        *(({"a": (["prefill"], {}), "b": (["decode"], change)}, "different-engines", (what,))
          for change, what in (
              ({"backend": "tensorrt"}, "backends"),
              ({"backend_version": "1.6.1.120"}, "library versions"),
              ({"made_from": {"model": "c" * 64}}, "graphs"),
              ({"outputs": []}, "inputs or outputs"),
          )),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_hold_one_model_is_refused(
    files: dict[str, Any], code: str, named: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    for name, (phases, changes) in files.items():
        written_as(tmp_path / f"{name}.engine", phases=phases, **changes)
    with raises(EngineError, code, *named):
        find_engines(tmp_path)


def test_builds_of_a_split_model_are_told_apart_and_the_first_generates(tmp_path: Path) -> None:
    names = [[path.name for path in build.paths] for build in find_builds(builds(tmp_path))]
    assert names == [[f"m-{p}-b{n}.engine" for p in ("decode", "prefill")] for n in (1, 2)]
    decoder = open_decoder(tmp_path)
    assert isinstance(decoder, TensorRtDecoder)
    assert "m-decode-b1.engine and" in decoder.plan.name
    assert "-b2" not in decoder.plan.name


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        ({"settings": BuildSettings(optimization_level=5)}, "different-engines", "settings"),
        ({"profiles": decoder_record(PHASES).profiles}, "different-engines", "decode"),
        ({"made_from": {"model": "c" * 64}}, "different-engines", "graphs"),
    ],
)
def test_engines_that_were_built_otherwise_are_no_builds_of_one(
    change: dict[str, Any], code: str, what: str, tmp_path: Path
) -> None:
    with raises(EngineError, code, what):
        find_builds(builds(tmp_path, **change))


def test_a_runner_tells_its_ends_without_a_gpu(tmp_path: Path) -> None:
    runner = open_engine(written_as(tmp_path / "m.engine", phases=("decode",)))
    shapes = {spec.name: (str(spec.dtype), spec.shape) for spec in runner.inputs}
    assert shapes["input_ids"] == ("int64", (None, None))
    assert shapes["past_key_values.0.key"] == ("bfloat16", (None, 2, None, 4))
    assert runner.outputs[0].name == "logits"
    with raises(BackendError, "not-entered"):
        runner.run({})
    inputs = [item.model_copy(update={"dtype": "fp4"}) for item in decoder_record(PHASES).inputs]
    path = written_as(tmp_path / "m.engine", phases=("decode",), inputs=inputs)
    with raises(BackendError, "unknown-input", "fp4"):
        open_engine(path)


PROFILES = decoder_record(PHASES).profiles


def call(batch: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
    return {
        "input_ids": (batch, sequence), "attention_mask": (batch, past + sequence),
        **dict.fromkeys(CACHE, (batch, 2, past, 4)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "number"),
    [(call(1, 6, 0), 0), (call(2, 1, 0), 0), (call(1, 1, 1), 1), (call(2, 1, 8), 1)],
)
def test_a_call_finds_the_profile_that_holds_it(
    shapes: dict[str, tuple[int, ...]], number: int
) -> None:
    assert choose_profile("m", PROFILES, shapes) == number


@pytest.mark.parametrize(
    ("shapes", "fields"),
    [
        (call(1, 7, 0), ("input_ids", "1x7", "prefill", "1x1 to 2x6", "decode", "1x1 to 2x1")),
        (call(3, 1, 4), ("input_ids", "3x1")),
        (call(1, 1, 9), ("attention_mask", "1x10", "decode", "1x2 to 2x9")),
        (call(1, 2, 4), ("input_ids", "1x2", "decode", "1x1 to 2x1")),
    ],
)
def test_what_no_profile_holds_is_refused(
    shapes: dict[str, tuple[int, ...]], fields: tuple[str, ...]
) -> None:
    with raises(BackendError, "no-profile-fits", *fields):
        choose_profile("m", PROFILES, shapes)


def test_types_have_numpy_s_names_and_inputs_take_them() -> None:
    names = ("float", "half", "bf16", "int64", "bool")
    result = [str(numpy_dtype(name)) for name in names]
    assert result == ["float32", "float16", "bfloat16", "int64", "bool"]
    for unknown in ("fp8", "int4", "string"):
        with raises(BackendError, "unknown-input", unknown):
            numpy_dtype(unknown)
    spec = TensorSpec("x", np.dtype(np.float16), (None, 4))
    assert checked_input("m", spec, np.zeros((2, 4), np.float32)).dtype == np.float16
    for array, named in ((np.zeros((2, 5)), ("2x5", "?x4")), (np.zeros(4), (4,))):
        with raises(BackendError, "wrong-shape", *named):
            checked_input("m", spec, array)


@pytest.mark.parametrize(
    ("mask", "padded", "refused"),
    [
        ([1, 1, 1, 0], False, False),
        ([1, 1, 0, 0], False, False),
        ([1, 1, 1, 1], False, True),
        ([0, 1, 1, 0], True, True),
    ],
)
def test_what_an_engine_for_prompts_alone_would_misread_is_refused(
    mask: list[int], padded: bool, refused: bool
) -> None:
    ids, masks = np.ones((2, 3), np.int64), np.array([[1, 1, 1, 0], mask])
    inputs = {"input_ids": ids, "attention_mask": masks}
    assert padded_before(inputs) == padded
    assert not padded_before({"pixel_values": np.zeros((1, 3))})
    refuse_untold(record(attention=None), inputs)
    refuse_untold(record(attention="room"), inputs)
    if refused:
        with raises(BackendError, "no-padding", "m.engine"):
            refuse_untold(record(attention="new"), inputs)
    else:
        refuse_untold(record(attention="new"), inputs)


def plan(**changes: Any) -> CachePlan:
    made = decoder_record(changes.pop("phases", PHASES), **changes)
    return plan_cache(EngineSet((Path("m.engine"),), (made,)))


def grouped(prefill: int, decode: int) -> CachePlan:
    """Engines whose phases take different batches at most."""
    result = plan()
    return replace(result, prefill_batch=Span(1, prefill, prefill), batch=Span(1, decode, decode))


@pytest.mark.parametrize(
    ("made", "call", "code", "fields"),
    [
        (plan(), (1, 4, 6), "", ()),  # the last of them is not run
        (plan(), (2, 6, 4), "", ()),
        (plan(), (3, 4, 1), "no-profile-fits", ("--batch-range", 3, 1, 2)),
        (plan(), (1, 7, 1), "no-profile-fits", ("--prompt-range", 7, 1, 6)),
        (plan(), (1, 4, 7), "no-profile-fits", ("--context-range", 9, 1, 8)),
        (plan(), (1, 0, 1), "no-profile-fits", ("--prompt-range", 0)),
        (grouped(1, 5), (1, 3, 1), "", ()),  # alone, it begins at the buffer's own address
        (grouped(1, 5), (2, 3, 1), "no-profile-fits", (3,)),
        (replace(grouped(3, 5), prefill_batch=Span(3, 3, 3)), (2, 4, 1), "no-profile-fits",
         ("batch", 2)),
    ],
)  # fmt: skip
def test_what_the_profiles_do_not_hold_is_refused(
    made: CachePlan, call: tuple[int, int, int], code: str, fields: tuple[object, ...]
) -> None:
    if not code:
        made.refuse_unfit(*call)
        return
    with raises(BackendError, code, *fields):
        made.refuse_unfit(*call)


INPUTS, OUTPUTS = decoder_record(PHASES).inputs, decoder_record(PHASES).outputs
ODD = EngineTensor(name="odd", dtype="int64", shape=(1,))


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"phases": ("prefill",)}, "no-profile-fits", "for decode"),
        ({"phases": ("decode",)}, "no-profile-fits", "for prefill"),
        ({"inputs": [one for one in INPUTS if one.name not in CACHE]}, "no-kv-cache", "m.engine"),
        ({"outputs": OUTPUTS[:-1]}, "unknown-input", "past_key_values"),
        ({"outputs": OUTPUTS[1:]}, "no-kv-cache", "m.engine"),
        ({"inputs": [*INPUTS, ODD]}, "unknown-input", "'odd'"),
    ],
)
def test_engines_that_cannot_generate_are_refused(
    change: dict[str, Any], code: str, field: str
) -> None:
    with raises(BackendError, code, field):
        plan(**change)


def test_a_decoder_refuses_before_it_is_loaded(tmp_path: Path) -> None:
    decoder = open_decoder(written_as(tmp_path / "m.engine", phases=PHASES))
    assert isinstance(decoder, TensorRtDecoder)
    with raises(BackendError, "no-profile-fits", "--context", 12):
        generate(decoder, [1, 2, 3, 4], new_tokens=10)
    with raises(BackendError, "not-entered"):
        decoder.prefill(np.array([[1, 2]]))


def test_a_folder_is_what_lies_in_it(tmp_path: Path) -> None:
    engine = builds(tmp_path, ("",)) / "m-decode.engine"
    assert isinstance(open_decoder(tmp_path), TensorRtDecoder)
    saved(tiny_model(), tmp_path)
    assert isinstance(open_decoder(tmp_path), RunnerDecoder)
    with raises(UsageError, "unsupported-option", "--cache-length"):
        open_decoder(engine, context=8)
