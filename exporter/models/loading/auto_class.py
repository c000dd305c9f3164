"""Which of transformers' classes loads a model: the one that it was saved from, where known."""

from __future__ import annotations

from typing import Any

from exporter.errors import ModelSourceError
from exporter.optional import require


def auto_class(config: Any, *, trust_remote_code: bool, pruned: bool = False) -> Any:
    """The class that the weights were saved from; else a language model, else the bare one.

    Args:
        config: The model's.
        trust_remote_code: Prefers what the model's own code brings to what transformers has.
        pruned: Takes a pruned checkpoint's config too: its class is transformers' own, with other
            modules in some places.

    Raises:
        ModelSourceError: The config is a pruned checkpoint's, and that can't be taken.
    """
    found = _whole_class(config, trust_remote_code)
    if getattr(config, "depthcut", None) is None:
        return found
    from exporter.models.branch_modules import forget_skips, pruned_class, structure_of

    if not pruned:
        raise ModelSourceError(
            f"{config.name_or_path} is a checkpoint that depthcut has pruned; this needs a whole "
            "model.",
            "Give the model that it was pruned from. A pruned one can be compared: depthcut "
            "compare torch:WHOLE torch:PRUNED; "
            "exporter.export.torch_export.export_onnx makes an ONNX file of it.",
        )
    if not hasattr(found, "named_modules"):
        raise ModelSourceError(
            f"{config.name_or_path}: the config of a pruned checkpoint must name the model's class "
            "under architectures."
        )
    structure = structure_of(config)
    assert structure is not None
    forget_skips(config)
    return pruned_class(found, structure)


def _whole_class(config: Any, trust_remote_code: bool) -> Any:
    transformers = require("transformers", extra="torch")
    remote = _remote_auto_class(config) if trust_remote_code else None
    if remote is not None:
        return getattr(transformers, remote)
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        # A config may name anything that transformers has.
        if isinstance(config, getattr(named, "config_class", None) or ()):
            return named
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _remote_auto_class(config: Any) -> str | None:
    """The name of the auto class under which a model's own code stands; None when it has none."""
    transformers = require("transformers", extra="torch")
    brought = {
        name: str(place).rpartition(".")[2]
        for name, place in (getattr(config, "auto_map", None) or {}).items()
        if name.startswith("AutoModel") and hasattr(transformers, name)
    }
    saved_from = [name for name, kind in brought.items() if kind in (config.architectures or ())]
    usual = [name for name in ("AutoModelForCausalLM", "AutoModel") if name in brought]
    return next(iter([*saved_from, *usual, *brought]), None)
