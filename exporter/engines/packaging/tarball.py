"""One file with a model's engines and all that belongs to them; equal content, equal bytes."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

from exporter.engines.build.engine_set import EngineSet, find_engines
from exporter.engines.build.sidecar import sidecar_path
from exporter.errors import PackagingError
from exporter.files import refuse_overwriting
from graph_passes.files.placing import staging
from graph_passes.files.reading import opened

_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "config.json", "generation_config.json", "plan.json", "prune.json", "LICENSE", "LICENSE.txt",
)  # fmt: skip
_NOTES = """\
This archive holds {what} that {backend} {version} built, for {profiles}.
The library itself is not in it, and may not be passed on with it: its licence allows use, not
stand-alone redistribution. Install it by name where the engine runs.
The model's weights are in it: the model's own licence applies.
"""


def package_tarball(engine: Path, target: Path, *, beside: Path | None = None) -> list[str]:
    """Writes the archive, whole or not at all.

    Args:
        engine: An engine with its record, or a folder with one, or with one for each phase.
        target: The archive, ``.tar.gz``.
        beside: The folder with tokenizer, config and plan; by default the engine's.

    Returns:
        The names in the archive.

    Raises:
        EngineError: There is no engine, it and its record don't belong together, or the folder
            holds engines of several models or several builds.
        PackagingError: It is an ONNX file.
        UsageError: The archive would replace what goes into it.
    """
    if engine.suffix == ".onnx":
        raise PackagingError(
            f"An archive holds an engine, and {engine} is an ONNX file.",
            "Build an engine from it with depthcut build, or take --triton.",
        )
    engines = find_engines(engine)
    folder = beside or engines.paths[0].parent
    found = [folder / name for name in _BESIDE if (folder / name).is_file()]
    files = [*(file for path in engines.paths for file in (path, sidecar_path(path))), *found]
    refuse_overwriting(target, files)
    with staging(target) as staged:
        packed = staged.folder / "packed"
        with (
            packed.open("wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=1) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for file in files:
                _add_file(archive, file, named=file not in found)
            _add_text(archive, "NOTES.txt", _notes(engines))
        staged.place([(packed, target)])
    return [*(file.name for file in files), "NOTES.txt"]


def _add_file(archive: tarfile.TarFile, file: Path, *, named: bool) -> None:
    """Packs what a link points to, where it may: in a hub's cache, tokenizers are links."""
    with opened(file, named=named) as content:
        entry = _nameless(tarfile.TarInfo(file.name))
        entry.size = os.fstat(content.fileno()).st_size
        archive.addfile(entry, content)


def _nameless(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leaves out who made the file and when."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = _nameless(tarfile.TarInfo(name))
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _notes(engines: EngineSet) -> str:
    first, count = engines.records[0], len(engines.records)
    return _NOTES.format(
        what="an engine" if count == 1 else f"{count} engines",
        backend=first.backend,
        version=first.backend_version,
        profiles=" and ".join(slot.profile.phase for slot in engines.slots),
    )
