"""The process that one cell of a sweep runs in: ``python -m exporter.cli.sweep_cell``.

It is told whose child it is and how much to say, and its work in one line on standard input. Its
answer is one line of JSON on standard output; all else goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from exporter.cli.console import ConsoleProgress
from exporter.pipeline.sweep.job import Job, run_job
from exporter.printable import printable_output
from exporter.processes import end_with_parent

INTERRUPTED = 130


def work() -> int:
    """Runs the cell; gives the exit code."""
    end_with_parent(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress, answer = ConsoleProgress(int(sys.argv[2])), dict[str, Any]()
    try:
        with printable_output():
            cell = run_job(Job.from_json(sys.stdin.readline()), progress)
            answer["cell"] = cell.model_dump(mode="json")
    except OSError as error:  # only a full disk comes through
        answer = {"full": str(error.filename or ""), "errno": error.errno}
    except KeyboardInterrupt:
        return INTERRUPTED
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(work())
