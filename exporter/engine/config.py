"""Runs inside the building process: the builder's configuration.

By the library's own API and not by polygraphy's ``CreateConfig``: with that, builds in one and the
same environment came out in four versions of fourteen, without it in one (TensorRT-RTX 1.7.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.engine.flavours import Flavour
from exporter.engine.network import Builder
from exporter.engine.settings import BuildSettings, ProfileEntry
from exporter.engine.targets import refuse_unknown_targets, unknown_targets
from exporter.errors import EngineError

_COMPATIBILITY = {
    "ampere+": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}


def builder_config(
    builder: Builder,
    flavour: Flavour,
    settings: BuildSettings,
    profiles: Sequence[ProfileEntry],
    monitor: object,
) -> Any:
    """Makes the configuration.

    Args:
        builder: The builder.
        flavour: Which library it is.
        settings: What was asked for.
        profiles: The shapes to build for.
        monitor: A progress monitor of the library's class.

    Raises:
        EngineError: The library refuses an option, or a profile.
    """
    module = builder.module
    config = builder.builder.create_builder_config()
    config.progress_monitor = monitor
    # Without it a builder doesn't say which layers it made.
    detailed = settings.detailed or flavour.builds_without_gpu
    verbosity = module.ProfilingVerbosity
    config.profiling_verbosity = verbosity.DETAILED if detailed else verbosity.LAYER_NAMES_ONLY
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
        "STRIP_PLAN": settings.strip_weights,
        "REFIT": settings.refittable,
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
        raise unknown_targets(module, wrong)


def _add_profile(builder: Builder, config: Any, entry: ProfileEntry) -> None:
    profile = builder.builder.create_optimization_profile()
    for name, span in entry.shapes.items():
        profile.set_shape(name, span.low, span.usual, span.high)
    if not profile or config.add_optimization_profile(profile) < 0:
        reasons = builder.listener.errors()
        raise EngineError(
            f"The {entry.phase} profile is refused: {reasons[-1] if reasons else 'no reason given'}"
        )
