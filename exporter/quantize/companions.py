"""What lies beside a model and makes it run: tokenizer, config, onnxruntime-genai's config."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from exporter.models.genai_config import CONFIG_FILE, find_config, rewritten
from graph_passes.files.locations import real
from graph_passes.files.reading import copy_file

_PATTERNS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.spm", "spiece.model",
)  # fmt: skip


def stage_companions(source: Path, output: Path, stage: Path) -> list[tuple[Path, Path]]:
    """Puts copies of what a model ships with into a staging folder.

    Nothing that stands in the output's folder already is replaced, and nothing is copied where the
    source and the output share a folder.

    Args:
        source: The ONNX file that they lie beside.
        output: The ONNX file that they are for; onnxruntime-genai's config gets its name.
        stage: The staging folder.

    Returns:
        Staged file and final name.

    Raises:
        UnsafeInputError: One of them may not be read from where it is.
        SurgeryError: onnxruntime-genai's config can't be read, or names the source as something
            other than the one decoder.
    """
    if real(source.parent) == real(output.parent):
        return []
    moves = []
    for path in sorted(source.parent.iterdir()):
        target = output.parent / path.name
        if _belongs(path.name) and not path.is_dir() and not target.exists():
            moves.append((copy_file(path, stage / path.name), target))
    config, target = find_config(source), output.parent / CONFIG_FILE
    if config is not None and not target.exists():
        staged = stage / CONFIG_FILE
        staged.write_text(rewritten(config, output.name, (), (), {}), encoding="utf-8")
        moves.append((staged, target))
    return moves


def _belongs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _PATTERNS)
