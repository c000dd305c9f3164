"""Writes what a loaded model ships with: config, generation config, tokenizer, and weights."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.files import telling_full_disk, write_text
from exporter.models.loading.model_class import quiet_transformers
from exporter.printable import json_text

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

# Rotary bases of configs whose layer types have one each, under the names that 4.57 reads.
_NESTED_THETA_KEYS = {
    "full_attention": ("rope_theta", "global_rope_theta"),
    "sliding_attention": ("rope_local_base_freq", "local_rope_theta"),
}
# transformers 5 notes these of its own load, which was here and without the hub.
_LOADED_HOW = ("is_local", "local_files_only")
_FLAT_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


def save_pretrained_files(loaded: LoadedModel, folder: Path) -> None:
    """Writes everything but the weights, so that any version from 4.57 on reads it.

    That is ``config.json``, ``generation_config.json`` where the model generates, and the
    tokenizer's files with its chat template. The caller stages ``folder``.
    """
    with telling_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json_text(shipped_config(loaded.model)))
        if loaded.model.can_generate():
            # Not save_pretrained: it refuses configs that hub models do ship, such as a
            # temperature beside greedy decoding.
            generation = json.loads(loaded.model.generation_config.to_json_string(use_diff=True))
            write_text(folder / "generation_config.json", json_text(generation))
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
            _make_portable_tokenizer(folder / "tokenizer_config.json", loaded)


def save_checkpoint(loaded: LoadedModel, folder: Path) -> None:
    """Writes the model with its weights as safetensors, as optimum's exporter wants it."""
    with quiet_transformers(), telling_full_disk(folder):
        loaded.model.save_pretrained(folder)
    save_pretrained_files(loaded, folder)


def shipped_config(model: Any) -> dict[str, Any]:
    """The model's config as a JSON object in both dialects, 4.57's and 5's."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    return with_both_rope_dialects(config)


def with_both_rope_dialects(config: dict[str, Any]) -> dict[str, Any]:
    """Fills in the rotary keys that the other major version of transformers reads."""
    config = dict(config)
    rope = config.get("rope_parameters")
    if not rope:
        _add_rope_parameters(config)
    elif all(isinstance(part, dict) for part in rope.values()):
        for layer_type, keys in _NESTED_THETA_KEYS.items():
            theta = rope.get(layer_type, {}).get("rope_theta")
            if theta is not None:
                config.update(dict.fromkeys(keys, theta))
    else:
        config.update({key: rope[key] for key in _FLAT_ROPE_KEYS if key in rope})
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    return config


def _add_rope_parameters(config: dict[str, Any]) -> None:
    if "rope_theta" not in config:
        return
    rope = {key: config[key] for key in _FLAT_ROPE_KEYS if key in config}
    scaling = dict(config.get("rope_scaling") or {})
    rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
    config["rope_parameters"] = {**scaling, **rope, "rope_type": rope_type}


def _make_portable_tokenizer(path: Path, loaded: LoadedModel) -> None:
    """Writes a class that both versions of transformers know, and no input that the model lacks.

    4.57's plain class makes ``token_type_ids``, which a decoder's ``generate`` refuses.
    """
    if loaded.tokenizer is None or not path.exists():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in _LOADED_HOW:
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    taken = inspect.signature(loaded.model.forward).parameters
    names = [name for name in loaded.tokenizer.model_input_names if name in taken]
    write_text(path, json_text({**config, "model_input_names": names}))
