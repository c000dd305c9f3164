"""What is known of a pruned checkpoint once it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.base import Record
from exporter.models.loading.checked_folder import CONFIG, read_object
from exporter.models.loading.model_source import DTYPES, LoadedModel
from exporter.models.loading.sources import resolve_source
from graph_passes.files.reading import read_text

CheckpointForm = Literal["own", "decilm"]
"""As transformers has a pruned model, or as servers load one with gaps."""

_FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_LICENSE_LINE = re.compile(r"(license(?:_name|_link)?): *(\S.*?) *")


class Weights(Record):
    """Parameters and their bytes; those that two modules share count once."""

    parameters: int
    bytes: int


class CheckpointFacts(Record):
    """What a checkpoint is, for its card and for whoever made it."""

    base: str
    on_hub: bool
    base_sha256: str
    architecture: str
    layers: int
    deletions: list[PlannedDeletion]
    kept: list[int] | None  # None where it has all of them, some with gaps
    plain: bool
    transformers: str
    dtype: str
    before: Weights
    after: Weights
    license: dict[str, str] = Field(default_factory=dict)
    has_tokenizer: bool = False
    has_modules: bool = False
    servers: list[str] = Field(default_factory=list)

    @property
    def healed(self) -> bool:
        """Whether anything stands in the dropped branches' places."""
        return any(deletion.replacement != "none" for deletion in self.deletions)

    @property
    def loader_words(self) -> str:
        """Who loads it, in half a sentence."""
        if self.servers:
            return f"a DeciLM for {', '.join(self.servers)}"
        if self.kept is not None:
            return "transformers loads it like any model"
        return (
            f"depthcut's load_pruned loads it, transformers {self.transformers} refuses it: it "
            "leaves no modules out"
        )


def weights_of(model: Any) -> Weights:
    """Counts a model's parameters."""
    tensors = list(model.parameters())
    return Weights(
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def name_of_base(loaded: LoadedModel) -> tuple[str, bool]:
    """What a model is called, and whether that is its name on the Hub; no path is told."""
    source = loaded.ref.source
    if Path(source).expanduser().exists():
        return loaded.path.resolve().name, False
    return source.removeprefix("hf:"), source.startswith("hf:") or source.count("/") == 1


def own_dtype(source: str, **loading: Any) -> str:
    """The dtype that a model's config names, where it is one that models are loaded in.

    Else, as for a GGUF file, ``float32``. ``loading`` goes to
    :func:`~exporter.models.loading.sources.resolve_source`.
    """
    path = resolve_source(source, **loading)
    config: Any = {}
    if path.is_dir():
        config = read_object(path / CONFIG)
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named) if named in DTYPES else DTYPES[0]


def license_of_base(folder: Path) -> dict[str, str]:
    """The licence that a model's card names; empty where there is no card."""
    try:
        text = read_text(folder / "README.md")
    except (OSError, UnicodeDecodeError):
        return {}
    head = _FRONT_MATTER.match(text)
    lines = map(_LICENSE_LINE.fullmatch, head[1].splitlines() if head else ())
    return {line[1]: line[2] for line in lines if line}
