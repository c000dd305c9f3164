"""By which lines each folder is loaded and run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence

from exporter.artifacts import ComparisonReport
from exporter.artifacts.comparison import PLACE, FolderUses, Use
from exporter.report.sections.blocks import Block, Bullets, Command, Note, Section


def use_section(report: ComparisonReport) -> Section | None:
    """The lines for all folders, those that are alike once; None where none were recorded."""
    folders = [uses for uses in report.uses if uses.uses]
    if not folders:
        return None
    alike: dict[tuple[str, str], tuple[Use, list[str]]] = {}
    for folder in folders:
        for use in folder.uses:
            alike.setdefault((use.library, use.text), (use, []))[1].append(folder.folder)
    blocks: list[Block] = [
        Note("The lines are run in the folder of this report. USE.md in each folder has its own.")
    ]
    for use, names in alike.values():
        blocks += use_blocks(use, names, lead=f"{use.library}, {', '.join(names)}:")
    notes = dict.fromkeys(note for folder in folders for note in folder.notes)
    return Section("use", "Use it", [*blocks, *_notes([*notes])])


def use_sections(uses: FolderUses) -> list[Section]:
    """The lines of one folder, a section for each library, for a file in that folder."""
    sections = [
        Section(use.library, use.library, [*use_blocks(use, [uses.folder])]) for use in uses.uses
    ]
    if uses.notes:
        sections.append(Section("notes", "Not with this folder", _notes(uses.notes)))
    return sections


def use_blocks(use: Use, folders: Sequence[str], lead: str = "") -> Iterator[Block]:
    """What to install and the lines, the first of which says where the folder is."""
    text = f"`pip install {use.needs}`." if use.needs else ""
    words = " ".join(filter(None, (text, use.remark)))
    if lead or words:
        yield Note(words, lead=lead)
    others = f"  # or {', '.join(folders[1:])}" if len(folders) > 1 else ""
    name = shlex.quote(folders[0]) if use.language == "sh" else json.dumps(folders[0])
    equals = "=" if use.language == "sh" else " = "
    yield Command(f"{PLACE}{equals}{name}{others}\n{use.text}", use.language)


def _notes(notes: Sequence[str]) -> list[Block]:
    return [Bullets(notes)] if notes else []
