"""All ways to use what lies in a folder, and the file in that folder that tells them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.artifacts.uses import PLACE, FolderUses, Use
from exporter.engines.usage.library_lines import (
    build_lines,
    depthcut_lines,
    genai_lines,
    optimum_lines,
    sentence_lines,
)
from exporter.engines.usage.model import TOKENIZER, UsedModel
from exporter.engines.usage.onnxruntime_lines import PROMPT, decoder_lines, encoder_lines
from exporter.errors import ComparisonError, SurgeryError, UnsafeInputError
from exporter.files import write_text
from exporter.report.markdown import code, section_markdown
from exporter.report.sections.use import use_sections
from graph_passes.files.reading import read_text

USE_FILE = "USE.md"
_IN_QUOTES = re.compile(r"[\w ./+-]+")
HERE = "."
"""The folder in its own file: the lines are run in it."""
_OTHER = (depthcut_lines, genai_lines, optimum_lines, sentence_lines, build_lines)
_NO_CHECKPOINT = (
    "transformers: this folder has no PyTorch weights, so `from_pretrained` does not load it. "
    "`depthcut export MODEL -o out --checkpoint` writes a checkpoint of the pruned model to "
    "`out/candidate/hf`, whose README.md says how to load it; `depthcut checkpoint MODEL plan.json "
    "-o DIR` writes it alone."
)
_NO_CONFIG = (
    "onnxruntime-genai: there is no genai_config.json here. `depthcut export --target "
    "onnxruntime-cpu` writes one where onnxruntime-genai can run the model."
)


def graph_uses(graph: Path, beside: Sequence[Path] = (), *, folder: str = HERE) -> FolderUses:
    """All ways to use a graph; empty where its names could not stand in code.

    Args:
        graph: The ONNX file.
        beside: The folders whose files will lie beside it; by default its own.
        folder: What the lines call its folder.

    Raises:
        OnnxFileError: It is no ONNX file.
        ComparisonError: A config is no JSON object.
        UnsafeInputError: A file may not be read from where it is.
    """
    model = UsedModel.read(graph, beside or [graph.parent])
    if not model.is_plainly_named:
        return FolderUses(folder=folder)
    own: Callable[[UsedModel], Use | None] = decoder_lines if model.generates else encoder_lines
    ways = [own(model), *(lines(model) for lines in _OTHER)]
    notes = [_NO_CHECKPOINT] if model.config else []
    if model.pasts and not model.for_genai:
        notes.append(_NO_CONFIG)
    return FolderUses(folder=folder, uses=[use for use in ways if use is not None], notes=notes)


def engine_uses(tokenizer: str | None, *, file: str = "", folder: str = HERE) -> FolderUses:
    """How engines are run.

    Args:
        tokenizer: Where their model's tokenizer is, seen from their folder; None: it has none, or
            it doesn't generate.
        file: The engine's name in the folder; empty where the folder holds one model's alone.
        folder: What the lines call it.
    """
    place = f"{PLACE}/{file}" if file else PLACE
    if tokenizer is None:
        lines = [
            "from pathlib import Path",
            "from exporter.engines.runners.registry import open_model",
            "",
            f"_, runner = open_model(Path({PLACE}{f', {file!r}' if file else ''}))",
            "with runner:",
            "    print([(each.name, each.dtype, each.shape) for each in runner.inputs])",
            "    # runner.run(arrays by these names) gives the outputs by theirs",
        ]
        use = Use(library="Engines", needs="", text="\n".join(lines), remark=_NEEDS_GPU)
    else:
        text = f'depthcut generate "${place}" "{PROMPT}" --tokenizer "${PLACE}/{tokenizer}"'
        use = Use(library="Engines", needs="", text=text, language="sh", remark=_NEEDS_GPU)
    return FolderUses(folder=folder, uses=[use])


_NEEDS_GPU = "This needs an NVIDIA GPU, and the library that built the engines."


def use_text(name: str, uses: FolderUses) -> str:
    """The text of the file that tells how a model is used; empty where no way is known."""
    if not uses.uses:
        return ""
    title = _title(name)
    told = f"The lines are run in this folder; elsewhere, let {PLACE} be its path."
    sections = map(section_markdown, use_sections(uses))
    return "\n\n".join([title, told, *sections]) + "\n"


def write_built_use(
    graph: Path, engines: Sequence[Path], stage: Path, *, generates: bool
) -> list[tuple[Path, Path]]:
    """Writes how engines in a folder are run, for those that were just built of a graph.

    Args:
        graph: The ONNX file; its tokenizer lies beside it.
        engines: All in one folder.
        stage: Where the file is written.
        generates: Whether they can.

    Returns:
        The file and its place; nothing where their names could not stand in a shell's line.
    """
    folder, file = engines[0].parent, engines[0].name if len(engines) == 1 else ""
    home = os.path.relpath(graph.parent, folder)
    if not _IN_QUOTES.fullmatch(home + file):
        return []
    speaks = generates and (graph.parent / TOKENIZER).is_file()
    place = use_place(folder, file or folder.resolve().name)
    uses = engine_uses(home if speaks else None, file=file)
    written = stage / USE_FILE
    write_text(written, use_text(file or folder.resolve().name, uses))
    return [(written, place)]


def stage_graph_use(output: Path, stage: Path) -> list[tuple[Path, Path]]:
    """Writes that file for a graph into a staging folder, where what goes with it is staged, too.

    Args:
        output: The graph's place; what lies beside it already counts.
        stage: The folder, which holds the graph under its final name.

    Returns:
        Staged and final path; nothing where no way is known, or where a file beside the graph can't
        be read: that hinders nothing else.
    """
    try:
        text = use_text(output.name, graph_uses(stage / output.name, [stage, output.parent]))
    except (ComparisonError, SurgeryError, UnsafeInputError):  # the second of onnxruntime-genai's
        return []
    if not text:
        return []
    write_text(stage / USE_FILE, text)
    return [(stage / USE_FILE, use_place(output.parent, output.name))]


def write_graph_use(graph: Path) -> None:
    """Writes that file beside a graph, in a folder that the caller stages."""
    write_use(graph.name, graph_uses(graph), graph.parent)


def write_use(name: str, uses: FolderUses, folder: Path) -> None:
    """Writes that file into a folder, where a way is known."""
    text = use_text(name, uses)
    if text:
        write_text(folder / USE_FILE, text)


def use_place(folder: Path, name: str) -> Path:
    """The place for a file's lines in a folder: its own name where others' have the usual one."""
    usual = folder / USE_FILE
    try:
        taken = usual.exists() and not read_text(usual).startswith(f"{_title(name)}\n")
    except (ValueError, UnsafeInputError):  # no text, or not to be read
        taken = True
    return folder / f"{name}.{USE_FILE}" if taken else usual


def _title(name: str) -> str:
    return f"# How to use {code(name)}"
