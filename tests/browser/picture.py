"""The head of a report as a picture for a document: ``python -m tests.browser.picture REPORT PNG``.

It needs ``pip install blitz-py`` and no browser; what is below the head (tables, charts) it draws
less exactly than a browser does.
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTH, HEIGHT = 1180, 420
MOST_BYTES = 200_000


def main(report: str, target: str) -> None:
    import blitz_py

    page = Path(report).read_text(encoding="utf-8")
    picture = blitz_py.render_png(page, width=WIDTH, height=HEIGHT)
    if len(picture) > MOST_BYTES:
        sys.exit(f"The picture has {len(picture):,} bytes, more than {MOST_BYTES:,}.")
    Path(target).write_bytes(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
