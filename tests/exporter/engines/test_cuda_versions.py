"""Which CUDA packages need, and what becomes of a driver that takes less."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter.engines.build import libraries
from exporter.engines.build import libraries as cuda_versions
from exporter.engines.build.libraries import Device, Driver
from exporter.errors import BackendError, MissingDependencyError
from tests.raising import raises

CARD = Device("a card", "sm89", 24 << 30)
OLD, NEW = Driver("", "12.8", (CARD,)), Driver("", "13.0", (CARD,))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, the only ones."""
    monkeypatch.setattr(
        cuda_versions.metadata,
        "distributions",
        lambda: list(metadata.Distribution.discover(path=[str(tmp_path)])),
    )
    return tmp_path


def install(folder: Path, name: str, version: str, *needs: str) -> None:
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    (place / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "version", "package", "cuda"),
    [
        ("tensorrt_cu13", "11.4.0.106", "tensorrt", 13),
        ("tensorrt-cu12", "10.16.1.11", "tensorrt", 12),
        ("tensorrt_rtx_cu13", "1.7.1.116", "tensorrt-rtx", 13),
        ("tensorrt_rtx_cu13", "1.7.1.116", "tensorrt", None),
        ("tensorrt_cu13_bindings", "11.4.0.106", "tensorrt", None),
        ("cuda-bindings", "12.9.10", "cuda-bindings", 12),
        ("onnxruntime", "1.32.0", "onnxruntime-gpu", None),
    ],
)
def test_packages_tell_their_cuda(
    name: str, version: str, package: str, cuda: int | None, packages: Path
) -> None:
    install(packages, name, version)
    assert cuda_versions.built_for_cuda(package) == cuda
    known = cuda is not None
    assert cuda_versions.version_of(package) == (version if known else None)


@pytest.mark.parametrize(
    ("need", "cuda"),
    [
        ('nvidia-cuda-runtime~=13.0; extra == "cuda"', 13),
        ('nvidia-cuda-runtime-cu12~=12.0; extra == "cuda"', 12),
        ("numpy>=1.21.6", None),
    ],
)
def test_onnx_runtime_names_the_cuda_runtime_that_it_needs(
    need: str, cuda: int | None, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(packages, "onnxruntime-gpu", "1.31.1", need)
    monkeypatch.setattr(cuda_versions.metadata, "requires", lambda _: [need])
    assert cuda_versions.built_for_cuda("onnxruntime-gpu") == cuda


def test_a_driver_that_takes_an_older_cuda_is_refused_with_the_extra(packages: Path) -> None:
    install(packages, "cuda-bindings", "13.5.0")
    library = libraries.LIBRARIES["tensorrt-rtx"]
    with raises(BackendError, "driver-too-old", "cuda-bindings", "12.8", "13", "[rtx-cu12]"):
        libraries.refuse_driver_for_running(library, OLD)
    libraries.refuse_driver_for_running(library, NEW)
    install(packages, "tensorrt-rtx-cu13", "1.7.1.116")
    with raises(BackendError, "driver-too-old", "tensorrt-rtx", "12.8"):
        libraries.refuse_driver_for_running(library, OLD)


def test_a_builder_that_needs_a_driver_needs_one_that_is_new_enough(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(packages, "tensorrt-cu13", "11.4.0.106")
    install(packages, "tensorrt-rtx-cu13", "1.7.1.116")
    monkeypatch.setattr(libraries, "ask_driver", lambda: OLD)
    with raises(BackendError, "driver-too-old", "tensorrt", "[gpu-cu12]"):
        libraries.refuse_without_driver(libraries.LIBRARIES["tensorrt"])
    libraries.refuse_without_driver(libraries.LIBRARIES["tensorrt-rtx"])  # it builds without one


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
    devices = (Device("a card", card, 80 << 30),) if card else ()
    driver = Driver("" if card else "no NVIDIA driver", "13.0", devices)
    monkeypatch.setattr(libraries, "ask_driver", lambda: driver)
    assert libraries.usual_backend(None) == backend
    assert libraries.usual_backend("tensorrt-rtx") == "tensorrt-rtx"
    assert libraries.usual_backend(None, ["sm89"]) == "tensorrt-rtx"  # for a card elsewhere


@pytest.mark.parametrize(
    ("backend", "version", "fits"),
    [
        ("tensorrt", "10.14.1.48", False), ("tensorrt", "10.15.0.1", True),
        ("tensorrt", "11.4.0.106", True), ("tensorrt-rtx", "1.5.2.1", False),
        ("tensorrt-rtx", "1.7.1.116", True),
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
