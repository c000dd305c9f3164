"""A model as it lies on disk: the ONNX file, and the config and tokenizer beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.artifacts.base import OF_IMAGES as OF_IMAGES
from exporter.artifacts.plan_dialects import layers_in, nested_configs
from exporter.errors import ComparisonError, ModelSourceError, OnnxFileError, UnsafeModelError
from exporter.models.genai_config import CONFIG_FILE
from graph_passes.files.reading import TABLE_BYTES, check_file, read_json
from graph_passes.types import MOST_LAYERS

_GENAI_WORDS = {
    "eos_token_id": "eos_token_id",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}
"""What ``config.json`` calls a value, and what ``genai_config.json`` does."""
_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")
_MOST_COLOURS = 1 << 26  # of all pixels of an image: 256 MB in float32
PIXELS = "pixel_values"
"""The input of models of images."""
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", OF_IMAGES)
"""How the names of classes end that give each text, each of its tokens, or each image a class."""


_POSITIONS_BEHIND_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""The models whose table of positions has rows that no text uses."""


@dataclass(frozen=True)
class ModelFolder:
    """Where a model's files are."""

    onnx: Path
    tokenizer: Path | None  # `tokenizer.json` beside it, or None
    config: dict[str, Any]

    @classmethod
    def beside(cls, model: Path, home: Path, config: dict[str, Any] | None = None) -> ModelFolder:
        """A model whose tokenizer lies in ``home``, and so does its config unless it is given."""
        tokenizer = home / "tokenizer.json"
        check_file(tokenizer, limit=TABLE_BYTES)
        result = read_config(home) if config is None else config
        for part in nested_configs(result):
            if (layers_in(part) or 0) > MOST_LAYERS:
                raise UnsafeModelError(
                    f"{home / 'config.json' if config is None else model} tells of "
                    f"{layers_in(part)} layers; no model has more than {MOST_LAYERS}.",
                    "Fetch the model again, or correct its config.",
                )
        return cls(model, tokenizer if tokenizer.is_file() else None, result)

    @property
    def home(self) -> Path:
        """The folder with what the model ships with."""
        return (self.tokenizer or self.onnx).parent

    @property
    def classifies(self) -> bool:
        """Whether the config names a class that gives each text or token a class."""
        names = self.config.get("architectures") or [""]
        return str(names[0]).endswith(CLASSIFIERS)

    @property
    def classifies_images(self) -> bool:
        """Whether the config names a class that gives each image a class."""
        return names_image_classifier(self.config)

    @property
    def patches(self) -> int:
        """Of an image, as the config says; 1 where it doesn't."""
        return image_patches(self.config)

    @property
    def predicts_next_token(self) -> bool:
        """Whether the config names a class that predicts the next token."""
        names = self.config.get("architectures") or [""]
        return str(names[0]).endswith(_CAUSAL_CLASSES)

    @property
    def longest_sequence(self) -> int | None:
        """Positions that the model knows, as its config says."""
        return longest_sequence(self.config)

    @property
    def layers(self) -> int | None:
        """Layers of the model before anything was cut out of it, as its config says."""
        for key in ("num_hidden_layers", "n_layer"):
            value = self.config.get(key)
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a text, as the config says."""
        value = self.config.get("eos_token_id")
        first = value[0] if isinstance(value, list) and value else value
        return first if isinstance(first, int) else None


def longest_sequence(config: dict[str, Any]) -> int | None:
    """Positions that a model knows, as its config says."""
    for key in ("max_position_embeddings", "n_positions"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value - _unused_positions(config)
    return None


def token_ids(entry: object) -> list[int]:
    """The tokens that a config's entry names: one or a list; no other value is one."""
    values = entry if isinstance(entry, list) else [entry]
    return [number for number in values if isinstance(number, int)]


def _unused_positions(config: dict[str, Any]) -> int:
    """Of RoBERTa and its relatives, which number positions from one behind the padding's id on."""
    padding = config.get("pad_token_id")
    counts = str(config.get("model_type")) in _POSITIONS_BEHIND_PADDING
    return padding + 1 if counts and isinstance(padding, int) else 0


def names_image_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config names a class that gives each image a class, by one head or by several."""
    names = config.get("architectures")
    return isinstance(names, list) and OF_IMAGES in str([*names, ""][0])


def image_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Colours, height and width of the images that a model reads, as its config says."""
    colours, size = config.get("num_channels", 3), config.get("image_size")
    sides = [*size] if isinstance(size, list | tuple) else [size, size]
    shape = (colours, *sides)
    whole = all(isinstance(number, int) and number > 0 for number in shape)
    if len(shape) != 3 or not whole or math.prod(shape) > _MOST_COLOURS:
        raise ModelSourceError(
            f"The config says {size!r:.60} for image_size and {colours!r:.60} for num_channels; an "
            f"image has at most {_MOST_COLOURS:,} numbers.",
            "Take the config that belongs to the model.",
            code="odd-setting",
        )
    return shape


def image_patches(config: Mapping[str, Any]) -> int:
    """Of an image, as a config says; 1 where it doesn't."""
    size = config.get("patch_size")
    if not isinstance(size, int) or size < 1:
        return 1
    _, height, width = image_shape(config)
    return max(1, (height // size) * (width // size))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object beside a model; empty where the file is not there."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ComparisonError(f"{path} can't be read as JSON: {error}.", code="not-json") from error
    if not isinstance(content, dict):
        raise ComparisonError(f"{path} holds no JSON object.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder, or what onnxruntime-genai's config tells in the same words."""
    config = read_object(folder / "config.json")
    result = {} if config else read_object(folder / CONFIG_FILE).get("model")
    if not isinstance(result, dict):
        return config
    words = {key: result.get(name) for key, name in _GENAI_WORDS.items()}
    return config | {key: value for key, value in words.items() if value is not None}


def find_model(path: Path) -> ModelFolder:
    """Finds the files of a model."""
    onnx = find_onnx(path)
    return ModelFolder.beside(onnx, onnx.parent)


def find_onnx(path: Path) -> Path:
    """The ONNX file itself, or that of a folder: ``model.onnx``, or the only one."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise OnnxFileError(
            f"{path} does not exist.",
            "Name an ONNX file or a folder with one.",
            code="file-missing",
        )
    default = path / "model.onnx"
    paths = [default] if default.is_file() else sorted(path.glob("*.onnx"))
    if len(paths) != 1:
        text = f"{len(paths)} ONNX files and no model.onnx" if paths else "no ONNX file"
        raise OnnxFileError(
            f"{path} holds {text}.", "Name the ONNX file itself.", code="file-missing"
        )
    check_file(paths[0], path)
    return paths[0]


Graph = Literal["encoder_model", "decoder_model", "decoder_with_past_model"]

ENCODER: Graph = "encoder_model"
FIRST_STEP: Graph = "decoder_model"
"""The decoder's first step: it reads what the encoder gave, and fills both caches."""
NEXT_STEP: Graph = "decoder_with_past_model"
"""Each further step: it reads both caches."""
GRAPHS: tuple[Graph, ...] = (ENCODER, FIRST_STEP, NEXT_STEP)


def graph_file(folder: Path, graph: Graph) -> Path:
    """Where a graph lies in its folder."""
    return folder / f"{graph}.onnx"


def holds_stacks(folder: Path) -> bool:
    """Whether a folder holds an encoder-decoder's graphs, or some of them."""
    return any(graph_file(folder, graph).is_file() for graph in (ENCODER, NEXT_STEP))
