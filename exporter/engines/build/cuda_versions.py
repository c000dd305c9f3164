"""Which CUDA the installed packages were built for, against the newest that the driver takes.

With a driver that is too old, the first call of a library fails in words that name no way out, or
ends the process. So the packages are asked, before anything of CUDA is loaded.
"""

from __future__ import annotations

import re
from importlib import metadata

from exporter.engines.build.driver import Driver
from exporter.errors import BackendError

BINDINGS, ONNX_RUNTIME = "cuda-bindings", "onnxruntime-gpu"
_RUNTIME = re.compile(r"nvidia-cuda-runtime(?:-cu\d+)?\s*[~=<>]=?\s*(\d+)")


def version_of(package: str) -> str | None:
    """The installed version of a package, or of its form for one CUDA; None where there is none.

    ``tensorrt`` may be installed as ``tensorrt-cu12`` alone.
    """
    found = [each for each in metadata.distributions() if _form(each.name, package) is not None]
    return found[0].version if found else None


def built_for_cuda(package: str) -> int | None:
    """The major version of CUDA that a package was built for; None where that is not known.

    NVIDIA's packages have it in their names: ``tensorrt`` brings ``tensorrt-cu13``. The version of
    ``cuda-bindings`` is CUDA's own, and ``onnxruntime-gpu`` names the runtime that it needs.
    """
    if package == BINDINGS:
        version = version_of(package)
        return int(version.partition(".")[0]) if version else None
    if package == ONNX_RUNTIME:
        needs = " ".join(metadata.requires(package) or []) if version_of(package) else ""
        found = _RUNTIME.search(needs)
        return int(found[1]) if found else None
    forms = (_form(each.name, package) for each in metadata.distributions())
    return max((int(form) for form in forms if form), default=None)


def _form(name: str, package: str) -> str | None:
    """The CUDA in a package's name, empty where it names none; None for another package."""
    plain = re.sub(r"[-_.]+", "-", name).lower()
    found = re.fullmatch(rf"{re.escape(package)}(?:-cu(\d+))?", plain)
    return None if found is None else found[1] or ""


def too_old(driver: Driver, package: str) -> str:
    """What is wrong between a package and the driver; empty where nothing is, or no driver.

    Within a major version CUDA's libraries run on older drivers, so that one alone counts.
    """
    needed = None if driver.problem else built_for_cuda(package)
    if needed is None or needed <= int(driver.cuda_version.partition(".")[0]):
        return ""
    return f"needs CUDA {needed}, and this NVIDIA driver takes CUDA {driver.cuda_version}"


def way_out(extra: str) -> str:
    """What to do about a driver that is too old.

    Args:
        extra: The extra that brings the same for CUDA 12.
    """
    return (
        "Update the driver (CUDA 13 needs version 580 or later), or install the packages for "
        f"CUDA 12 in a new environment: pip install 'depthcut[{extra}]'."
    )


def refuse_old_driver(driver: Driver, package: str, extra: str) -> None:
    """Refuses a package of a later CUDA than the driver takes.

    Args:
        driver: What the driver says.
        package: As pip calls it.
        extra: The extra that brings the same for CUDA 12.

    Raises:
        BackendError: The driver is too old.
    """
    if problem := too_old(driver, package):
        raise BackendError(f"{package} {problem}.", way_out(extra), code="driver-too-old")
