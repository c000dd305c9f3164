"""Runs inside the building process: the builder's configuration.

By the library's own API and not by polygraphy's ``CreateConfig``: with that, builds in one and the
same environment came out in four versions of fourteen, without it in one (TensorRT-RTX 1.7.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from exporter.engines.build.network import Builder
from exporter.errors import EngineError

if TYPE_CHECKING:  # the building process is given their values, without what reads and checks them
    from exporter.engines.build.settings import BuildSettings, Profile

_COMPATIBILITY = {
    "ampere+": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
_NO_CARD = frozenset({"NONE", "CURRENT"})


def builder_config(
    builder: Builder,
    settings: BuildSettings,
    profiles: Sequence[Profile],
    monitor: object,
) -> Any:
    """Makes the configuration.

    Raises:
        EngineError: The library refuses an option, or a profile.
    """
    module = builder.module
    config = builder.builder.create_builder_config()
    config.progress_monitor = monitor
    # Without it neither the builder's log nor an inspector says which layers it made.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    _set_flags(module, config, settings)
    _set_targets(module, config, settings)
    for entry in profiles:
        _add_profile(builder, config, entry)
    return config


def _set_flags(module: Any, config: Any, settings: BuildSettings) -> None:
    config.clear_flag(module.BuilderFlag.TF32)  # on by default
    wanted = {
        "TF32": settings.tf32,
        "VERSION_COMPATIBLE": settings.version_compatible,
    }
    for name, asked in wanted.items():
        if asked:
            config.set_flag(getattr(module.BuilderFlag, name))
    if settings.hardware_compatibility != "none":
        level = _COMPATIBILITY[settings.hardware_compatibility]
        config.hardware_compatibility_level = getattr(module.HardwareCompatibilityLevel, level)


def _set_targets(module: Any, config: Any, settings: BuildSettings) -> None:
    names = settings.compute_capabilities
    if not names:
        return
    refuse_unknown_targets(module, names)
    known = module.ComputeCapability.__members__
    config.num_compute_capabilities = len(names)
    wrong = [
        name
        for place, name in enumerate(names)
        if not config.set_compute_capability(known[name.upper()], place)
    ]
    if wrong:
        raise _unknown_targets(module, wrong)


def _add_profile(builder: Builder, config: Any, entry: Profile) -> None:
    profile = builder.builder.create_optimization_profile()
    for name, span in entry.shapes.items():
        profile.set_shape(name, span.low, span.usual, span.high)
    if not profile or config.add_optimization_profile(profile) < 0:
        reason = builder.listener.last_error()
        raise EngineError(f"The {entry.phase} profile is refused: {reason}")


def refuse_unknown_targets(module: ModuleType, names: Sequence[str]) -> None:
    """Refuses cards that a library doesn't build for.

    Args:
        module: ``tensorrt_rtx``; the other library has no such choice.
        names: Compute capabilities such as ``sm89``.

    Raises:
        EngineError: One is not known.
    """
    if not names:  # only one of the libraries has these classes
        return
    known = set(module.ComputeCapability.__members__) - _NO_CARD
    wrong = [name for name in names if name.upper() not in known]
    if wrong:
        raise _unknown_targets(module, wrong)


def _unknown_targets(module: ModuleType, wrong: Sequence[str]) -> EngineError:
    known = set(module.ComputeCapability.__members__) - _NO_CARD
    cards = sorted((name.lower() for name in known), key=lambda name: (len(name), name))
    return EngineError(
        f"{module.__name__} {module.__version__} does not build for {', '.join(wrong)}.",
        f"It knows {', '.join(cards)}.",
        code="unknown-card",
    )


def read_timing_cache(config: Any, path: Path) -> None:
    """Gives the builder a cache; an empty one where there is no file yet.

    Builds of TensorRT differ from run to run unless they use the same cache.

    Raises:
        EngineError: The file is no cache, or one of another card or version.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"{path} is not a timing cache of this card and version.",
            "Name another file: a new cache is written there. This one stays as it is.",
            code="no-timing-cache",
        )


def write_timing_cache(config: Any, path: Path) -> None:
    """Writes what the builder knows now; no file where it doesn't tell: the engine is there."""
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is not None:
        path.write_bytes(memoryview(content))
