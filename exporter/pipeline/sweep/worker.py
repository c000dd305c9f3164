"""The process that one cell runs in: ``python -m exporter.pipeline.sweep.worker``."""

from __future__ import annotations

import sys
from typing import Any

from exporter.pipeline.sweep.job import Job, run_job
from exporter.pipeline.telling import work
from exporter.progress import Progress


def _cell(request: str, progress: Progress) -> dict[str, Any]:
    return {"cell": run_job(Job.from_json(request), progress).model_dump(mode="json")}


if __name__ == "__main__":
    sys.exit(work(_cell))
