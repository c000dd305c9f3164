"""``genai_config.json`` for a decoder that onnxruntime-genai's builder did not write.

Its kind is the runtime's plain ``decoder``: token ids, a mask, positions where the graph takes
them, and a pair of caches for each layer. Source: ``src/config.h`` and ``src/models/model_type.h``
of microsoft/onnxruntime-genai; version 0.18.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.engines.runners.cache_form import CacheForm, read_cache_form
from exporter.errors import MissingDependencyError, first_line, pass_on_memory_error
from exporter.export.onnx_output import MODEL_FILE
from exporter.files import write_text
from exporter.models.genai_config import CONFIG_FILE
from exporter.models.graph_facts import CACHE_INPUT
from exporter.optional import require
from graph_passes.files.storage import load_model

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_TOKENS = ("input_ids", "attention_mask", "position_ids")
_PROBE, _PROBE_STEPS = [1, 2, 3], 2
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_genai_config(loaded: LoadedModel, folder: Path) -> bool:
    """Writes the config beside a decoder's ``model.onnx``, where the runtime can be told of it.

    Args:
        loaded: The model.
        folder: Holds the graph.

    Returns:
        Whether it was written. The runtime takes one head size and one number of key and value
        heads for all layers, and a text has to have a known greatest length.
    """
    model = load_model(folder / MODEL_FILE)
    names = [value.name or "" for value in model.graph.inputs]
    content = genai_config(loaded.model, names, read_cache_form(folder / MODEL_FILE))
    if content is not None:
        write_text(folder / CONFIG_FILE, json.dumps(content, indent=4) + "\n")
    return content is not None


def genai_failure(folder: Path) -> str | None:
    """Has onnxruntime-genai run a folder: a short prompt, and a step with its cache.

    Returns:
        Its complaint; None where it runs the folder, or isn't installed to be asked.
    """
    try:
        runtime = require("onnxruntime_genai", extra="genai")
    except MissingDependencyError:
        return None
    try:
        model = runtime.Model(str(folder))
        parameters = runtime.GeneratorParams(model)
        length = len(_PROBE) + _PROBE_STEPS
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = runtime.Generator(model, parameters)
        generator.append_tokens(_PROBE)
        for _ in range(_PROBE_STEPS):
            generator.generate_next_token()
    # It has no error class of its own, and passes on those of ONNX Runtime.
    except Exception as error:
        pass_on_memory_error(error)
        return first_line(error).replace(f"{folder}/", "")
    return None


def genai_config(model: Any, inputs: list[str], form: CacheForm) -> dict[str, Any] | None:
    """The config; None where the runtime can't be told of such a graph.

    Args:
        model: The PyTorch model, for its config and its generation config.
        inputs: The graph's.
        form: That of its caches.
    """
    config = model.config.get_text_config()
    positions = form.longest or getattr(config, "max_position_embeddings", None)
    sizes = {form.heads.get(name) for name in inputs if CACHE_INPUT.fullmatch(name)}
    heads, size = next(iter(sizes), None) or (None, None)
    if len(sizes) != 1 or heads is None or size is None or not isinstance(positions, int):
        return None
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": size,
        "hidden_size": config.hidden_size,
        "inputs": _inputs(inputs),
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len({_layer(name) for name in inputs} - {None}),
        "num_key_value_heads": heads,
    }
    told = {"context_length": positions, "decoder": decoder, "vocab_size": config.vocab_size}
    in_place = len(form.shared) == sum(_layer(name) is not None for name in inputs)
    search = {"max_length": positions, "past_present_share_buffer": in_place}
    return {"model": {**told, **_token_ids(model), "type": "decoder"}, "search": search}


def _inputs(names: list[str]) -> dict[str, str]:
    tokens = {name: name for name in _TOKENS if name in names}
    caches = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    return {**tokens, **caches}


def _layer(name: str) -> str | None:
    found = CACHE_INPUT.fullmatch(name)
    return None if found is None else found[1]


def _token_ids(model: Any) -> dict[str, Any]:
    """Where a text begins and ends; the runtime pads with the end where nothing else is known."""
    found = {}
    for name in _IDS:
        for source in (model.generation_config, model.config.get_text_config()):
            value = getattr(source, name, None)
            if value is not None:
                found[name] = value
                break
    end = found.get("eos_token_id")
    if "pad_token_id" not in found and end is not None:
        found["pad_token_id"] = end[0] if isinstance(end, list) else end
    return found
