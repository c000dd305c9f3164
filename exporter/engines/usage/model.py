"""What a folder tells of the model in it, as far as it decides how the model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.artifacts.forms import FORM_KEY, FormRecord
from exporter.engines.runners.cache_form import CacheForm, read_cache_form
from exporter.models.genai_config import find_config
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.model_folder import longest_sequence, read_object, token_ids
from exporter.models.sentence_folder import MEAN, MODULES, Pooling, pooling_of
from graph_passes.files.storage import load_model

TOKENIZER = "tokenizer.json"
NEW_TOKENS = 20
_LEFT_OUT = 8  # room for the prompt
_PLAIN = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class UsedModel:
    """A graph and what lies beside it.

    Attributes:
        file: The graph's file name.
        inputs: Those that a caller has to give, by name.
        outputs: Their names.
        form: Of the caches.
        written: How the graph says that it was written; None where it doesn't.
        config: ``config.json``; empty where there is none.
        ends: Tokens that end a text.
        has_tokenizer: Whether ``tokenizer.json`` is there.
        has_modules: Whether sentence-transformers knows the folder.
        pooling: How its token states are pooled.
        for_genai: Whether onnxruntime-genai's config names the graph.
    """

    file: str
    inputs: Mapping[str, ir.Value]
    outputs: Sequence[str]
    form: CacheForm
    written: FormRecord | None
    config: Mapping[str, Any]
    ends: Sequence[int]
    has_tokenizer: bool
    has_modules: bool
    pooling: Pooling
    for_genai: bool

    @classmethod
    def read(cls, graph: Path, beside: Sequence[Path]) -> UsedModel:
        """Looks at a graph, whose weights are not read.

        Args:
            graph: The ONNX file.
            beside: The folders whose files will lie beside it; the first that has a file counts.

        Raises:
            OnnxFileError: It is no ONNX file.
            ComparisonError: A config is no JSON object.
            UnsafeInputError: One may not be read from where it is.
        """
        model = load_model(graph)
        given = [
            value for value in model.graph.inputs if value.name not in model.graph.initializers
        ]
        config = _object(beside, "config.json")
        listed = _first(beside, MODULES)
        ends = _object(beside, "generation_config.json").get("eos_token_id")
        return cls(
            file=graph.name,
            inputs={value.name or "": value for value in given},
            outputs=[value.name or "" for value in model.graph.outputs],
            form=read_cache_form(graph),
            written=_form(model.metadata_props.get(FORM_KEY)),
            config=config,
            ends=token_ids(config.get("eos_token_id") if ends is None else ends),
            has_tokenizer=_first(beside, TOKENIZER) is not None,
            has_modules=listed is not None,
            pooling=MEAN if listed is None else pooling_of(listed.parent),
            for_genai=any(find_config(folder / graph.name) is not None for folder in beside),
        )

    @property
    def pasts(self) -> list[str]:
        """The inputs that are caches."""
        return [name for name in self.inputs if CACHE_INPUT.fullmatch(name)]

    @property
    def new_tokens(self) -> int:
        """How many tokens the lines generate; fewer where a text can't be long."""
        known = [longest_sequence(dict(self.config)), self.form.longest]
        longest = min((each for each in known if each is not None), default=None)
        return NEW_TOKENS if longest is None else max(1, min(NEW_TOKENS, longest - _LEFT_OUT))

    @property
    def target(self) -> str:
        """The runtime that it was written for; ``portable`` where that isn't known."""
        return "portable" if self.written is None else self.written.target

    @property
    def is_plainly_named(self) -> bool:
        """Whether its file and its outputs have names that may stand in code as they are."""
        return all(map(_PLAIN.fullmatch, [self.file, *self.outputs]))

    @property
    def architecture(self) -> str:
        """The class that the config names; empty where it names none."""
        names = self.config.get("architectures")
        return str([*names, ""][0]) if isinstance(names, list) else ""

    @property
    def generates(self) -> bool:
        """Whether it gives logits and keeps what it has seen in caches, or no attention is left."""
        causal = self.architecture.endswith(("ForCausalLM", "LMHeadModel"))
        return "logits" in self.outputs and (bool(self.pasts) or causal)


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _object(folders: Sequence[Path], name: str) -> dict[str, Any]:
    path = _first(folders, name)
    return {} if path is None else read_object(path)


def _form(note: str | None) -> FormRecord | None:
    try:
        return None if note is None else FormRecord.model_validate_json(note)
    except ValueError:  # of another version: whoever reads it tells
        return None
