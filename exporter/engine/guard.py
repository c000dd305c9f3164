"""Asks whether engines can run here, before anything of CUDA or of a runtime is made."""

from __future__ import annotations

from types import ModuleType

from exporter.engine.driver import Device, ask_driver
from exporter.engine.engine_set import EngineSet
from exporter.engine.flavours import load
from exporter.engine.sidecar import refuse_mismatch
from exporter.errors import BackendError


def refuse_unready(engines: EngineSet) -> tuple[ModuleType, Device]:
    """Makes sure that there are a driver, a GPU, the library, and that they fit the engines.

    The library's runtime ends the process where there is no driver, so the driver comes first.

    Returns:
        The library's module, and the GPU that will run.

    Raises:
        BackendError: There is no driver or no GPU.
        MissingDependencyError: The library is not installed.
        EngineError: It is another version than the engines', or the GPU is of another kind.
    """
    driver = ask_driver()
    if driver.problem:
        raise BackendError(
            f"{engines.name}: built, not run: {driver.problem}.",
            "Take it to a machine with an NVIDIA GPU and its driver.",
        )
    module = load(engines.flavour)
    for record in engines.records:
        refuse_mismatch(record, module.__version__, driver.devices)
    return module, driver.devices[0]
