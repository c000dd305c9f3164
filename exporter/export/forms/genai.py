"""From a PyTorch model to ONNX with onnxruntime-genai's model builder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from exporter.engines.runners.cache_form import CacheForm, read_cache_form
from exporter.errors import ExportError, MissingDependencyError, first_line, pass_on_memory_error
from exporter.export.forms.portable import WrittenForm
from exporter.export.onnx_output import MODEL_FILE
from exporter.files import telling_full_disk, write_text
from exporter.models.genai_config import CONFIG_FILE
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.loading.model_class import hub_off
from exporter.models.loading.model_files import save_checkpoint
from exporter.optional import require
from exporter.processes import captured_output
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import load_model

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

Provider = Literal["cpu", "cuda"]
"""For which of ONNX Runtime's providers the builder chooses operators."""

_MODULE = "onnxruntime_genai.models.builder"
_EXTRAS: dict[Provider, str] = {"cpu": "genai", "cuda": "genai-gpu"}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# A layer with a window keeps its whole cache: each cache then is as long as the text.
_OPTIONS = {"windowed_kv_cache": False}
_LOCAL = "sliding_attention"


def build_decoder(
    loaded: LoadedModel, folder: Path, provider: Provider, progress: Progress = QUIET
) -> WrittenForm:
    """Writes a decoder with its cache, and ``genai_config.json`` beside it."""
    builder = require(_MODULE, extra=_EXTRAS[provider])
    with (
        tempfile.TemporaryDirectory(prefix=".genai.", dir=folder) as name,
        captured_output(progress),
    ):
        checkpoint, out = Path(name, "checkpoint"), Path(name, "onnx")
        building = progress.task("build with onnxruntime-genai")
        with building, telling_full_disk(folder), hub_off():
            save_checkpoint(loaded, checkpoint)
            if loaded.tokenizer is None:
                _save_stand_in_tokenizer(checkpoint)
            _run_builder(builder, loaded, checkpoint, out, provider)
        require_windows(out / MODEL_FILE, loaded.model.config.get_text_config())
        for file in (f"{MODEL_FILE}.data", MODEL_FILE, CONFIG_FILE):
            shutil.move(out / file, folder / file)
    runtime = require("onnxruntime_genai", extra=_EXTRAS[provider])
    return WrittenForm(f"onnxruntime-genai {runtime.__version__}")


def _run_builder(
    builder: Any, loaded: LoadedModel, checkpoint: Path, out: Path, provider: Provider
) -> None:
    precision = _PRECISIONS[str(loaded.model.dtype).removeprefix("torch.")]
    try:
        config = builder.AutoConfig.from_pretrained(str(checkpoint), local_files_only=True)
        details = {
            "extra_kwargs": {"local_files_only": True},
            "hf_name": str(checkpoint),
            "hf_config": config,
        }
        builder.create_model(
            *("", str(checkpoint), str(out), precision, provider, str(out.with_name("cache"))),
            **_OPTIONS,
            shared_embeddings=bool(config.tie_word_embeddings),
            hf_details=details,
            hf_token=None,
        )
    except NotImplementedError as error:
        raise ExportError(
            f"onnxruntime-genai's model builder doesn't know {loaded.ref.architecture}.",
        ) from error
    # It reads any model's config and has no error class of its own.
    except Exception as error:
        pass_on_memory_error(error)
        raise ExportError(
            f"onnxruntime-genai's model builder can't write {loaded.ref.architecture}: "
            f"{first_line(error)}.",
        ) from error


def _save_stand_in_tokenizer(folder: Path) -> None:
    """One word, for the builder to copy; nothing of it comes into the result."""
    tokenizers = require("tokenizers", extra="torch")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106
    transformers = require("transformers", extra="torch")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(folder)


def windowed_layers(config: Any) -> int:
    """How many layers of a decoder look at a window alone."""
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or (isinstance(longest, int) and window >= longest):
        return 0
    types = getattr(config, "layer_types", None)
    return int(config.num_hidden_layers) if types is None else list(types).count(_LOCAL)


def require_windows(path: Path, config: Any) -> None:
    """Makes sure that a decoder's graph looks as far back as the model does, and no further.

    A check that runs a few tokens can't tell: windows are thousands of positions long. The builder
    of onnxruntime-genai 0.18 writes windows for models that list their layers' types, and none for
    those whose config names a window alone, Mistral for one.
    """
    wanted = windowed_layers(config)
    nodes = [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
    total = sum(node.attributes.get_int("local_window_size", -1) > 0 for node in nodes)
    if total != wanted:
        raise ExportError(
            f"onnxruntime-genai's model builder wrote a window into {total} of {len(nodes)} "
            f"attentions, where the model has one in {wanted}.",
            code="wrong-windows",
        )


_TOKENS = ("input_ids", "attention_mask", "position_ids")
_PROBE, _PROBE_STEPS = [1, 2, 3], 2
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_genai_config(loaded: LoadedModel, folder: Path) -> bool:
    """Writes the config beside a decoder's ``model.onnx``, where the runtime can be told of it."""
    model = load_model(folder / MODEL_FILE)
    names = [value.name or "" for value in model.graph.inputs]
    content = genai_config(loaded.model, names, read_cache_form(folder / MODEL_FILE))
    if content is not None:
        write_text(folder / CONFIG_FILE, json.dumps(content, indent=4) + "\n")
    return content is not None


def genai_failure(folder: Path) -> str | None:
    """Has onnxruntime-genai run a folder: a short prompt, and a step with its cache."""
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
    """The config; None where the runtime can't be told of such a graph."""
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
    result = {"context_length": positions, "decoder": decoder, "vocab_size": config.vocab_size}
    in_place = len(form.shared) == sum(_layer(name) is not None for name in inputs)
    search = {"max_length": positions, "past_present_share_buffer": in_place}
    return {"model": {**result, **_token_ids(model), "type": "decoder"}, "search": search}


def _inputs(names: list[str]) -> dict[str, str]:
    tokens = {name: name for name in _TOKENS if name in names}
    caches = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    return {**tokens, **caches}


def _layer(name: str) -> str | None:
    match = CACHE_INPUT.fullmatch(name)
    return None if match is None else match[1]


def _token_ids(model: Any) -> dict[str, Any]:
    """Where a text begins and ends; the runtime pads with the end where nothing else is known."""
    results = {}
    for name in _IDS:
        for source in (model.generation_config, model.config.get_text_config()):
            value = getattr(source, name, None)
            if value is not None:
                results[name] = value
                break
    end = results.get("eos_token_id")
    if "pad_token_id" not in results and end is not None:
        results["pad_token_id"] = end[0] if isinstance(end, list) else end
    return results
