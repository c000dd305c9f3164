"""From a PyTorch model to ONNX with onnxruntime-genai's model builder.

It writes a decoder in ONNX Runtime's own operators, layer by layer from the checkpoint, for the
architectures that it knows: GroupQueryAttention with the rotary embedding inside and past and
present in one buffer, packed projections, norms fused with the sums before them. Beside the graph
it writes ``genai_config.json``, with which onnxruntime-genai runs the folder.

It is given a checkpoint in both dialects of transformers, as optimum is, and no network.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from exporter.errors import ExportError, first_line, pass_on_memory_error
from exporter.export.forms.noting import WrittenForm
from exporter.export.onnx_output import MODEL_FILE
from exporter.files import telling_full_disk
from exporter.models.genai_config import CONFIG_FILE
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.transformers_calls import hub_off
from exporter.optional import require
from exporter.processes import captured_output
from exporter.progress import QUIET, Progress

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
    """Writes a decoder with its cache, and ``genai_config.json`` beside it.

    Args:
        loaded: The model, in the dtype that the graph shall have; a checkpoint of it is written to
            a temporary folder for the builder.
        folder: Takes ``model.onnx``, ``model.onnx.data`` and ``genai_config.json``.
        provider: Which provider is to run it.
        progress: Hears what the builder says as details.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
        ExportError: The builder doesn't know the architecture, fails on it, or leaves out its
            windows.
        OSError: The disk is full.
    """
    builder = require(_MODULE, extra=_EXTRAS[provider])
    with (
        tempfile.TemporaryDirectory(prefix=".genai.", dir=folder) as name,
        captured_output(progress),
    ):
        checkpoint, out = Path(name, "checkpoint"), Path(name, "onnx")
        building = progress.task("build with onnxruntime-genai")
        with building, telling_full_disk(folder), hub_off():
            _save_checkpoint(loaded, checkpoint)
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


def _save_checkpoint(loaded: LoadedModel, folder: Path) -> None:
    """The model as the builder reads it; with a tokenizer, which it copies."""
    save_checkpoint(loaded, folder)
    if loaded.tokenizer is None:
        _save_stand_in_tokenizer(folder)


def _save_stand_in_tokenizer(folder: Path) -> None:
    """One word; nothing of it comes into the result."""
    tokenizers = require("tokenizers", extra="torch")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106
    transformers = require("transformers", extra="torch")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(folder)


def windowed_layers(config: Any) -> int:
    """How many layers of a decoder look at a window alone.

    Args:
        config: Of the text model, as transformers has it.
    """
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

    Args:
        path: The graph, in GroupQueryAttention.
        config: Of the text model, as transformers has it.

    Raises:
        ExportError: They are not as many as the model's.
    """
    wanted = windowed_layers(config)
    nodes = [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
    found = sum(node.attributes.get_int("local_window_size", -1) > 0 for node in nodes)
    if found != wanted:
        raise ExportError(
            f"onnxruntime-genai's model builder wrote a window into {found} of {len(nodes)} "
            f"attentions, where the model has one in {wanted}.",
            code="wrong-windows",
        )
