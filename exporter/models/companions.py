"""What a model ships with beside its weights: config, tokenizer, how sentences are pooled.

Files are known by their names and read through the door; no code and no pickle is among them.
"""

from __future__ import annotations

import contextlib
from fnmatch import fnmatch
from pathlib import Path

from exporter.errors import ModelSourceError
from exporter.files import sha256_file
from exporter.models.sentence_folder import sentence_files
from graph_passes.files.locations import real
from graph_passes.files.reading import TABLE_BYTES, check_file, copy_file

_NAMES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.spm", "spiece.model",
)  # fmt: skip
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "normalizer.json")
_TEXTS = {".json", ".jinja", ".model", ".txt", ".spm", ".vocab", ".bpe", ".tiktoken"}


def stage_companions(source: Path, output: Path, stage: Path) -> list[tuple[Path, Path]]:
    """Puts copies of what a model ships with into a staging folder.

    Nothing that stands in the output's folder already is replaced, and nothing is copied where the
    source and the output share a folder.

    Args:
        source: The ONNX file that they lie beside.
        output: The ONNX file that they are for.
        stage: The staging folder.

    Returns:
        Staged file or folder, and final name.
    """
    folder, final = source.parent, output.parent
    if real(folder) == real(final):
        return []
    names = [path.name for path in sorted(folder.iterdir()) if _belongs(path)]
    names += sentence_files(folder)
    tops = dict.fromkeys(Path(name).parts[0] for name in names)
    wanted = [top for top in tops if not (final / top).exists()]
    _copy(folder, [name for name in names if Path(name).parts[0] in wanted], stage)
    return [(stage / top, final / top) for top in wanted]


def copy_processor_files(source: Path, folder: Path) -> None:
    """Copies what says how a recording or an image becomes numbers into a staged folder."""
    _copy(source, [name for name in _PROCESSORS if (source / name).is_file()], folder)


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Copies what sentence-transformers reads of a model into a folder that the caller stages."""
    _copy(source, sentence_files(source), folder)


def settings_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of what says how inputs become numbers, and answers vectors, by its name."""
    names = [name for name in _PROCESSORS if (folder / name).is_file()]
    with contextlib.suppress(ModelSourceError):  # told where vectors are made
        names += sentence_files(folder)
    for name in names:
        check_file(folder / name, folder, limit=TABLE_BYTES)
    return {name: sha256_file(folder / name) for name in names}


def _belongs(path: Path) -> bool:
    named = any(fnmatch(path.name, pattern) for pattern in _NAMES)
    return named and path.suffix in _TEXTS and not path.is_dir()


def _copy(folder: Path, names: list[str], target: Path) -> None:
    for name in names:
        check_file(folder / name, folder, limit=TABLE_BYTES)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, target / name, folder)
