"""Drivers and libraries: what fits together, what `doctor` says, and which is asked first."""

from __future__ import annotations

import enum
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.cli import run
from exporter.engines import doctor
from exporter.engines.build import libraries, session
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.libraries import Device, Driver, ask_driver
from exporter.engines.build.session import validity_note
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import BackendError, EngineError, MissingDependencyError
from tests.engine_support import CARD, written_as
from tests.raising import raises

OLD, NEW = Driver("", "12.8", (CARD,)), Driver("", "13.0", (CARD,))
NONE = Driver("no NVIDIA driver")
HOPPER = Device("another", "sm90", 80 << 30)
no_driver = pytest.mark.skipif(not ask_driver().problem, reason="there is an NVIDIA driver")


def test_a_missing_library_is_a_missing_driver() -> None:
    assert ask_driver("libno_such_driver.so.1") == NONE
    assert "is no NVIDIA driver" in ask_driver("libc.so.6").problem


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs packages; there are no others."""
    lookup = functools.partial(metadata.Distribution.discover, path=[str(tmp_path)])
    monkeypatch.setattr(libraries, "_installed", lambda: [(one.name, one) for one in lookup()])

    def install(name: str, version: str, *needs: str) -> None:
        place = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        (place / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(libraries.metadata, "requires", lambda _: list(needs))

    return install


GPU = "onnxruntime-gpu"


@pytest.mark.parametrize(
    ("name", "version", "needs", "package", "cuda"),
    [
        ("tensorrt_cu13", "11.4.0.106", (), "tensorrt", 13),
        ("tensorrt-cu12", "10.16.1.11", (), "tensorrt", 12),
        ("tensorrt_rtx_cu13", "1.7.1.116", (), "tensorrt-rtx", 13),
        ("tensorrt_rtx_cu13", "1.7.1.116", (), "tensorrt", None),
        ("tensorrt_cu13_bindings", "11.4.0.106", (), "tensorrt", None),
        ("cuda-bindings", "12.9.10", (), "cuda-bindings", 12),
        ("onnxruntime", "1.32.0", (), GPU, None),
        (GPU, "1.31.1", ('nvidia-cuda-runtime~=13.0; extra == "cuda"',), GPU, 13),
        (GPU, "1.31.1", ('nvidia-cuda-runtime-cu12~=12.0; extra == "cuda"',), GPU, 12),
        (GPU, "1.31.1", ("numpy>=1.21.6",), GPU, None),
    ],
)
def test_packages_tell_their_cuda(
    name: str, version: str, needs: tuple[str, ...], package: str, cuda: int | None, packages: Any
) -> None:
    packages(name, version, *needs)
    assert libraries.built_for_cuda(package) == cuda
    known = cuda is not None or name == package
    assert libraries.version_of(package) == (version if known else None)


RTX = libraries.LIBRARIES["tensorrt-rtx"]


def test_a_driver_that_takes_an_older_cuda_is_refused_with_the_extra(
    packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_running = RTX.extra_cuda12, RTX.backend, libraries.BINDINGS
    packages("cuda-bindings", "13.5.0")
    with raises(BackendError, "no-driver", "cuda-bindings", "12.8", "13", "[rtx-cu12]"):
        libraries.refuse_old_driver(OLD, *for_running)
    libraries.refuse_old_driver(NEW, *for_running)
    packages("tensorrt-rtx-cu13", "1.7.1.116")
    with raises(BackendError, "no-driver", "tensorrt-rtx", "12.8"):
        libraries.refuse_old_driver(OLD, *for_running)
    packages("tensorrt-cu13", "11.4.0.106")
    monkeypatch.setattr(libraries, "ask_driver", lambda: OLD)
    with raises(BackendError, "no-driver", "tensorrt", "[gpu-cu12]"):
        libraries.refuse_unbuildable("tensorrt")
    libraries.refuse_unbuildable("tensorrt-rtx")  # it builds without one


@pytest.mark.parametrize(
    ("card", "backend"),
    [
        ("sm75", "tensorrt-rtx"), ("sm80", "tensorrt"), ("sm86", "tensorrt-rtx"),
        ("sm89", "tensorrt-rtx"), ("sm90", "tensorrt"), ("sm100", "tensorrt"),
        ("sm120", "tensorrt-rtx"), ("", "tensorrt-rtx"),
    ],
)  # fmt: skip
def test_the_library_that_serves_the_card_is_the_usual_one(
    card: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver("", "13.0", (Device("a card", card, 80 << 30),)) if card else NONE
    monkeypatch.setattr(libraries, "ask_driver", lambda: driver)
    assert libraries.usual_backend(None) == backend
    assert libraries.usual_backend("tensorrt-rtx") == "tensorrt-rtx"
    assert libraries.usual_backend(None, ["sm89"]) == "tensorrt-rtx"  # for a card elsewhere


@pytest.mark.parametrize(
    ("backend", "version", "fits"),
    [
        ("tensorrt", "10.14.1.48", False), ("tensorrt", "10.15.0.1", True),
        ("tensorrt", "11.0.0.12", True), ("tensorrt-rtx", "1.5.2.1", False),
        ("tensorrt-rtx", "1.6.0.1", True), ("tensorrt-rtx", "1.10.0.1", True),
    ],
)  # fmt: skip
def test_a_library_that_is_too_old_is_refused(
    backend: str, version: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runtime lacks calls that running an engine makes."""
    library = libraries.LIBRARIES[backend]
    installed = SimpleNamespace(__version__=version, __spec__=ModuleSpec(library.module, None))
    monkeypatch.setitem(sys.modules, library.module, installed)
    if fits:
        assert libraries.load(library) is installed
        return
    with raises(MissingDependencyError, "too-old", version, library.oldest):
        libraries.load(library)


_output_once = functools.cache(doctor._output_of)


@pytest.fixture(autouse=True)
def libraries_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each library, and not for each library in each test."""
    monkeypatch.setattr(doctor, "_output_of", _output_once)


def component(name: str) -> doctor.Component:
    return next(one for one in doctor.diagnose().components if one.name.strip() == name)


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these distributions were not installed."""
    version = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in names else version(name))


def test_a_machine_with_a_runtime_is_fit_and_one_without_is_told_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert component("CPUExecutionProvider").found == "loads"
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]
    missing(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    assert run(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "\nonnxruntime: pip install 'depthcut[cpu]'" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_libraries_that_do_not_load_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROVIDERS", "import os; os.abort()")
    diagnosis = doctor.diagnose()
    assert not diagnosis.fit
    assert any("does not load" in one.remedy for one in diagnosis.components)
    monkeypatch.setattr(doctor, "version_of", lambda _: "1.0")
    monkeypatch.setattr(doctor, "_output_of", lambda program: None if "rtx" in program else "")
    assert component("tensorrt").found == "1.0"
    assert component("tensorrt-rtx").found == ""
    assert "does not load" in component("tensorrt-rtx").remedy


def test_files_of_the_current_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "numpy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_output_of", _output_once.__wrapped__)
    assert doctor.diagnose().fit


def installed(monkeypatch: pytest.MonkeyPatch, **cuda: int) -> None:
    """As if these packages were installed alone, built for these versions of CUDA."""
    built = {name.replace("_", "-"): version for name, version in cuda.items()}
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0" if name in built else None)
    monkeypatch.setattr(libraries, "built_for_cuda", built.get)
    monkeypatch.setattr(doctor, "_output_of", lambda program: "")


def test_what_runs_engines_is_told_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "cuda-bindings")
    bindings = component("cuda-bindings")
    assert (bindings.found, bindings.remedy) == ("", "pip install 'depthcut[rtx]'")
    installed(monkeypatch, tensorrt=13, tensorrt_rtx=12, cuda_bindings=13, onnxruntime_gpu=13)
    monkeypatch.setattr(doctor, "ask_driver", lambda: OLD)
    for name in ("tensorrt", "cuda-bindings", "onnxruntime-gpu"):
        assert "CUDA 13" in component(name).remedy
        assert "[gpu-cu12]" in component(name).remedy
    assert component("tensorrt-rtx").remedy == ""
    monkeypatch.setattr(doctor, "ask_driver", lambda: Driver("", "13.0", (CARD, HOPPER)))
    assert component("tensorrt").remedy == ""
    assert component("NVIDIA driver").found == "CUDA 13.0"
    assert (component("a card").found, component("a card").remedy) == ("sm89, 24 GiB", "")
    assert "sm90" in component("another").remedy
    monkeypatch.setattr(doctor, "ask_driver", lambda: NONE)
    assert component("NVIDIA driver").remedy.startswith("no NVIDIA driver")


def test_health_on_a_gpu_needs_a_card_and_a_driver_that_is_new_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, onnxruntime_gpu=13, tensorrt=13)
    for driver, code in ((NEW, 0), (OLD, 1), (NONE, 1)):
        monkeypatch.setattr(doctor, "ask_driver", lambda driver=driver: driver)
        assert run(["doctor", "--health", "gpu"]) == code
    assert run(["doctor", "--health", "cpu"]) == 0
    assert "no NVIDIA driver" in capsys.readouterr().out
    missing(monkeypatch, "onnxruntime-gpu")
    assert run(["doctor", "--health", "cpu"]) == 1


def test_health_makes_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a GPU would disturb what is measured meanwhile."""
    programs: list[str] = []
    output = doctor._output_of
    monkeypatch.setattr(doctor, "_output_of", lambda text: programs.append(text) or output(text))
    assert doctor.health("cpu").fit
    doctor.health("gpu")
    assert programs == ["import onnxruntime"] * 2


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return written_as(tmp_path / "m.engine", phases=("prefill", "decode"))


# What must not have been imported where there is no driver.
_SCRIPT = """
import sys
from pathlib import Path
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import BackendError
try:
    open_engine(Path(sys.argv[1])).__enter__()
except BackendError as error:
    print(error.message)
print([name for name in sys.modules if name.partition(".")[0] in ("tensorrt_rtx", "cuda")])
"""


@no_driver
def test_without_a_driver_nothing_of_cuda_is_even_imported(engine: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, engine]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, imported = done.stdout.splitlines()
    assert said == f"{engine}: built, not run: no NVIDIA driver."
    assert imported == "[]"


@no_driver
def test_the_trial_s_process_asks_too(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller believes: what that process says reaches the user as one line."""
    monkeypatch.setattr(session, "refuse_unready", lambda _: None)
    with raises(EngineError, "no-driver", "m.engine") as caught:
        session.try_engines(find_engines(engine))
    assert "\n" not in caught.value.message


VERSION = SimpleNamespace(__version__="1.7.1.116")


@pytest.mark.parametrize(
    ("driver", "cuda", "library", "changes", "kind", "code", "named"),
    [
        (Driver("the NVIDIA driver finds no GPU"), None, None, {}, BackendError, "no-driver",
         ["finds no GPU"]),
        (OLD, 13, None, {}, BackendError, "no-driver", ["tensorrt-rtx", "12.8", "[rtx-cu12]"]),
        (Driver("", "13.0", (HOPPER,)), None, VERSION, {"backend_version": "1.6.1.120"},
         EngineError, "other-card", ["1.6.1.120", "sm90", "1.7.1.116"]),
        (Driver("", "13.0", (HOPPER,)), None, VERSION, {}, EngineError, "other-card",
         ["sm89", "sm90"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    driver: Driver, cuda: int | None, library: Any, changes: dict[str, Any], kind: Any, code: str,
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def load(_: object) -> Any:
        return library or pytest.fail("this must not be touched yet")

    monkeypatch.setattr(session, "ask_driver", lambda: driver)
    monkeypatch.setattr(libraries, "built_for_cuda", {"tensorrt-rtx": cuda}.get)
    monkeypatch.setattr(session, "load", load)
    monkeypatch.setattr(session, "run_job", lambda *_: pytest.fail("this must not be touched yet"))
    path = written_as(tmp_path / "m.engine", phases=("prefill", "decode"), **changes)
    with raises(kind, code, *named):
        open_engine(path).__enter__()


Flags = enum.IntFlag("Flags", "VERSION_MISMATCH UNSUPPORTED_CC INSUFFICIENT_GPU_MEMORY")
VALID, SUBOPTIMAL, INVALID = range(3)


class Library(SimpleNamespace):
    """Answers for an engine, and keeps what it was shown."""

    __name__, __version__ = "tensorrt_rtx", "1.7.1.116"
    engine_header_size = 4
    EngineValidity = SimpleNamespace(VALID=VALID, SUBOPTIMAL=SUBOPTIMAL)
    EngineInvalidityDiagnostics = Flags

    def get_engine_validity(self, header: bytes) -> Any:
        self.seen = header
        return self.answer


@pytest.mark.parametrize(
    ("validity", "flags", "code", "named"),
    [
        (VALID, 2, "", ()),
        (SUBOPTIMAL, 2, "", ("m.engine", "1.7.1.116", "UNSUPPORTED_CC")),
        (INVALID, 1, "invalid-engine", ("VERSION_MISMATCH",)),
        (INVALID, 4, "out-of-memory", ("INSUFFICIENT_GPU_MEMORY",)),
        (INVALID, 2 | 4, "invalid-engine", ("UNSUPPORTED_CC",)),  # no memory helps on such a card
        (INVALID, 0, "invalid-engine", ()),
    ],
)
def test_what_the_library_says_of_an_engine_s_first_bytes(
    validity: int, flags: int, code: str, named: tuple[str, ...], tmp_path: Path
) -> None:
    library: Any = Library(answer=(validity, flags))
    path = tmp_path / "m.engine"
    path.write_bytes(b"head and the rest")
    if code:
        with raises(EngineError, code, path, "1.7.1.116", *named):
            validity_note(library, library, path)
        return
    note = validity_note(library, library, path)
    assert all(word in note for word in named)
    assert bool(note) == bool(named)
    assert library.seen == b"head"  # and no more
    runtime: Any = SimpleNamespace(__name__="tensorrt")  # which has no such call
    assert not validity_note(runtime, runtime, tmp_path / "not-even-there.engine")


@pytest.mark.rtx
def test_the_real_library_has_what_is_believed_and_calls_other_bytes_malformed(
    tmp_path: Path,
) -> None:
    import tensorrt_rtx as trt

    assert hasattr(trt.EngineInvalidityDiagnostics, "INSUFFICIENT_GPU_MEMORY")
    (tmp_path / "m.engine").write_bytes(bytes(64))
    with raises(EngineError, "invalid-engine", "MALFORMED_ENGINE"):
        validity_note(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), tmp_path / "m.engine")
