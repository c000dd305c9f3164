"""What an arm is, told by how it is written.

``torch:DIR`` and ``torch-compile:DIR`` are run by PyTorch, ``openvino:DIR`` by OpenVINO and
``llama.cpp:FILE`` by llama.cpp. An engine is told by its file's name,
a folder by what lies in it: where there is an ONNX file that is meant, and engines must be named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.artifacts import FLOAT_BASELINE, FLOAT_CANDIDATE
from exporter.compare.arms import ComparedArm
from exporter.compare.engine_arm import open_engine_pair, open_engine_reference, open_file_arm
from exporter.compare.options import CompareOptions
from exporter.compare.torch_arm import open_torch_arm
from exporter.engines.build.engine_set import names_engines
from exporter.engines.runners.registry import ONNX, named_backend
from exporter.errors import ComparisonError, DepthcutError, UsageError
from exporter.models.model_folder import names_image_classifier, read_config

_PREFIXES = ("torch", "torch-compile")
_TAKEN = ("baseline", "candidate", FLOAT_BASELINE, FLOAT_CANDIDATE)
"""Names that a reference can't have in the report."""


@dataclass(frozen=True)
class ArmName:
    """An arm as it was asked for.

    Attributes:
        kind: What runs it: a backend among :data:`exporter.engines.runners.registry.RUNNERS`,
            ``engine``, ``torch`` or ``torch-compile``.
        path: Where its model is.
    """

    kind: str
    path: Path

    @classmethod
    def of(cls, text: Path | str) -> ArmName:
        """Reads ``PATH`` or ``KIND:PATH``; a file of such a name is written ``./torch:x``.

        Raises:
            UsageError: It names times that another tool took.
        """
        kind, colon, rest = str(text).partition(":")
        if colon and kind == "times":
            raise UsageError(
                "Arms of times: were removed.",
                "Name the models themselves; depthcut times both in turns.",
                code="removed-arm",
            )
        if colon and kind in _PREFIXES:
            return cls(kind, Path(rest))
        backend, path = named_backend(text)
        return cls(backend or ("engine" if names_engines(path) else ONNX), path)

    @property
    def prefix(self) -> str:
        """What is written before its path."""
        return "" if self.kind in ("engine", ONNX) else f"{self.kind}:"

    @property
    def is_torch(self) -> bool:
        """Whether PyTorch runs it."""
        return self.kind in ("torch", "torch-compile")

    def __str__(self) -> str:
        return f"{self.prefix}{self.path}"


def same_kind(baseline: Path | str, candidate: Path | str) -> tuple[ArmName, ArmName]:
    """What the two arms are.

    Raises:
        ComparisonError: They are of different kinds.
    """
    first, second = ArmName.of(baseline), ArmName.of(candidate)
    if first.kind != second.kind:
        raise ComparisonError(
            f"{first} and {second} are of different kinds: the difference in speed would not "
            "be the effect of the cut.",
            "Compare two of a kind, and name the third as a --reference.",
            code="different-kinds",
        )
    return first, second


def reads_images(name: ArmName) -> bool:
    """Whether the config of an arm names a classifier of images; nothing is loaded for it."""
    home = name.path if name.path.is_dir() else name.path.parent
    try:
        return names_image_classifier(read_config(home))
    except DepthcutError:  # told where the arm is opened
        return False


def open_pair(
    baseline: Path | str,
    candidate: Path | str,
    options: CompareOptions,
    *,
    threads: int,
    onnx: tuple[Path, Path] | None = None,
) -> tuple[ComparedArm, ComparedArm]:
    """Finds both arms' files; their runners are not entered yet.

    Args:
        baseline: As it was asked for.
        candidate: Likewise.
        options: How to measure.
        threads: CPU threads.
        onnx: For engines, the ONNX files that they were built from; by default they are looked
            for.

    Raises:
        ComparisonError: They are of different kinds, ``config.json`` is no JSON object, or an
            engine was built from another ONNX file.
        UsageError: ONNX files are named for arms that are no engines.
        EngineError: There is no engine, or it is not what its record says.
        OnnxFileError: A file is no complete ONNX model.
        BackendError: The provider is not known.
        ModelSourceError: A PyTorch model can't be loaded.
        MissingDependencyError: What runs an arm is not installed.
    """
    names = same_kind(baseline, candidate)
    if onnx is not None and names[0].kind != "engine":
        raise UsageError(
            "--engine-onnx is for engines, and these are not engines.",
            code="onnx-without-engine",
        )
    if names[0].kind == "engine":
        first_path, second_path = (name.path for name in names)
        return open_engine_pair(first_path, second_path, options, threads=threads, onnx=onnx)
    first, second = (_open(name, options, threads=threads) for name in names)
    return first, second


def open_references(
    arms: Sequence[Path | str], baseline: ComparedArm, options: CompareOptions, *, threads: int
) -> dict[str, ComparedArm]:
    """Finds the files of further arms.

    Args:
        arms: As they were asked for.
        baseline: What they stand beside; PyTorch runs its precision.
        options: How to measure.
        threads: CPU threads.

    Returns:
        The arms by what the report calls them.

    Raises:
        UsageError: One is named twice.
        ComparisonError: One has another vocabulary than the baseline, or is an engine and can't
            run here.
        DepthcutError: As :func:`open_pair`.
    """
    names = [ArmName.of(text) for text in arms]
    precision = baseline.facts.precision
    found = {}
    for title, name in zip(_titles(names), names, strict=True):
        arm = _open(name, options, threads=threads, precision=precision)
        _refuse_other_vocabulary(baseline, arm, f"reference {title}")
        found[title] = arm
    return found


def open_floats(
    arms: tuple[Path | str, Path | str],
    quantized: tuple[ComparedArm, ComparedArm],
    options: CompareOptions,
    *,
    threads: int,
) -> dict[str, ComparedArm]:
    """Finds the files of both models in float.

    Args:
        arms: As they were asked for, the whole one first.
        quantized: Their quantised forms.
        options: How to measure.
        threads: CPU threads.

    Returns:
        The two by what the report calls them.

    Raises:
        ComparisonError: They are of another kind than each other, or engines that can't run here.
        DepthcutError: As :func:`open_pair`.
    """
    found = {}
    titles = (FLOAT_BASELINE, FLOAT_CANDIDATE)
    for title, name, other in zip(titles, same_kind(*arms), quantized, strict=True):
        found[title] = _open(name, options, threads=threads)
        _refuse_other_vocabulary(other, found[title], title)
    return found


def _open(
    name: ArmName,
    options: CompareOptions,
    *,
    threads: int,
    precision: str | None = None,
) -> ComparedArm:
    if name.kind == "engine":
        return open_engine_reference(name.path, options, threads=threads)
    if name.is_torch:
        return open_torch_arm(
            name.path,
            compiled=name.kind == "torch-compile",
            provider=options.provider,
            threads=threads,
            precision=precision,
        )
    arm = open_file_arm(name.path, options, threads=threads, backend=name.kind)
    return replace(arm, prefix=name.prefix)


def _refuse_other_vocabulary(baseline: ComparedArm, arm: ComparedArm, title: str) -> None:
    ours, theirs = baseline.facts.vocabulary, arm.facts.vocabulary
    if ours is not None and theirs is not None and ours != theirs:
        raise ComparisonError(
            f"The {title} knows {theirs} tokens, the baseline {ours}: they are of "
            "different models.",
            "Give the model that the baseline was exported from.",
            code="other-vocabulary",
        )


def _titles(names: Sequence[ArmName]) -> list[str]:
    """What the report calls each: the end of its path, or all of it where that isn't its alone."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UsageError(f"The reference {twice} is given twice.", code="named-twice")
    ends = [f"{name.prefix}{name.path.name}" for name in names]
    return [
        end if (*ends, *_TAKEN).count(end) == 1 else _whole(name)
        for end, name in zip(ends, names, strict=True)
    ]


def _whole(name: ArmName) -> str:
    return f"./{name}" if str(name) in _TAKEN else str(name)
