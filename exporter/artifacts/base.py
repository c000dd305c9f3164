"""What every file between the stages has in common: validation, versions, its parents' hashes."""

from __future__ import annotations

import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from exporter.errors import ArtifactError, UnsafeInputError
from exporter.files import write_text
from exporter.printable import printable_json
from graph_passes.files.placing import finish_interrupted
from graph_passes.files.reading import RECORD_BYTES, parse_json, read_text
from graph_passes.types import MOST_LAYERS

SCHEMA_VERSION = 1
_AGAIN = "Write it again with this version of depthcut, or remove it."

Layer = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
Layers = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
Count = Annotated[int, Field(ge=0, le=1 << 62)]
"""Of nodes, tokens or bytes: a float holds it."""
Length = Annotated[int, Field(ge=0, le=1 << 30)]
"""Of a text, or how many of something there are in a list."""
Milliseconds = Annotated[float, Field(ge=1e-9, le=1e12)]
Factor = Annotated[float, Field(ge=1e-12, le=1e12)]
"""Of two times."""


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"it ends ({ends[1]}) before it begins ({ends[0]})")
    return ends


FactorRange = Annotated[tuple[Factor, Factor], AfterValidator(_ordered)]

_TOLD_VERSIONS = (
    "depthcut", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai", "onnxruntime-genai-cuda", "onnxscript", "torch", "transformers",
    "tokenizers", "gguf", "scipy", "optimum-onnx", "tensorrt", "tensorrt-cu12", "tensorrt-rtx",
    "tensorrt-rtx-cu12", "polygraphy", "openvino", "llama-cpp-python",
)  # fmt: skip


class Record(BaseModel):
    """An immutable part of a file; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="constants", str_max_length=1 << 20
    )
    gone: ClassVar[frozenset[str]] = frozenset()
    """Keys of earlier versions, which nothing reads any more."""

    @model_validator(mode="before")
    @classmethod
    def _without_gone(cls, content: Any) -> Any:
        if not (cls.gone and isinstance(content, dict)):
            return content
        return {name: value for name, value in content.items() if name not in cls.gone}


class Artifact(Record):
    """A stage's file: what it is, what it was made from, and by what."""

    schema_version: int = SCHEMA_VERSION
    kind: str = ""
    made_from: dict[str, str] = Field(default_factory=dict)
    """Role (``model``, ``plan``, ...) to the hex SHA-256 of what was read."""
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())
    command: list[str] = Field(default_factory=lambda: command_line())
    """The command line; empty from Python."""

    def _repr_html_(self) -> str | None:
        """What a notebook shows instead of the fields."""
        shown: str | None = import_module("exporter.report.notebook").cell(self)
        return shown

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A class has its kind from its name: a ``PruneReport`` is a ``prune_report``."""
        if "kind" not in cls.__annotations__:
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
            cls.model_fields["kind"].default = name
            cls.model_rebuild(force=True)

    def to_json(self) -> str:
        """The file's text."""
        return printable_json(self.model_dump_json(indent=2)) + "\n"

    def write(self, path: Path) -> Path:
        """Writes the file, whole or not at all."""
        write_text(path, self.to_json())
        return path

    @classmethod
    def read(cls, path: Path, *, named: bool = True) -> Self:
        """Reads and validates a file."""
        finish_interrupted(path)
        try:
            text = read_text(path, limit=RECORD_BYTES, named=named)
        except FileNotFoundError:
            raise ArtifactError(f"{path} does not exist.", code="file-missing") from None
        except UnicodeDecodeError as error:
            raise _of_other_kind("no text", cls, path) from error
        except OSError as error:
            raise ArtifactError(f"{path} can't be read: {error}.", code="unreadable") from error
        return _validated(cls, text, path)


_A = TypeVar("_A", bound=Artifact)


class _Head(BaseModel):
    """What is read first of any file: is it ours, and may this version read it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")
    schema_version: Annotated[int, Field(ge=1)]
    kind: str


FILE_KINDS = {
    "importance_report": ("an importance file", "depthcut score"),
    "score_comparison": ("a comparison of scores", "depthcut score --compare"),
    "pruning_plan": ("a pruning plan", "depthcut plan"),
    "healing_report": ("a report on healing", "depthcut heal"),
    "prune_report": ("a report of a cut", "depthcut prune"),
    "comparison_report": ("a comparison report", "depthcut compare"),
    "check_report": ("a report of a check", "depthcut check"),
    "history_entry": ("a history", "depthcut check --history"),
    "evaluation_report": ("a file of task scores", "depthcut evaluate"),
    "depths_report": ("a report on depths", "depthcut depths"),
    "sweep_report": ("a sweep's report", "depthcut sweep"),
    "engine": ("an engine's record", "depthcut build"),
    "cost_table": ("a table of costs", "depthcut costs"),
}
"""What each kind of file is called, and the command that makes one."""


def _of_other_kind(text: str, cls: type[Artifact], path: Path) -> ArtifactError:
    needed, command = FILE_KINDS[cls.model_fields["kind"].default]
    given, _ = FILE_KINDS.get(text, (text, ""))
    return ArtifactError(
        f"{path} is {given}; {needed} is needed here.",
        f"Make one with {command}.",
        code="wrong-kind",
    )


def _validated(cls: type[_A], text: str, path: Path) -> _A:
    try:
        content = parse_json(text, str(path))
    except UnsafeInputError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}.") from error
    try:
        head = _Head.model_validate(content)
        refuse_other_schema(head.schema_version, str(path))
        if head.kind != cls.model_fields["kind"].default:
            raise _of_other_kind(head.kind, cls, path)
        return cls.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        headless = first["type"] == "missing" and first["loc"] in (("schema_version",), ("kind",))
        if headless or (first["type"] == "model_type" and not first["loc"]):
            raise _of_other_kind("not a file written by depthcut", cls, path) from error
        unknown = first["type"] == "extra_forbidden"
        raise ArtifactError(
            f"{path}: {json_path(first['loc'])}: {first['msg']}.",
            "This version of depthcut has no such key." if unknown else "",
            code="other-schema" if unknown else "",
        ) from error


def refuse_other_schema(version: object, where: str) -> None:
    """Refuses what another version of the format wrote."""
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: $.schema_version is {version}; this depthcut reads {SCHEMA_VERSION}.",
            _AGAIN,
            code="other-schema",
        )


def json_path(location: tuple[int | str, ...]) -> str:
    """A pydantic location as a JSON path: ``$.deletions[3].layer``."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return "$" + "".join(parts)


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that decide results."""
    texts = {}
    for name in _TOLD_VERSIONS:
        try:
            texts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return texts


def command_line() -> list[str]:
    """What was typed; empty where another program runs."""
    program = Path(sys.argv[0])
    is_ours = program.stem == "depthcut" or program.parts[-3:] == ("exporter", "cli", "__main__.py")
    return ["depthcut", *sys.argv[1:]] if is_ours else []


Parts = Literal["tokens", "patches", "frames"]
"""What the length of what a model reads counts."""


class Nouns(NamedTuple):
    """What users call a model's samples."""

    one: str
    several: str
    parts: Parts

    @property
    def much(self) -> str:
        """What much of it is called: text, images, recordings."""
        return self.one if self.parts == "tokens" else self.several


OF_IMAGES = "ForImageClassification"
"""How the names of classes end that give each image a class."""
TEXTS = Nouns("text", "texts", "tokens")
IMAGES = Nouns("image", "images", "patches")
RECORDINGS = Nouns("recording", "recordings", "frames")
_OF_SOUND = ("Whisper", "Speech2Text")


def nouns_of(architecture: str) -> Nouns:
    """What a model reads, by the name of its class, such as ``ViTForImageClassification``."""
    if OF_IMAGES in architecture:
        return IMAGES
    return RECORDINGS if architecture.startswith(_OF_SOUND) else TEXTS
