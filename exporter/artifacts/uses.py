"""The part of report.json that says by which lines a folder's model is loaded and run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Record

PLACE = "FOLDER"
"""What the lines call the model's folder; whoever shows them says before them what it is."""


class Use(Record):
    """One way to load and run a model.

    ``needs`` is what to install for it, as pip takes it. ``text`` are the lines, which take the
    folder from the variable :data:`PLACE`. ``remark`` is what else there is to know.
    """

    library: str
    needs: str
    text: str
    language: Literal["python", "sh"] = "python"
    remark: str = ""


class FolderUses(Record):
    """All ways to use a folder; ``folder`` is relative to the report, ``notes`` apply to it all."""

    folder: str
    uses: list[Use] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
