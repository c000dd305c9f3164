"""A progress listener that keeps what is said."""

from __future__ import annotations

from exporter.progress import Quiet


class Heard(Quiet):
    """Keeps every line, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)
