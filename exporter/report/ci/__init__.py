"""What CI systems read of a check: a module a format, with a function ``render``.

To add one, write a module here whose ``render(checked)`` gives a file's text, or the texts of
several files by name, and a line for it in :data:`FORMATS`: that makes the option of ``depthcut
check``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exporter.files import write_texts

if TYPE_CHECKING:
    from exporter.artifacts import CheckReport, ComparisonReport


class CiFormat(NamedTuple):
    """A format: the module and the option are called ``name``.

    Attributes:
        help: What ``--help`` says of the option.
        is_folder: Whether it is several files, so that the option names a folder.
    """

    name: str
    help: str
    is_folder: bool = False


FORMATS = (
    CiFormat("junit", "JUnit XML."),
    CiFormat(
        "github_benchmark", "smaller.json and bigger.json for github-action-benchmark.", True
    ),
    CiFormat("bencher", "Bencher Metric Format."),
    CiFormat("pytest_benchmark", "pytest-benchmark's JSON."),
    CiFormat("gitlab_metrics", "OpenMetrics text."),
    CiFormat("comment", "Markdown for a comment on a pull request."),
    CiFormat("page", "A page with the history's plots."),
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What a format is written from.

    Attributes:
        found: The check.
        report: The comparison that was checked.
        inconclusive_fails: Whether a check without a verdict is a failure.
    """

    found: CheckReport
    report: ComparisonReport
    inconclusive_fails: bool = False


def write_ci_file(name: str, target: Path, checked: Checked) -> None:
    """Writes a check in one of :data:`FORMATS`.

    Args:
        name: The format's.
        target: The file, or the folder of a format of several files.
        checked: The check.

    Raises:
        OSError: It can't be written.
    """
    text = importlib.import_module(f"exporter.report.ci.{name}").render(checked)
    texts = {"": text} if isinstance(text, str) else text
    write_texts({target / file: part for file, part in texts.items()})
