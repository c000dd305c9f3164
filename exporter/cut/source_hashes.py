"""The hashes of what a cut is made from, found while the surgery goes on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from exporter.artifacts.replacement_file import Replacements
from exporter.files import sha256_file, sha256_files


class SourceHashes:
    """Hashes the source's files while the surgery goes on; abandoned when it fails.

    With shared weights the data files aren't hashed: the result points to the very same ones,
    and reading them would take longer than everything else.
    """

    def __init__(self, source: Path, data: Sequence[Path]) -> None:
        self._graph = sha256_file(source)
        self._weights: Future[str] | None = None
        if data:
            self._weights = Future()
            arguments = (self._weights, data, source.parent)
            Thread(target=_hash_into, args=arguments, daemon=True).start()

    def made_from(
        self, plan_sha256: str | None, replacements: Replacements | None
    ) -> dict[str, str]:
        """Role to hash; waits for the weights' hash."""
        parents = {"model": self._graph}
        if self._weights is not None:
            parents["weights"] = self._weights.result()
        if plan_sha256 is not None:
            parents["plan"] = plan_sha256
        if replacements is not None:
            parents["replacements"] = replacements.sha256
        return parents


def _hash_into(future: Future[str], files: Sequence[Path], root: Path) -> None:
    try:
        future.set_result(sha256_files(files, root))
    except BaseException as error:  # handed to the one who waits
        future.set_exception(error)
