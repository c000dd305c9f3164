"""Which of transformers' classes loads a model, and whether what it makes fits the files."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from operator import setitem
from pathlib import Path
from typing import Any

from exporter.errors import ModelSourceError, UnsafeModelError
from exporter.models.loading.checkpoint_shards import AGAIN, CheckpointShards
from exporter.models.model_folder import CLASSIFIERS
from exporter.models.sentence_folder import pools
from exporter.optional import require

# What isn't in the files is little: a model without some weights is refused later, by name.
_TIMES = 4
_TENSORS_BESIDES, _WEIGHTS_BESIDES = 1 << 10, 1 << 28


def auto_class(config: Any, *, trust_remote_code: bool, pruned: bool = False) -> Any:
    """The class that the weights were saved from; else a language model, else the bare one."""
    result = _whole_class(config, trust_remote_code)
    if getattr(config, "depthcut", None) is None:
        return result
    from exporter.models.branch_modules import pruned_class, structure_of

    if not pruned:
        raise ModelSourceError(
            f"{config.name_or_path} is a checkpoint that depthcut has pruned; this needs a whole "
            "model.",
            "Give the model that it was pruned from. A pruned one can be compared: depthcut "
            "compare torch:WHOLE torch:PRUNED; "
            "exporter.export.torch_export.export_onnx makes an ONNX file of it.",
            code="already-pruned",
        )
    structure = structure_of(config)
    assert structure is not None
    return pruned_class(result, structure)


def _whole_class(config: Any, trust_remote_code: bool) -> Any:
    transformers = require("transformers", extra="torch")
    remote = _remote_auto_class(config) if trust_remote_code else None
    if remote is not None:
        return getattr(transformers, remote)
    heads = [name for name in config.architectures or () if name.endswith(CLASSIFIERS)]
    whole = not heads and getattr(config, "depthcut", None) is None
    if whole and pools(Path(str(config.name_or_path))):
        return transformers.AutoModel  # as sentence-transformers does, whatever the config names
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


def refuse_far_larger(model_class: Any, config: Any, shards: CheckpointShards, path: Path) -> None:
    """Refuses a config of a model many times as large as its files.

    transformers would make the tensors that differ, before it says that they do.
    """
    import torch

    held = [math.prod(entry.shape) for entry in shards.entries.values()]
    most = _TIMES * len(held) + _TENSORS_BESIDES
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    described = f"{layers} layers"
    larger = isinstance(layers, int) and layers > most
    if not larger:
        make = getattr(model_class, "from_config", None) or model_class._from_config
        with torch.device("meta"):
            model = make(copy.deepcopy(config))
        wanted = [math.prod(part.shape) for part in (*model.parameters(), *model.buffers())]
        described = f"{sum(wanted)} weights in {len(wanted)} tensors"
        larger = len(wanted) > most or sum(wanted) > _TIMES * sum(held) + _WEIGHTS_BESIDES
    if larger:
        raise UnsafeModelError(
            f"{path}: the config describes a model of {described}, and the files hold {sum(held)} "
            f"weights in {len(held)} tensors.",
            AGAIN,
        )


_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "USE_HUB_KERNELS": "NO",
}  # fmt: skip
# Read from the environment once, at import; transformers 4.57 keeps a copy of its own.
_FLAGS = {
    "huggingface_hub.constants": (
        "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_TELEMETRY",
    ),
    "transformers.utils.hub": ("_is_offline_mode",),
}  # fmt: skip
_LOCK = threading.RLock()


@contextlib.contextmanager
def hub_off() -> Iterator[None]:
    """Makes every request to the hub an error while the block runs, and hides the user's token.

    Models that are loaded within it keep their modules: transformers 5.25 puts compiled kernels
    of the hub in their place.

    It holds for the whole process; blocks of other threads wait for its end.
    """
    modules = {name: require(name, extra="torch") for name in _FLAGS}
    with _LOCK, contextlib.ExitStack() as stack:
        stack.callback(_forget_sessions)
        for name, value in _ENVIRONMENT.items():
            before = os.environ.get(name)
            undo = partial(os.environ.pop, name, None)
            stack.callback(undo if before is None else partial(setitem, os.environ, name, before))
            os.environ[name] = value
        for name, module in modules.items():
            for flag in _FLAGS[name]:
                if hasattr(module, flag):
                    stack.callback(setattr, module, flag, getattr(module, flag))
                    setattr(module, flag, True)
        _forget_sessions()
        yield


def _forget_sessions() -> None:
    """Sessions of huggingface_hub before 1.0 are made online or offline, and kept."""
    http: Any = sys.modules.get("huggingface_hub.utils._http")
    getattr(http, "reset_sessions", lambda: None)()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' bars and advice off the terminal; errors still come as exceptions."""
    logging = require("transformers.utils.logging", extra="torch")
    # The GGUF reader draws its bar with tqdm itself, past transformers' own switch.
    reader: Any = require("transformers.modeling_gguf_pytorch_utils", extra="torch")
    verbosity, bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), reader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
