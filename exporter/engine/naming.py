"""What an engine's file is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.engine.driver import ask_driver
from exporter.engine.flavours import Flavour
from exporter.engine.graph import GraphFacts
from exporter.engine.profiles import Profile
from exporter.engine.settings import BuildSettings

_SHORT = {"attention": "attn", "cross_attention": "cross"}


@dataclass(frozen=True)
class Marks:
    """What tells an engine from others of the same graph; empty where nothing has to.

    Attributes:
        phases: Such as ``decode``.
        number: Of several builds, such as ``b1``.
    """

    phases: str = ""
    number: str = ""


def is_folder(target: Path) -> bool:
    """Whether an engine is to be named after what it is, in a folder."""
    return target.is_dir() or not target.suffix


def phase_mark(target: Path, group: Sequence[Profile], *, split: bool, whole: bool) -> str:
    """The phases, where an engine's name has to tell them; a name that was given stays."""
    tells = split or (is_folder(target) and not whole)
    return "+".join(profile.phase for profile in group) if tells else ""


def with_marks(path: Path, marks: Marks) -> Path:
    """A given file name with the marks in it: ``m.engine`` becomes ``m-decode-b1.engine``."""
    parts = filter(None, [path.stem, marks.phases, marks.number])
    return path.with_name("-".join(parts) + path.suffix)


def engine_name(
    onnx: Path,
    flavour: Flavour,
    version: str,
    facts: GraphFacts,
    settings: BuildSettings,
    marks: Marks,
) -> str:
    """A file name that says what an engine is: ``smollm2-attn8-fp16-sm80-rtx1.7.1.engine``.

    Args:
        onnx: The graph's file; one that is called ``model.onnx`` gives its folder's name.
        flavour: The library.
        version: Its version, of which three numbers are told.
        facts: What the graph tells.
        settings: How it was built.
        marks: What tells it from other engines of the graph.
    """
    stem = onnx.stem if onnx.stem != "model" else onnx.parent.resolve().name
    cuts = Counter(_SHORT.get(entry["kind"], entry["kind"]) for entry in facts.plan)
    cards = "+".join(settings.compute_capabilities) or _this_card()
    library = flavour.short + ".".join(version.split(".")[:3])
    cut = [f"{kind}{count}" for kind, count in cuts.items()]
    parts = [stem, *cut, facts.precision, marks.phases, cards, library, marks.number]
    return "-".join(filter(None, parts)) + ".engine"


def _this_card() -> str:
    driver = ask_driver()
    return "" if driver.problem else driver.devices[0].compute_capability
