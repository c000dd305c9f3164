"""Engines against ONNX Runtime, on the stand-in: what is wrong is found, what is right passes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import onnx_ir as ir
import pytest

from exporter.artifacts import EngineCheck, Phase
from exporter.cli import run
from exporter.compare.kinds import open_arms, same_kind
from exporter.compare.session import compare
from exporter.engines.build.engine_set import EngineRecord, EngineSet, find_engines, sidecar_path
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.decoding import verify
from exporter.engines.decoding.generate import open_decoder, open_model
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.packaging import package_triton
from exporter.engines.runners.tensorrt import open_engine
from exporter.engines.tensors import TOLERANCE
from exporter.errors import BackendError, EngineError, UsageError
from exporter.progress import QUIET
from graph_passes.locate import locate
from tests.engine_support import SHORT, written
from tests.graph_passes.decoder_graphs import decoder_model
from tests.graph_passes.test_refusals import Cached, Published
from tests.raising import raises
from tests.stand_in.decoders import RANGES as DECODER
from tests.stand_in.decoders import ROOM, decoder_engine, decoder_onnx
from tests.stand_in.engine_files import altered, write_engine
from tests.stand_in.faults import FAULTS
from tests.stand_in.installed import stand_in
from tests.stand_in.rounding import DTYPES, RANGES, SIZES, checked, llama, random_right
from tests.tiny_graphs import TinySpec, saved, tiny_model
from tests.tiny_graphs import _Builder as tiny_graph

PAIRS = replace(RANGES, batch=Span(1, 2, 2))


IN_TIER = set(zip(DTYPES, SIZES, strict=True))


@pytest.mark.parametrize(
    ("precision", "size"),
    [
        pytest.param(*case, marks=() if case in IN_TIER else pytest.mark.long)
        for case in product(DTYPES, SIZES)
    ],
)
def test_each_wrong_way_to_decode_is_found_and_rounding_passes(
    precision: str, size: int, tmp_path: Path
) -> None:
    onnx = llama(tmp_path, precision, size)
    engines, right = checked(onnx, "rounds")
    assert check_of(engines).passed
    assert {item.run.split()[0] for item in right} == {"prefill", "decode", "a"}
    for fault in FAULTS:
        engines, wrong = checked(onnx, fault)
        assert max(item.error for item in wrong) > 2 * TOLERANCE[precision], fault
        assert not check_of(engines).passed, fault


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(200), marks=pytest.mark.long)])
def test_no_right_engine_is_refused(seeds: range, tmp_path: Path) -> None:
    errors = [random_right(tmp_path, seed) for seed in seeds]
    assert all(0 < error <= TOLERANCE[precision] for precision, error in errors)


def check_of(engines: EngineSet) -> EngineCheck:
    """What is on record, the same for each engine."""
    records = [EngineRecord.read(sidecar_path(path)) for path in engines.paths]
    assert len({record.check for record in records}) == 1
    assert records[0].check is not None
    return records[0].check


@pytest.mark.parametrize("in_place", [True, False])
def test_one_engine_for_both_phases_passes(in_place: bool, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, in_place=in_place)
    with stand_in() as machine:
        engines, results = verify.verify_engines(find_engines(engine), tmp_path / "model.onnx")
        assert {run.profile for run in machine.runs} == {0, 1}
    assert check_of(engines).passed
    assert "a text of 4, batch 2, step 5" in {item.run for item in results}


def swapped(onnx: Path, engine: Path, kind: str = "mlp") -> Path:
    """Has an engine compute another graph than the one that it was built from."""
    model = ir.load(onnx)
    site = next(site for site in locate(model).sites if site.kind == kind)
    node = [n for n in model.graph if n in site.dying and n.op_type == "MatMul"][-1]
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.5, name=weight.name)
    other = saved(model, onnx.parent / "other", "other.onnx")
    return altered(engine, onnx=str(other))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_wrong_weight_is_found_in_every_phase(kind: str, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, in_place=False)
    swapped(tmp_path / "model.onnx", engine, kind)
    with stand_in():
        _, results = verify.verify_engines(find_engines(engine), tmp_path / "model.onnx")
    wrong = {item.run.split()[0] for item in results if not item.passed}
    assert wrong == {"prefill", "decode", "a"}


def test_an_encoder_with_a_short_text_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    onnx = saved(tiny_model(TinySpec(layers=1, cache=False)), tmp_path)
    engine = write_engine(onnx, tmp_path / "m.engine", ["encode"], PAIRS)
    with stand_in():
        engines, results = verify.verify_engines(find_engines(engine), onnx)
        assert check_of(engines).passed
        assert {item.run for item in results} == {"encode 4", "encode 4, batch 2"}
        _, blind = verify.verify_engines(find_engines(altered(engine, fault="mask")), onnx)
        assert {item.run for item in blind if not item.passed} == {item.run for item in results}
        wrong, _ = verify.verify_engines(find_engines(swapped(onnx, engine)), onnx)
        assert not check_of(wrong).passed


@pytest.mark.parametrize(
    ("builder", "spec", "phase"),
    [
        (tiny_graph, TinySpec(layers=2, cache=False), "encode"),
        (Published, TinySpec(layers=2, cache=False), "encode"),
        (Cached, TinySpec(layers=2), "decode"),
    ],
    ids=["encoder", "first-step", "next-step"],
)
def test_each_graph_of_an_encoder_decoder_is_checked(
    builder: Any, spec: TinySpec, phase: Phase, tmp_path: Path
) -> None:
    onnx = saved(builder(spec, 0).build(), tmp_path)
    ranges = Ranges(batch=Span(1, 2, 2), prompt=Span(1, 5, 8))
    if phase == "decode":
        ranges = replace(ranges, context=Span(1, 3, 8))
    engine = write_engine(onnx, tmp_path / "m.engine", [phase], ranges)
    with stand_in():
        (record,) = verify.believed(find_engines(engine)).records
        assert record.check is not None
        assert record.check.passed
        fault = "mask" if builder is tiny_graph else "cross"
        with raises(EngineError, "engine-differs"):
            verify.believed(find_engines(altered(engine, fault=fault)))


def test_one_prompt_is_as_long_as_usual_where_memory_allows(tmp_path: Path) -> None:
    onnx = saved(decoder_model(), tmp_path)
    ranges = Ranges(batch=Span(1, 2, 2), prompt=Span(1, 80, 80), context=Span(1, 8, 90))
    engine = write_engine(onnx, tmp_path / "m.engine", ["prefill", "decode"], ranges)
    for most, longest in ((verify._MOST_BYTES, 80), (3000, 64)):
        with stand_in(), mock.patch.object(verify, "_MOST_BYTES", most):
            _, results = verify.verify_engines(find_engines(engine), onnx, threads=1)
        prompts = {item.run for item in results if item.run.startswith("prefill")}
        assert f"prefill {longest}" in prompts


def test_what_is_opened_first_is_checked_once_for_a_card(tmp_path: Path) -> None:
    onnx, folder = decoder_onnx(tmp_path, in_place=True), tmp_path / "engines"
    paths = [
        write_engine(onnx, folder / f"m-{phase}.engine", [phase], DECODER)
        for phase in ("prefill", "decode")
    ]
    open_decoder(folder)  # no card: it isn't run
    assert EngineRecord.read(sidecar_path(paths[0])).check is None
    with stand_in() as machine:
        open_decoder(folder)
        assert check_of(find_engines(folder)).card.startswith(machine.name)
        runs = len(machine.runs)
        assert runs
        open_decoder(folder)
        open_model(folder)
        assert len(machine.runs) == runs
    with stand_in(name="Another card") as machine:
        open_decoder(folder)
        assert machine.runs


def test_what_cannot_be_checked_is_said_and_still_runs(tmp_path: Path) -> None:
    engine, progress = decoder_engine(tmp_path), mock.Mock(wraps=QUIET)
    (tmp_path / "model.onnx").rename(tmp_path / "elsewhere.bin")
    with stand_in():
        engines = verify.believed(find_engines(engine), progress=progress)
    (said,), _ = progress.say.call_args
    assert "not checked" in said
    assert engines.records[0].check is None


def test_an_engine_that_differs_is_refused_until_it_is_checked_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = swapped(*(tmp_path / "model.onnx", decoder_engine(tmp_path)))
    onnx = tmp_path / "model.onnx"
    with stand_in():
        for opened in (open_decoder, open_engine, open_model):
            with raises(EngineError, "engine-differs", "model.engine"):
                opened(engine).__enter__()  # type: ignore[attr-defined]
        assert run(["verify-engine", str(engine), str(onnx), "--json"]) == 1
        results = json.loads(capsys.readouterr().out)
        assert not all(item["error"] <= item["tolerance"] for item in results)
        with raises(EngineError, "engine-differs", "model.engine"):
            compare(engine, engine, SHORT)
        sound = decoder_engine(tmp_path)
        assert run(["verify-engine", str(sound), str(onnx)]) == 0
        open_decoder(sound)


def test_polygraphy_goes_on_from_the_run_that_is_furthest_off(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    if importlib.util.find_spec("torch"):  # Polygraphy imports it, which crashes beside a stand-in
        importlib.import_module("torch")
    onnx = llama(tmp_path, "fp32", 16)
    (tmp_path / "differs").mkdir()
    (tmp_path / "differs" / "inputs.json").touch()  # as from an earlier check
    checked(onnx, "heads", folder=tmp_path / "differs")
    inputs, *sides = (tmp_path / "differs" / f"{name}.json" for name in verify._SIDES)
    main = (
        "import sys; from polygraphy.tools import main; run = sys.argv[:-2]; ends = []\n"
        "for side in sys.argv[-2:]:\n    sys.argv = [*run, side]; ends.append(main())\n"
        "print(ends)"
    )
    arguments = ["run", onnx, "--onnxrt", "--load-inputs", inputs, "--load-outputs", *sides]
    result = subprocess.run(
        [sys.executable, "-c", main, *map(str, arguments)], capture_output=True, check=False
    )
    assert b"FAILED" in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == b"[1, 0]", result.stdout


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path / "engines")
    before = {file.name: file.read_bytes() for file in engine.parent.iterdir()}
    with stand_in(), raises(UsageError, "not-ours", engine.parent), no_polygraphy_needed():
        verify.verify_engines(
            find_engines(engine), engine.with_name("model.onnx"), folder=engine.parent
        )
    assert {file.name: file.read_bytes() for file in engine.parent.iterdir()} == before


def test_first_steps_are_written_and_only_once_the_result_is_on_record(tmp_path: Path) -> None:
    engine = altered(decoder_engine(tmp_path / "engines"), fault="stale")
    held = mock.patch.object(verify._Furthest, "hold", autospec=True)
    full = mock.patch.object(verify._Furthest, "write", side_effect=OSError("the disk is full"))
    wrong = pytest.raises(OSError, match="full")
    with stand_in(), no_polygraphy_needed(), held as hold, full as write, wrong:
        verify.verify_engines(
            find_engines(engine), engine.with_name("model.onnx"), folder=tmp_path / "differs"
        )
    assert write.called
    assert not check_of(find_engines(engine)).passed
    inputs = [call.args[2] for call in hold.call_args_list]
    steps = [given["attention_mask"] for given in inputs if given["input_ids"].shape[1] == 1]
    assert {int(mask[0].sum()) - 1 for mask in steps} == {1, ROOM // 2, ROOM - 1}


def no_polygraphy_needed() -> Any:
    """As where Polygraphy is installed."""
    return mock.patch.object(verify, "require")


@pytest.mark.parametrize(("fault", "code"), [("heads", "engine-differs"), ("", "")])
def test_a_check_that_breaks_off_has_failed_where_something_differed(
    fault: str, code: str, tmp_path: Path
) -> None:
    engine, progress = altered(decoder_engine(tmp_path), fault=fault), mock.Mock(wraps=QUIET)
    broken = mock.Mock(side_effect=BackendError("no memory"))
    with stand_in(), mock.patch.object(verify, "TensorRtDecoder", broken):
        with raises(EngineError, code) if code else contextlib.nullcontext():
            for _ in range(2):  # it is tried once
                verify.believed(find_engines(engine), progress=progress)
        assert (check_or_none(engine) is None) == (not fault)
    assert progress.say.called == (not fault)
    assert broken.call_count == 1


def check_or_none(engine: Path) -> EngineCheck | None:
    return EngineRecord.read(sidecar_path(engine)).check


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_a_check_on_another_card_counts_only_where_it_failed(error: float, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    (tmp_path / "model.onnx").rename(tmp_path / "elsewhere.bin")
    check = EngineCheck(card="another", worst="x", error=error, tolerance=0.5)
    record = EngineRecord.read(sidecar_path(engine)).model_copy(update={"check": check})
    record.write(sidecar_path(engine))
    with stand_in(), raises(EngineError, "engine-differs") if error else contextlib.nullcontext():
        assert verify.believed(find_engines(engine)).records[0].check is None


def test_a_comparison_says_which_engine_was_not_checked(tmp_path: Path) -> None:
    engine, progress = decoder_engine(tmp_path, in_place=False), mock.Mock(wraps=QUIET)
    (tmp_path / "model.onnx").rename(tmp_path / "elsewhere.bin")
    names = same_kind(engine, engine)
    with stand_in():
        open_arms(names, SHORT, threads=1, progress=progress)
    assert any("not checked" in call.args[0] for call in progress.say.call_args_list)


@pytest.mark.parametrize("ranges", [
    Ranges(batch=Span(1, 1, 1), prompt=Span(1, 4, 16), context=Span(8, 8, 8)),
    Ranges(batch=Span(1, 1, 2), prompt=Span(1, 2, 3), context=Span(1, 4, 16)),
    Ranges(batch=Span(1, 1, 1), prompt=Span(1, 4, 16), context=Span(0, 0, 0)),
], ids=["one-context", "short-prompts", "no-context"])  # fmt: skip
@pytest.mark.parametrize("ends", [("logits",), ()], ids=["logits", "no-logits"])
def test_engines_for_narrow_ranges_are_checked(
    ranges: Ranges, ends: tuple[str, ...], tmp_path: Path
) -> None:
    model = decoder_model()
    if not ends:
        model.graph.outputs[:] = [v for v in model.graph.outputs if v.name != "logits"]
    onnx = saved(model, tmp_path)
    engine = write_engine(onnx, tmp_path / "m.engine", ["prefill", "decode"], ranges)
    with stand_in():
        engines, results = verify.verify_engines(find_engines(engine), onnx, threads=1)
    assert check_of(engines).passed
    texts = [item.run for item in results if item.run.startswith("a text")]
    high = ranges.context.high if ranges.context else 0
    assert bool(texts) == (bool(ends) and high > 0)


def test_what_stands_beside_engines_and_is_no_graph_is_passed_over(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path / "engines" / "m")
    moved = engine.with_name("model.onnx").rename(tmp_path / "engines" / "right.onnx")
    for data in engine.parent.glob("*.data*"):
        data.rename(tmp_path / "engines" / data.name)
    (engine.parent / "model.onnx").mkdir()
    (engine.parent / "dangling.onnx").symlink_to(tmp_path / "nowhere")
    (engine.parent / "broken.onnx").write_bytes(b"no graph")
    os.mkfifo(engine.parent / "pipe.onnx")
    assert verify.source_of(find_engines(engine)) == moved


def test_an_engine_of_any_name_with_a_record_is_opened(tmp_path: Path) -> None:
    onnx = decoder_onnx(tmp_path, in_place=True)
    engine = write_engine(onnx, tmp_path / "m.trt", ["prefill", "decode"], DECODER)
    assert isinstance(open_decoder(engine), TensorRtDecoder)


def test_a_length_that_an_engine_fixes_is_refused_before_it_is_checked(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    with stand_in() as machine, raises(UsageError, "unsupported-option"):
        open_decoder(engine, context=8)
    assert not machine.runs


def test_no_number_is_an_infinite_difference_that_is_kept(tmp_path: Path) -> None:
    engines, results = checked(llama(tmp_path, "fp32", 16), "nan")
    assert max(item.error for item in results) == float("inf")
    assert check_of(engines).error == float("inf")
    assert not check_of(engines).passed


def test_a_package_of_an_engine_that_differs_is_refused(tmp_path: Path) -> None:
    check = EngineCheck(card="a card", worst="x", error=1.0, tolerance=0.5)
    engine = written(tmp_path, check=check, backend="tensorrt")
    with raises(EngineError, "engine-differs", "a card"):
        package_triton(engine, tmp_path / "models", name="m")


def test_an_engine_of_another_graph_is_refused(tmp_path: Path) -> None:
    other = saved(tiny_model(TinySpec(layers=1)), tmp_path / "other")
    with raises(EngineError, "not-built-from", other):
        verify.verify_engines(find_engines(decoder_engine(tmp_path)), other)
