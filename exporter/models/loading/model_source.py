"""From the name of a model to the model: a Hugging Face folder, a hub id, or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifacts import ModelRef, library_versions
from exporter.artifacts.stacks import Stacks
from exporter.errors import (
    ModelSourceError,
    UnknownArchitectureError,
    UnsafeInputError,
    UnsafeModelError,
    error_chain,
    first_line,
    is_out_of_memory,
    panics_as_errors,
    pass_on_memory_error,
)
from exporter.files import scratch_folder
from exporter.models.families import REVIEWED
from exporter.models.loading.checked_folder import (
    CONFIG,
    Dangers,
    checked_config,
    files_as_they_are,
    read_object,
    refuse_changed,
    refuse_entries,
)
from exporter.models.loading.checkpoint_shards import CheckpointShards, unreadable
from exporter.models.loading.model_class import (
    auto_class,
    hub_off,
    quiet_transformers,
    refuse_far_larger,
)
from exporter.models.loading.sources import (
    SAFETENSORS,
    TOKENIZER_FILES,
    matching,
    path_sha256,
    resolve_source,
)
from exporter.models.tokenizer_budget import refuse_growing
from exporter.optional import require
from graph_passes.files.locations import cache_revision
from graph_passes.files.reading import TABLE_BYTES, read_bytes, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOO_LARGE = "too-little-memory"
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# Those that only read a tokenizer.json, whatever the model; and what hub models name for theirs.
_PLAIN_TOKENIZERS = {"PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer"}


def load_tokenizer(folder: Path, config: Any, dangers: Dangers) -> Any:
    """Loads a tokenizer from a folder that was looked at; None where there is none."""
    transformers = require("transformers", extra="torch")
    if not matching(folder, TOKENIZER_FILES):
        return None
    if not (dangers.allow_any_model_type or dangers.trust_remote_code):
        for path in (folder / _CONFIG, folder / CONFIG):
            name = read_object(path).get("tokenizer_class") if path.exists() else None
            if name is not None and not (isinstance(name, str) and _is_reviewed_class(name)):
                raise UnsafeModelError(
                    f"{path}: $.tokenizer_class is {str(name)[:60]!r}, whose code in transformers "
                    "was not looked at for depthcut.",
                    "Load it with --allow-any-model-type if you trust the model.",
                )
    path = folder / _FILE
    if path.is_file():
        refuse_growing(read_bytes(path, limit=TABLE_BYTES), str(path))
    how = {"trust_remote_code": dangers.trust_remote_code, "local_files_only": True}
    try:
        with panics_as_errors():
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, **how)
            except Exception as error:
                pass_on_memory_error(error)
                if not path.is_file():
                    raise
                # 4.57 does not know the class that 5 writes into tokenizer_config.json.
                plain = transformers.PreTrainedTokenizerFast
                tokenizer = plain.from_pretrained(folder, local_files_only=True)
            tokenizer("a")  # some entries are looked at only when there is a text
            return tokenizer
    except Exception as error:
        pass_on_memory_error(error)
        with contextlib.suppress(OSError, ValueError):  # says so of a file that is nested too deep
            read_json(path, limit=TABLE_BYTES)
        raise ModelSourceError(
            f"The tokenizer in {folder} can't be loaded: {first_line(error)}."
        ) from error


def _is_reviewed_class(name: str) -> bool:
    """Whether a tokenizer's class belongs to a reviewed type, or is none that transformers has.

    transformers takes its plain class, or refuses, where it does not know a name.
    """
    transformers = require("transformers", extra="torch")
    auto: Any = require("transformers.models.auto.tokenization_auto", extra="torch")
    reviewed = set(_PLAIN_TOKENIZERS)
    for model_type in REVIEWED:
        classes = auto.TOKENIZER_MAPPING_NAMES.get(model_type)
        # A name in transformers 5, a slow one and a fast one in 4.57.
        names = (classes,) if isinstance(classes, str) else classes or ()
        reviewed |= {item.removesuffix("Fast") for item in names if item}
    bare = name.removesuffix("Fast")
    known = any(hasattr(transformers, item) for item in (bare, f"{bare}Fast"))
    return bare in reviewed or not known


DTYPES = ("float32", "float16", "bfloat16")
"""What a model's weights may become when it is loaded."""


def check_dtype(dtype: str) -> None:
    """Refuses what weights can't become."""
    if dtype not in DTYPES:
        types = " or ".join(DTYPES)
        raise ModelSourceError(f"No {dtype!r} is loaded.", f"Use {types}.", code="option-value")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored or exported."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None for a model that ships none
    ref: ModelRef
    path: Path

    def identity(self) -> dict[str, Any]:
        """What every result of it depends on, for keys of what is kept between calls; JSON."""
        return {
            "model": self.ref.sha256,
            "dtype": str(self.model.dtype),
            "versions": library_versions(),
        }


def load_model(
    source: Path | str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    allow_any_model_type: bool = False,
    revision: str | None = None,
    pruned: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> LoadedModel:
    """Loads a model as plain floating-point weights.

    Args:
        source: A Hugging Face folder, a hub id, or a GGUF file.
        dtype: ``float32``, ``float16`` or ``bfloat16``: what the weights become.
        trust_remote_code: Runs code that comes with the model. Nothing is run without it.
        allow_pickle: Reads weights in pickles, which can run code too.
        allow_any_model_type: Loads a type that was never tried.
        revision: A branch, tag or commit of the hub.
        pruned: The folder is a checkpoint of :func:`exporter.write_checkpoint`.
        device_map: As transformers takes it; None: the CPU.

    Returns:
        The model in evaluation mode without gradients, its tokenizer, and what identifies it.

    Raises:
        ModelSourceError: There is no such model, it can't be read, or it wants what isn't allowed.
    """
    check_dtype(dtype)
    source = str(source)
    dangers = Dangers(trust_remote_code, allow_pickle, allow_any_model_type)
    path = resolve_source(source, revision=revision, **vars(dangers))

    def load(config: Any) -> tuple[Any, dict[str, Any]]:
        model_class = auto_class(config, trust_remote_code=trust_remote_code, pruned=pruned)
        how = {} if device_map is None else {"device_map": device_map}
        return _load_weights(model_class, config, path, dangers, dtype=dtype, **how)

    if not path.is_file():
        return load_folder(source, path, load, dangers)
    if device_map is not None:
        raise ModelSourceError(f"{path} is one file, which is not spread over devices.")
    with quiet_transformers(), hub_off():
        model, info, tokenizer = load_gguf(path, dtype, dangers)
    return _loaded(source, path, model, info, tokenizer)


def _load_weights(
    model_class: Any, config: Any, path: Path, dangers: Dangers, **how: Any
) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report of the load."""
    use_safetensors = bool(matching(path, SAFETENSORS)) or not dangers.allow_pickle
    if use_safetensors and not getattr(config, "transformers_weights", None):
        # Says which shard is at fault, which transformers doesn't.
        shards = CheckpointShards.open(path)
        if not (dangers.trust_remote_code and hasattr(config, "auto_map")):
            refuse_far_larger(model_class, config, shards, path)
    model, info = model_class.from_pretrained(
        path,
        config=config,
        use_safetensors=use_safetensors,
        output_loading_info=True,
        trust_remote_code=dangers.trust_remote_code,
        local_files_only=True,
        **how,
    )
    return model, info


def load_folder(
    source: str,
    path: Path,
    load: Callable[[Any], tuple[PreTrainedModel, dict[str, Any]]],
    dangers: Dangers,
) -> LoadedModel:
    """Loads a model's folder with its tokenizer, however its weights come; the hub is off."""
    before = files_as_they_are(path)
    content = checked_config(path, dangers)
    with quiet_transformers(), hub_off():
        try:
            config = _config(content, path, dangers.trust_remote_code)
            model, info = load(config)
        except (ModelSourceError, UnsafeInputError):
            raise
        # From a cut safetensors file to a config that contradicts the weights: many classes.
        except Exception as error:
            refuse_changed(path, before)
            raise _load_error(path, error) from error
        tokenizer = load_tokenizer(path, config, dangers)
    refuse_changed(path, before)
    return _loaded(source, path, model, info, tokenizer)


def _config(content: dict[str, Any], path: Path, trust_remote_code: bool) -> Any:
    """The model's config, made of what was looked at, and not of what the file says by now."""
    auto = require("transformers", extra="torch").AutoConfig
    if trust_remote_code and "auto_map" in content:
        return auto.from_pretrained(path, trust_remote_code=True, local_files_only=True)
    if content.get("model_type") is None:  # transformers guesses it from the folder's name
        text, hint = f"{path / CONFIG} names no model_type.", "Take the model's own config.json."
        raise UnknownArchitectureError(text, hint, code="unknown-family")
    with scratch_folder("config") as folder:
        (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
        config = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config.name_or_path = str(path)
    return config


def _loaded(
    source: str, path: Path, model: Any, info: dict[str, Any], tokenizer: Any
) -> LoadedModel:
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random numbers
        raise unreadable(
            f"{path} lacks {len(missing)} weights of the model that its config describes, "
            f"first {missing[0]}"
        )
    model.eval().requires_grad_(False)
    stacks = Stacks.of(model.config) if model.config.is_encoder_decoder else None
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    layers = stacks.layers if stacks else number
    if not isinstance(layers, int) or layers < 1:
        raise UnknownArchitectureError(f"{path}: the config tells of no layers.")
    ref = ModelRef(
        source=source,
        architecture=type(model).__name__,
        num_layers=layers,
        encoder_layers=None if stacks is None else stacks.encoder,
        sha256=path_sha256(path),
        revision=cache_revision(path),
    )
    return LoadedModel(model, tokenizer, ref, path)


_CHANGED = threading.RLock()


def load_gguf(
    path: Path, dtype: Any, dangers: Dangers | None = None
) -> tuple[Any, dict[str, Any], Any]:
    """Loads a GGUF file into a model that can be saved and exported like any other.

    transformers would read more of the file's folder: it gets one with nothing else in it.
    """
    transformers = require("transformers", extra="torch")
    require("gguf", extra="gguf")
    try:
        with header_read_once(), scratch_folder("gguf") as folder:
            (folder / path.name).symlink_to(path.resolve())
            place = {"gguf_file": path.name, "local_files_only": True}
            config = transformers.AutoConfig.from_pretrained(folder, **place)
            refuse_entries({"model_type": config.model_type}, path, dangers or Dangers())
            model, info = auto_class(config, trust_remote_code=False).from_pretrained(
                folder, **place, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
            auto = transformers.AutoTokenizer
            tokenizer = auto.from_pretrained(folder, **place, trust_remote_code=False)
        model.config.name_or_path = str(path.parent)
    except UnsafeModelError:
        raise
    # The reader has no error class of its own; a cut or odd file gives anything from a KeyError
    # to a numpy reshape error.
    except Exception as error:
        raise _load_error(path, error) from error
    return _unquantized(model), info, tokenizer


def _load_error(path: Path, error: Exception) -> ModelSourceError:
    """The error of a model that transformers does not load."""
    if any(map(is_out_of_memory, error_chain(error))):
        return ModelSourceError(
            f"{path} takes more memory than there is: {first_line(error)}.",
            "Take a machine with more memory, or a smaller type where the command has --dtype.",
            code=TOO_LARGE,
        )
    return ModelSourceError(
        f"{path} can't be loaded: {first_line(error)}.",
        "Is it whole, and does this version of transformers know the model? Of a GGUF file another "
        "quantization may do.",
        code="load-failed",
    )


def _unquantized(model: Any) -> Any:
    """The same weights in a model that does not remember that they were quantized.

    transformers refuses to save or further convert a model that came from GGUF.
    """
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _no_init_weights():
        fresh = type(model)(config).to(model.dtype)
    # assign: the tensors move over, they are not copied.
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def _no_init_weights() -> contextlib.AbstractContextManager[None]:
    try:
        holder = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4.57
        holder = importlib.import_module("transformers.modeling_utils")
    context: contextlib.AbstractContextManager[None] = holder.no_init_weights()
    return context


@contextlib.contextmanager
def header_read_once() -> Iterator[None]:
    """Lets gguf's readers and tables of names take over what an equal one has worked out before.

    Nothing is kept past the end. Loads in several threads wait for each other.
    """
    gguf = require("gguf", extra="gguf")
    with _CHANGED, contextlib.ExitStack() as stack:
        for kind in (gguf.GGUFReader, gguf.TensorNameMap):
            stack.callback(setattr, kind, "__init__", kind.__init__)
            stack.callback(delattr, kind, "__setattr__")
            kind.__init__, kind.__setattr__ = _once(kind), _set_without_memmap
        yield


def _once(kind: Any) -> Any:
    """The class's ``__init__``, which runs once for the same arguments."""
    real = kind.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        key = (args, tuple(kwargs.items()))
        if key not in known:
            real(self, *args, **kwargs)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init


def _set_without_memmap(self: Any, name: str, value: Any) -> None:
    # Slicing numpy's memmap costs several times what slicing a plain array over the same bytes
    # does, and a vocabulary is hundreds of thousands of slices.
    object.__setattr__(self, name, np.asarray(value) if isinstance(value, np.memmap) else value)
