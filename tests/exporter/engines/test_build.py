"""Real builds with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.cli import run
from exporter.engines.build import build, libraries
from exporter.engines.build.build import build_engines
from exporter.engines.build.check import check_engine
from exporter.engines.build.engine_set import read_sidecar, sidecar_path
from exporter.engines.build.libraries import Driver
from exporter.engines.build.profiles import Ranges, Span, read_source
from exporter.engines.build.settings import BuildSettings
from exporter.errors import DepthcutError, EngineError, UsageError
from graph_passes import Deletion, prune_graph, save_model
from tests.raising import raises
from tests.reading import in_file
from tests.tiny_graphs import TinySpec, tiny_model
from tests.tiny_models import into_cache

pytestmark = pytest.mark.rtx

SM89 = BuildSettings(compute_capabilities=("sm89",))
SMALL = Ranges(prompt=Span(1, 4, 8), context=Span(1, 4, 8))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny decoder, and the same without half of its attentions."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(TinySpec(layers=4))
    pruned, _ = prune_graph(model, [Deletion(1, "attention"), Deletion(2, "attention")])
    for name, graph in (("whole", model), ("cut", pruned)):
        save_model(graph, folder / f"{name}.onnx")
    return folder / "whole.onnx", folder / "cut.onnx"


@pytest.fixture(scope="module")
def engines(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("engines")
    return [
        build_engines(model, folder, phases=["decode"], ranges=SMALL, settings=SM89)[0][0]
        for model in models
    ]


def test_the_name_says_what_an_engine_is(engines: list[Path]) -> None:
    whole, cut = (path.name.rpartition("-rtx")[0] for path in engines)
    assert (whole, cut) == ("whole-fp32-decode-sm89", "cut-attn2-fp32-decode-sm89")


def test_the_cut_engine_is_smaller_and_has_fewer_layers(engines: list[Path]) -> None:
    whole, cut = map(read_sidecar, engines)
    assert sum(cut.layers.values()) < sum(whole.layers.values())
    assert cut.engine_bytes < whole.engine_bytes
    assert cut.network_layers < whole.network_layers
    assert [entry["layer"] for entry in cut.plan] == [1, 2]
    assert whole.plan == []


def test_the_record_tells_profiles_and_tensors(engines: list[Path]) -> None:
    record = read_sidecar(engines[1])
    assert [entry.phase for entry in record.profiles] == ["decode"]
    assert record.profiles[0].shapes["attention_mask"].high == (1, 9)
    assert "past_key_values.1.key" not in [tensor.name for tensor in record.inputs]
    assert record.outputs[0].name == "logits"
    assert record.memory_bytes["weights"] > 0
    assert set(record.made_from) == {"model"}


def test_builds_come_out_the_same_as_a_rule(
    models: tuple[Path, Path], engines: list[Path], tmp_path: Path
) -> None:
    """Of three at least two; one in some hundreds was seen to differ, with the same layers."""
    hashes = {read_sidecar(engines[0]).engine_sha256}
    for number in range(2):
        target = tmp_path / f"{number}.engine"
        ((_, record),) = build_engines(
            models[0], target, phases=["decode"], ranges=SMALL, settings=SM89
        )
        assert record.fixed_addresses
        hashes.add(record.engine_sha256)
    assert len(hashes) < 3


def test_split_gives_an_engine_for_each_phase(models: tuple[Path, Path], tmp_path: Path) -> None:
    built = build_engines(models[1], tmp_path / "m.engine", split=True, ranges=SMALL, settings=SM89)
    assert [path.name for path, _ in built] == ["m-prefill.engine", "m-decode.engine"]
    assert all(sidecar_path(path).is_file() for path, _ in built)


def test_several_builds_are_numbered(models: tuple[Path, Path], tmp_path: Path) -> None:
    given = build_engines(
        models[1], tmp_path / "m.engine", phases=["decode"], builds=2, ranges=SMALL, settings=SM89
    )
    assert [path.name for path, _ in given] == ["m-b1.engine", "m-b2.engine"]
    assert all(read_sidecar(path) == record for path, record in given)
    assert given[0][1].layers == given[1][1].layers


def test_a_graph_that_does_not_parse_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    model = tiny_model(TinySpec())
    strange = next(node for node in model.graph if node.op_type == "Softmax")
    strange.domain, strange.op_type = "com.example", "Odd"
    model.graph.opset_imports["com.example"] = 1
    save_model(model, path)
    with raises(EngineError, "not-parsed", "(Odd)"):
        build_engines(path, tmp_path / "out.engine", ranges=SMALL, settings=SM89)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bad.onnx"]
    engine = check_engine(path)
    assert len(engine.findings) == 1
    assert engine.findings[0].operator == "Odd"


@pytest.mark.parametrize(
    ("asked", "code", "named"),
    [
        ({"settings": BuildSettings(compute_capabilities=("sm90",))}, "unknown-card", "sm90 sm89"),
        ({"settings": SM89, "backend": "tensorrt"}, "unsupported-option", "--compute-capability"),
        ({"phases": ["decode", "decode"], "split": True}, "named-twice", "decode"),
        ({"settings": SM89, "ranges": Ranges(prompt=Span(1, 1, 1 << 31), context=Span(1, 4, 8))},
         "library-failed", "tensorrt-rtx inconsistent"),
        ({"backend": "tensorrt"}, "no-driver", "tensorrt tensorrt-rtx"),
    ],
)  # fmt: skip
def test_what_can_t_be_built_is_refused_and_leaves_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any], code: str, named: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(libraries, "ask_driver", lambda: Driver("no NVIDIA driver"))
    with raises(DepthcutError, code) as caught:
        build_engines(models[0], tmp_path, **asked)
    text = f"{caught.value.message} {caught.value.hint}"
    assert all(part in text for part in named.split())
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_the_source_is_refused_before_the_build(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "run_job", lambda *_: pytest.fail("it was built all the same"))
    with raises(UsageError, "overwrites-input"):
        build_engines(models[0], models[0], phases=["decode"], ranges=SMALL, settings=SM89)


def test_a_file_of_a_hub_cache_is_read_where_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    ir.save(
        tiny_model(TinySpec()), source / "model.onnx", external_data="m.data",
        size_threshold_bytes=0,
    )  # fmt: skip
    path = into_cache(source, tmp_path / "hub", subfolder="tiny") / "model.onnx"
    assert check_engine(path).findings == ()
    built = build_engines(path, tmp_path / "out", phases=["decode"], ranges=SMALL, settings=SM89)
    assert set(built[0][1].made_from) == {"model", "weights"}
    assert built[0][0].name.startswith("tiny-fp32-")


def test_nothing_of_the_current_folder_is_run(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "numpy", "onnx", "hashlib"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    assert check_engine(models[0]).findings == ()


def test_the_command_prints_one_json_document(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt-range=1:4:8", "--context-range=1:4:8", "--compute-capability= sm89, sm89"]
    call = ["build", str(models[1]), "-o", str(tmp_path), "--json", *sizes]
    assert run([*call, "--profile", "decode"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["settings"]["compute_capabilities"] == ["sm89"]
    assert run([*call, "--split"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [item["profiles"][0]["phase"] for item in both] == ["prefill", "decode"]


@pytest.mark.parametrize(
    "options",
    [
        ["--profile", ","],
        ["--compute-capability", ","],
        ["workspace: 0"],
        ["workspace: 99999999TB"],
        ["dim: nosuch=3"],
    ],
)
def test_options_that_make_no_sense_are_wrong_calls(
    options: list[str], models: tuple[Path, Path], tmp_path: Path
) -> None:
    sound = ["build", str(models[0]), "-o", str(tmp_path / "e")]
    assert run([*sound, *in_file(tmp_path, options)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_build_that_fails_is_not_called_done(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["build", str(models[0]), "-o", str(tmp_path), "--compute-capability"]
    assert run([*call, "sm90"]) == 2
    printed = capsys.readouterr().err
    assert re.search(
        r"^build (prefill and decode|encode) with tensorrt-rtx \.\.\.$", printed, re.MULTILINE
    )
    assert "done" not in printed


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_leaves_no_builder_behind(
    end: signal.Signals, models: tuple[Path, Path], tmp_path: Path
) -> None:
    # A bar of the builder's own: it tells its process and never ends.
    script = (
        "import sys, exporter.engines.build.child as child, exporter.cli as c\n"
        "child.WORKER = ('-c', 'import exporter.processes as c, os, sys, time;'\n"
        '  \'c.end_with_parent(int(sys.argv[1])); print(os.getpid(), file=open("pid", "w"));\'\n'
        '  \'os.rename("pid", "started"); time.sleep(60)\')\n'
        "sys.exit(c.run(sys.argv[1:]))\n"
    )
    call = ["build", str(models[0]), "-o", "out/m.engine", "--prompt-range", "1:4:8"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", script, *call], cwd=tmp_path, env=env)
    started = tmp_path / "started"
    waited(started.exists)
    builder = Path("/proc", started.read_text().strip())
    caller.send_signal(end)
    assert caller.wait(30) == (-end if end == signal.SIGKILL else 130)
    waited(lambda: not builder.exists() or "Z" in (builder / "stat").read_text().split()[2])
    if end != signal.SIGKILL:
        assert sorted(item.name for item in tmp_path.iterdir()) == ["started"]


def waited(ready: Callable[[], bool]) -> None:
    """Waits for something that comes soon."""
    until = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_sound_and_an_unsound_graph_end_with_0_and_1(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check-engine", str(models[0])]) == 0
    assert "parses the whole graph" in capsys.readouterr().out
    model = tiny_model(TinySpec())
    for node in model.graph:
        if node.op_type == "Softmax":
            node.domain, node.op_type, node.name = "com.microsoft", "Odd", None
    model.graph.opset_imports["com.microsoft"] = 1
    save_model(model, tmp_path / "bad.onnx")
    assert run(["check-engine", str(tmp_path / "bad.onnx"), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert len(findings) == TinySpec().layers
    assert all("an operator of ONNX Runtime" in finding["way_out"] for finding in findings)
    assert all(finding["node"].startswith("number ") for finding in findings)


def test_a_foreign_operator_that_the_parser_knows_is_not_called_unknown(tmp_path: Path) -> None:
    model = tiny_model(TinySpec(layers=3))
    names = iter(["Odd", "Odd", "MatMulNBits"])  # the parser stops at the first
    for node in model.graph:
        if node.op_type == "Softmax":
            node.domain, node.op_type = "com.microsoft", next(names)
    model.graph.opset_imports["com.microsoft"] = 1
    save_model(model, tmp_path / "m.onnx")
    assert [finding.operator for finding in check_engine(tmp_path / "m.onnx").findings] == [
        "Odd",
        "Odd",
    ]


def test_a_record_that_is_none_does_not_stop_a_check(tmp_path: Path) -> None:
    model = tiny_model(TinySpec())
    model.metadata_props["depthcut.plan"] = "[{}]"
    save_model(model, tmp_path / "m.onnx")
    assert read_source(tmp_path / "m.onnx").plan == []


def test_the_precision_is_the_graphs_own(tmp_path: Path) -> None:
    model = tiny_model(TinySpec())
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            half = value.const_value.numpy().clip(-6e4, 6e4).astype("float16")
            value.const_value = ir.tensor(half, name=value.name)
    save_model(model, tmp_path / "half.onnx")
    assert read_source(tmp_path / "half.onnx").precision == "fp16"
