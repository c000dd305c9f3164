"""Real builds with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PruneReport
from exporter.cli import run
from exporter.compare import kinds as engine_arm
from exporter.compare.session import compare
from exporter.engines.build import build, child, libraries
from exporter.engines.build.build import build_engines
from exporter.engines.build.check import check_engine
from exporter.engines.build.engine_set import EngineRecord, find_engines, read_sidecar, sidecar_path
from exporter.engines.build.libraries import Driver
from exporter.engines.build.logs import no_engine
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs, read_source
from exporter.engines.build.settings import BuildSettings, Phase, Profile, ShapeRange
from exporter.engines.build.worker import Builder
from exporter.errors import DepthcutError, EngineError, UsageError
from graph_passes import Deletion, prune_graph
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass
from tests.engine_support import SHORT, SM89, SMALL
from tests.forked import ends, start
from tests.graph_passes.decoder_graphs import DecoderSpec, decoder_model
from tests.raising import raises
from tests.reading import in_file
from tests.tiny_graphs import TinySpec, attention_in_place, saved, tiny_model
from tests.tiny_models import into_cache

pytestmark = pytest.mark.rtx

CUT = [Deletion(1, "attention"), Deletion(2, "attention")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny decoder, and the same without half of its attentions."""
    folder, model = tmp_path_factory.mktemp("models"), tiny_model(TinySpec(layers=4))
    cut = prune_graph(model, CUT)[0]
    return saved(model, folder, "whole.onnx"), saved(cut, folder, "cut.onnx")


@pytest.fixture(scope="module")
def engines(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("engines")
    return [
        build_engines(model, folder, phases=["decode"], ranges=SMALL, settings=SM89)[0][0]
        for model in models
    ]


def test_the_cut_engine_is_smaller_and_its_record_tells_what_it_is(engines: list[Path]) -> None:
    names = [path.name.rpartition("-rtx")[0] for path in engines]
    assert names == ["whole-fp32-decode-sm89", "cut-attn2-fp32-decode-sm89"]
    whole, cut = map(read_sidecar, engines)
    assert sum(cut.layers.values()) < sum(whole.layers.values())
    assert cut.engine_bytes < whole.engine_bytes
    assert cut.network_layers < whole.network_layers
    assert [entry["layer"] for entry in cut.plan] == [1, 2]
    assert whole.plan == []
    assert [entry.phase for entry in cut.profiles] == ["decode"]
    assert cut.profiles[0].shapes["attention_mask"].high == (1, 9)
    assert "past_key_values.1.key" not in [tensor.name for tensor in cut.inputs]
    assert cut.outputs[0].name == "logits"
    assert cut.memory_bytes["weights"] > 0
    assert set(cut.made_from) == {"model"}


def test_builds_come_out_the_same_as_a_rule(
    models: tuple[Path, Path], engines: list[Path], tmp_path: Path
) -> None:
    """Of three at least two; one in some hundreds was seen to differ, with the same layers."""
    given = build_engines(
        models[0], tmp_path / "m.engine", phases=["decode"], builds=2, ranges=SMALL, settings=SM89
    )
    assert [path.name for path, _ in given] == ["m-b1.engine", "m-b2.engine"]
    assert all(read_sidecar(path) == record for path, record in given)
    records = [read_sidecar(engines[0]), *(record for _, record in given)]
    assert all(record.fixed_addresses for record in records)
    assert len({str(record.layers) for record in records}) == 1
    assert len({record.engine_sha256 for record in records}) < 3


def odd(names: str, domain: str, **spec: Any) -> ir.Model:
    """A model whose softmaxes are other operators."""
    model, given = tiny_model(TinySpec(**spec)), iter(names.split())
    for node in model.graph:
        if node.op_type == "Softmax" and (name := next(given, "")):
            node.domain, node.op_type, node.name = domain, name, None
    model.graph.opset_imports[domain] = 1
    return model


def test_a_graph_that_does_not_parse_leaves_nothing(tmp_path: Path) -> None:
    path = saved(odd("Odd", "com.example"), tmp_path, "bad.onnx")
    with raises(EngineError, "not-parsed", "(Odd)"):
        build_engines(path, tmp_path / "out.engine", ranges=SMALL, settings=SM89)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bad.onnx"]
    (reason,) = check_engine(path).reasons
    assert "number " in reason
    assert "(Odd)" in reason


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ({"settings": BuildSettings(compute_capabilities=("sm90",))}, "other-card", "sm90 sm89"),
        ({"settings": SM89, "backend": "tensorrt"}, "unsupported-option", "--compute-capability"),
        ({"phases": ["decode", "decode"], "split": True}, "named-twice", "decode"),
        ({"settings": SM89, "ranges": Ranges(prompt=Span(1, 1, 1 << 31), context=Span(1, 4, 8))},
         "library-failed", "tensorrt-rtx inconsistent"),
        ({"backend": "tensorrt"}, "no-driver", "tensorrt tensorrt-rtx"),
        ({"ranges": SMALL, "settings": BuildSettings(workspace_bytes=1)}, "no-engine-made",
         "workspace"),
    ],
)  # fmt: skip
def test_what_can_t_be_built_is_refused_and_leaves_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any], code: str, named: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(libraries, "ask_driver", lambda: Driver("no NVIDIA driver"))
    with raises(DepthcutError, code, *named.split()):
        build_engines(models[0], tmp_path, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_the_source_is_refused_before_the_build(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "run_job", lambda *_: pytest.fail("it was built all the same"))
    with raises(UsageError, "overwrites-input"):
        build_engines(models[0], models[0], phases=["decode"], ranges=SMALL, settings=SM89)


def test_a_file_of_a_hub_cache_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    ir.save(
        tiny_model(), tmp_path / "source" / "model.onnx", external_data="m.data",
        size_threshold_bytes=0,
    )  # fmt: skip
    path = into_cache(tmp_path / "source", tmp_path / "hub", subfolder="tiny") / "model.onnx"
    assert check_engine(path).parsed
    built = build_engines(path, tmp_path / "out", phases=["decode"], ranges=SMALL, settings=SM89)
    assert set(built[0][1].made_from) == {"model", "weights"}
    assert built[0][0].name.startswith("tiny-fp32-")


def test_nothing_of_the_current_folder_is_run(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "numpy", "onnx", "hashlib"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    assert check_engine(models[0]).parsed


def test_the_command_prints_one_json_document(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt-range=1:4:8", "--context-range=1:4:8", "--compute-capability= sm89, sm89"]
    call = ["build", str(models[1]), "-o", str(tmp_path / "m.engine"), "--json", *sizes]
    assert run([*call, "--profile", "decode"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["settings"]["compute_capabilities"] == ["sm89"]
    assert run([*call, "--split"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [item["profiles"][0]["phase"] for item in both] == ["prefill", "decode"]
    for phase in ("prefill", "decode"):
        assert sidecar_path(tmp_path / f"m-{phase}.engine").is_file()


@pytest.mark.parametrize(
    "options",
    [
        ["--profile", ","],
        ["--compute-capability", ","],
        ["--compute-capability", "sm90"],
        ["workspace: 0"],
        ["workspace: 99999999TB"],
        ["dim: nosuch=3"],
    ],
)
def test_options_that_make_no_sense_are_wrong_calls(
    options: list[str], models: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sound = ["build", str(models[0]), "-o", str(tmp_path / "e")]
    assert run([*sound, *in_file(tmp_path, options)]) == 2
    assert "done" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_leaves_no_builder_behind(
    end: signal.Signals, models: tuple[Path, Path], tmp_path: Path
) -> None:
    def build_endlessly() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's processes take none
        # Instead of a builder: what tells its process and never ends.
        child.WORKER = (
            "-c", "import exporter.processes as c, os, sys, time;"
            'c.end_with_parent(int(sys.argv[1])); print(os.getpid(), file=open("pid", "w"));'
            'os.rename("pid", "started"); time.sleep(60)',
        )  # fmt: skip
        return run(["build", str(models[0]), "-o", "out/m.engine", "--prompt-range", "1:4:8"])

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    caller = start(build_endlessly, tmp_path, (tmp_path / "printed",) * 2, env)
    started = tmp_path / "started"
    waited(started.exists)
    builder = Path("/proc", started.read_text().strip())
    os.kill(caller, end)
    assert ends(caller, 30)
    code = os.waitstatus_to_exitcode(os.waitpid(caller, 0)[1])
    assert code == (-end if end == signal.SIGKILL else 130)
    waited(lambda: not builder.exists() or "Z" in (builder / "stat").read_text().split()[2])
    if end != signal.SIGKILL:
        assert sorted(item.name for item in tmp_path.iterdir()) == ["printed", "started"]


def waited(ready: Callable[[], bool]) -> None:
    """Waits for something that comes soon."""
    until = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_source_tells_its_precision_and_a_record_that_is_none_does_not_stop_it(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    model.metadata_props["depthcut.plan"] = "[{}]"
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            half = value.const_value.numpy().clip(-6e4, 6e4).astype("float16")
            value.const_value = ir.tensor(half, name=value.name)
    source = read_source(saved(model, tmp_path))
    assert (source.precision, source.plan) == ("fp16", [])


ATTENTION = """
<ir_version: 10, opset_import: ["": 23]>
m (float[1, 2, s, 32] q, float[1, 2, s, 32] k, float[1, 2, s, 32] v) => (float[1, 2, s, 32] y) {
    y = Attention(q, k, v)
}
"""
FILLED = """
<ir_version: 10, opset_import: ["": 24]>
m (float[1, 2, 1, 32] q, float[1, 2, 8, 32] k, float[1, 2, 8, 32] v, int64[1] n)
    => (float[1, 2, 1, 32] y, int64[1] m) {
    y = Attention(q, k, v, , , , n)
    m = Identity(n)
}
"""


def own_profile(onnx: Path, phase: Phase, **sizes: Span) -> Profile:
    """A profile of a part of a model, whose free axes have names of their own."""
    shapes = {}
    for spec in graph_inputs(onnx):
        spans = [sizes.get(str(size)) or Span(*[int(str(size))] * 3) for size in spec.shape]
        low, usual, high = zip(*((span.low, span.usual, span.high) for span in spans), strict=True)
        shapes[spec.name] = ShapeRange(low=low, usual=usual, high=high)
    return Profile(phase=phase, shapes=shapes)


def test_attention_in_fp32_is_written_out(tmp_path: Path) -> None:
    path = saved(ir.from_onnx_text(ATTENTION), tmp_path)
    before, profiles = path.read_bytes(), [own_profile(path, "encode", s=Span(1, 4, 8))]
    ((engine, record),) = build_engines(path, tmp_path / "out", profiles=profiles)
    assert engine.is_file()
    assert sum(record.layers.values()) >= 1
    assert path.read_bytes() == before


def test_without_leave_the_builder_refuses_it(tmp_path: Path) -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    builder = Builder(tensorrt_rtx)
    network, obstacles = builder.parse(saved(ir.from_onnx_text(ATTENTION), tmp_path))
    assert not obstacles
    config = builder.builder.create_builder_config()
    profile = builder.builder.create_optimization_profile()
    for name in "qkv":
        profile.set_shape(name, (1, 2, 1, 32), (1, 2, 4, 32), (1, 2, 8, 32))
    config.add_optimization_profile(profile)
    assert builder.builder.build_serialized_network(network, config) is None
    assert "Attention" in no_engine(builder.listener.errors).message


def test_what_the_parser_would_pass_over_is_refused(tmp_path: Path) -> None:
    path = saved(ir.from_onnx_text(FILLED), tmp_path)
    (reason,) = check_engine(path).reasons
    assert "nonpad_kv_seqlen" in reason
    with raises(EngineError, "not-parsed", "nonpad_kv_seqlen"):
        build_engines(path, tmp_path / "out")
    whole = ir.from_onnx_text(FILLED.replace(", , , , n)", ")"))
    assert check_engine(saved(whole, tmp_path / "whole")).parsed


@pytest.mark.parametrize("weights", ["compact", "share"])
def test_a_cut_asks_the_real_parser(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "m.onnx"
    ir.save(tiny_model(), source, external_data="m.data", size_threshold_bytes=0)
    call = ["prune", str(source), "-o", str(tmp_path / "cut.onnx"), "--drop", "attention:1"]
    assert run([*call, "--verify", "none", "--weights", weights, "--check-engine"]) == 0
    assert "parses it" in capsys.readouterr().out
    engine = PruneReport.read(tmp_path / "prune.json").engine
    assert engine is not None
    assert engine.parsed
    assert not [item for item in tmp_path.iterdir() if item.name.endswith(".part")]


ROOM = 1024
LARGE = Ranges(batch=Span(1, 64, 64), prompt=Span(1, 8, 16), context=Span(1, 512, ROOM - 1))
REPEATED_BYTES = 64 * 4 * ROOM * 32 * 4
"""Keys of one layer, written out for each of four query heads of 32 numbers, in float32."""


def in_place(room: int = ROOM, **spec: Any) -> ir.Model:
    model = decoder_model(DecoderSpec(**spec))
    CacheInPlacePass(room)(model)
    return model


def test_keys_that_are_repeated_take_memory(tmp_path: Path) -> None:
    grouped = decoder_model()
    GroupedAttentionPass()(grouped)
    scratch, forms = {}, {"repeated": decoder_model(), "grouped": grouped, "in place": in_place()}
    for form, model in forms.items():
        onnx = saved(model, tmp_path / form)
        ranges, out = fitting(graph_inputs(onnx), LARGE), tmp_path / form / "out"
        ((_, record),) = build_engines(onnx, out, phases=["decode"], split=False, ranges=ranges)
        scratch[form] = record.memory_bytes["activation"]
    assert scratch["repeated"] > REPEATED_BYTES
    assert max(scratch["grouped"], scratch["in place"]) < REPEATED_BYTES / 4


def test_in_place_both_phases_are_built_whole_and_cut(tmp_path: Path) -> None:
    onnx = saved(in_place(), tmp_path)
    with raises(UsageError, "unknown-axis", "--context-range"):  # the graph fixes it
        build_engines(onnx, tmp_path / "out", ranges=LARGE)
    cut = saved(prune_graph(in_place(), [Deletion(0, "attention")])[0], tmp_path / "cut")
    assert check_engine(cut).parsed
    records = []
    for path in (onnx, cut):
        target, ranges = path.with_name("m.engine"), fitting(graph_inputs(path), LARGE)
        ((engine, record),) = build_engines(path, target, split=False, ranges=ranges)
        assert engine == target
        assert [entry.phase for entry in record.profiles] == ["prefill", "decode"]
        assert (record.attention, record.logits) == ("room", "last")
        records.append(record)
    caches = [item.shape for item in records[0].inputs if "past" in item.name]
    assert caches == [(-1, 2, ROOM, 32)] * 4
    assert records[1].network_layers < records[0].network_layers


def test_of_caches_in_place_there_is_an_engine_for_each_phase(tmp_path: Path) -> None:
    ranges = Ranges(batch=Span(1, 32, 32), prompt=Span(1, 128, 128))
    built = build_engines(saved(in_place(256), tmp_path), tmp_path / "out", ranges=ranges)
    assert ["prefill" in path.name for path, _ in built] == [True, False]
    decode, prefill = find_engines(tmp_path / "out").records
    assert [item.attention for item in (decode, prefill)] == ["room", "new"]
    assert [item.logits for item in (decode, prefill)] == ["last", "last"]
    assert decode.layers["attention"] == 2  # one kernel for each layer's attention
    assert {output.name: output.shape for output in prefill.outputs}["logits"][1] == 1
    # Caches that grow are served by one.
    grown = saved(decoder_model(), tmp_path / "grown")
    ((_, record),) = build_engines(grown, tmp_path / "m.engine", ranges=Ranges(prompt=SMALL.prompt))
    assert [profile.phase for profile in record.profiles] == ["prefill", "decode"]
    assert (record.attention, record.logits) == (None, "last")


def built_alone(folder: Path, logits: Any) -> EngineRecord:
    """An engine for prompts of one attention."""
    onnx = saved(attention_in_place("float16", heads=8, kv_heads=2, size=64, room=256), folder)
    settings = BuildSettings(compute_capabilities=("sm89",), logits=logits)
    profiles = [own_profile(onnx, "prefill", batch=Span(1, 32, 32), sequence=Span(1, 128, 128))]
    target = folder / f"{logits}.engine"
    ((engine, record),) = build_engines(onnx, target, profiles=profiles, settings=settings)
    assert read_sidecar(engine).attention == record.attention
    return record


def test_a_prompt_alone_is_one_attention_and_a_scatter(tmp_path: Path) -> None:
    own, room = (built_alone(tmp_path, logits) for logits in ("last", "all"))
    assert [own.attention, room.attention] == ["new", "room"]
    assert own.layers == {"attention": 1, "kgen": 1}
    assert room.layers["kgen"] > 1
    assert own.memory_bytes["activation"] < 1e4 < room.memory_bytes["activation"]
    assert room.memory_bytes["activation"] >= 32 * 128 * 256 * 2  # the mask


def test_builds_are_told_beside_what_onnx_runtime_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_arm, "ask_driver", lambda: Driver("no NVIDIA driver"))
    whole, ranges = tiny_model(TinySpec(layers=4)), Ranges(Span(1, 1, 1), *[Span(1, 4, 16)] * 2)
    cut, _ = prune_graph(whole, CUT)
    for name, graph, builds in (("baseline", whole, 2), ("candidate", cut, 1)):
        build_engines(
            saved(graph, tmp_path / name), tmp_path / "engines" / name, builds=builds,
            phases=["prefill"], ranges=ranges, settings=SM89,
        )  # fmt: skip
    report = compare(tmp_path / "engines/baseline", tmp_path / "engines/candidate", SHORT)
    first, second = report.arms.baseline, report.arms.candidate
    assert [Path(engine.path).stem[-3:] for engine in first.engines] == ["-b1", "-b2"]
    assert first.backend == second.backend == "onnxruntime"
    smaller = max(engine.engine_bytes for engine in second.engines)
    assert all(engine.engine_bytes > smaller for engine in first.engines)
    assert {deletion.layer for deletion in report.plan} == {1, 2}
    assert len(report.latency) == 1
    assert report.accuracy is not None
