"""How large models are verified: with little memory, said so, and never beyond what is free."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from test_verification import wrong_layer  # noqa: F401

import exporter.cli as command_line
from exporter import processes
from exporter.artifacts import PlannedDeletion, PruneReport
from exporter.cut import verify as oracle_setting
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import TooLittleMemoryError, VerificationError
from exporter.option_types import size
from graph_passes.files import storage
from graph_passes.files.storage import load_model, save_model
from tests.llama_shaped import LlamaShape, write_llama
from tests.raising import raises
from tests.reading import in_file
from tests.tiny_graphs import TinySpec, tiny_model

CUT = [PlannedDeletion(layer=1, kind="attention")]
GIGABYTE = 10**9


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "model.onnx"
    save_model(tiny_model(), path)
    return path


@pytest.fixture
def half_precision(tmp_path: Path) -> Path:
    shape = LlamaShape(
        layers=3, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=500,
    )  # fmt: skip
    return write_llama(tmp_path / "half" / "model.onnx", shape, noise=0.2)


def _free(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(oracle_setting, "available_bytes", lambda: count)


def test_a_small_model_is_verified_in_full(source: Path, tmp_path: Path) -> None:
    verification = prune_file(source, tmp_path / "o" / "m.onnx", CUT).verification
    assert verification.runs == 2
    assert "cheaper" not in verification.method


def test_above_the_limit_the_cheaper_setting_is_told(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "o" / "m.onnx"
    verification = prune_file(source, target, CUT, CutOptions(verify_limit_bytes=0)).verification
    assert verification.passed is True
    assert verification.runs == 1
    assert verification.max_abs_error == 0.0
    assert "decode; cheaper setting" in verification.method
    assert "more than the limit of 0 MB" in verification.method
    assert PruneReport.read(target.with_name("prune.json")).verification == verification


@pytest.mark.usefixtures("wrong_layer")
def test_a_wrong_cut_is_caught_at_the_cheaper_setting(tmp_path: Path) -> None:
    source = tmp_path / "encoder.onnx"
    save_model(tiny_model(TinySpec(cache=False)), source)
    with raises(VerificationError, "wrong-results"):
        prune_file(source, tmp_path / "o" / "m.onnx", CUT, CutOptions(verify_limit_bytes=0))
    assert not (tmp_path / "o").exists()


def test_half_precision_is_verified_at_the_cheaper_setting(
    half_precision: Path, tmp_path: Path
) -> None:
    target = tmp_path / "o" / "m.onnx"
    verification = prune_file(
        half_precision, target, CUT, CutOptions(verify_limit_bytes=0)
    ).verification
    assert verification.passed is True
    assert verification.max_abs_error == 0.0


def test_too_little_memory_for_the_full_check_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, (256 << 20) + 4000)
    verification = prune_file(source, tmp_path / "o" / "m.onnx", CUT).verification
    assert verification.passed is True
    assert "of memory, 268 MB are free" in verification.method


def test_too_little_memory_for_any_check_is_told_before_it_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, 10_000_000)
    with raises(TooLittleMemoryError, "", "--verify none"):
        prune_file(source, tmp_path / "o" / "m.onnx", CUT)
    assert not (tmp_path / "o").exists()
    assert prune_file(source, tmp_path / "o" / "m.onnx", CUT, CutOptions(verify="none"))


def test_where_the_system_says_nothing_the_limit_decides(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, None)
    model = load_model(source)
    assert not oracle_setting.thrifty_because(model, GIGABYTE)
    assert oracle_setting.thrifty_because(model, 0)


def test_half_precision_takes_twice_its_size_and_a_file_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LlamaShape(layers=4)
    try:
        model = load_model(write_llama(tmp_path / "model.onnx", shape))
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values())  # type: ignore[union-attr]
    _free(monkeypatch, 2 * total)
    assert oracle_setting.thrifty_because(model, 10 * total)
    _free(monkeypatch, 3 * total)
    assert not oracle_setting.thrifty_because(model, 10 * total)
    _free(monkeypatch, 3 * GIGABYTE)  # the embedding in fp32, twice, is 2.1 GB
    assert oracle_setting.thrifty_because(model, 0)
    _free(monkeypatch, 2 * GIGABYTE)
    with raises(TooLittleMemoryError):
        oracle_setting.thrifty_because(model, 0)


_WATCHED = """
import sys, threading, time
from pathlib import Path
import onnxruntime
from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while not done:
        peaks.append(own())
        time.sleep(0.001)

source, target, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
done, peaks = False, [own()]
watcher = threading.Thread(target=watch)
watcher.start()
cut = [PlannedDeletion(layer=1, kind="attention")]
passed = prune_file(source, target, cut, CutOptions(verify_limit_bytes=limit)).verification.passed
done = True
watcher.join()
print(passed, max(peaks) - peaks[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's counts")
def test_the_cheaper_setting_keeps_weights_out_of_memory(tmp_path: Path) -> None:
    """Counts memory that isn't a file's: what a model larger than the memory could not have."""
    shape = LlamaShape(
        layers=2, hidden=1024, heads=8, kv_heads=8, intermediate=2048, vocabulary=1000,
        dtype=ir.DataType.FLOAT,
    )  # fmt: skip
    source = write_llama(tmp_path / "model.onnx", shape, noise=0.02)
    size = source.with_name("model.onnx.data").stat().st_size
    assert size > 80e6
    taken = []
    for limit in (10 * size, 0):
        target = tmp_path / str(limit) / "m.onnx"
        command = [sys.executable, "-c", _WATCHED, str(source), str(target), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        passed, peak = done.stdout.split()
        assert passed == "True"
        taken.append(int(peak))
    in_full, thrifty = taken
    assert in_full - thrifty > 0.6 * size
    assert thrifty < 0.7 * size  # what is imported on the way takes 45 MB


def test_the_command_takes_a_limit(source: Path, tmp_path: Path, capsys: object) -> None:
    target = tmp_path / "o" / "m.onnx"
    call = ["prune", str(source), "-o", str(target), "--drop", "mlp:1"]
    assert command_line.run([*call, *in_file(tmp_path, ["verify_limit: 1 KB"])]) == 0
    out, err = capsys.readouterr()  # type: ignore[attr-defined]
    assert "verifying at a cheaper setting" in err
    assert "oracle at the cheaper setting, max error" in out + err
    assert (
        "limit of 0.001 MB" in PruneReport.read(target.with_name("prune.json")).verification.method
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 << 30), ("0", 0), ("1.5k", 1500)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 elephants", "1e9"])
def test_what_is_no_size_is_told(source: Path, tmp_path: Path, text: str) -> None:
    call = ["prune", str(source), "-o", str(tmp_path / "m.onnx"), "--drop", "mlp:1"]
    assert command_line.run([*call, *in_file(tmp_path, [f"verify_limit: {text!r}"])]) == 2


def test_free_memory_is_below_what_the_machine_has() -> None:
    free = processes.available_bytes()
    if not sys.platform.startswith("linux"):
        assert free is None
        return
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CGROUP", tmp_path)
    whole = processes.available_bytes()
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 400\n")
    assert processes.available_bytes() == 2400
    (tmp_path / "memory.max").write_text("max\n")
    assert processes.available_bytes() == pytest.approx(whole, rel=0.5)
