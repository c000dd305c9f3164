"""What a campaign found, as a table and line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

Try = dict[str, Any]
"""All about a try, as a job tells it."""

_ALWAYS = ("refused", "harmless", "other error", "request", "code", "outside", "traceback", "hang")
_FURTHER = ("program", "left", "unexpected", "memory", "not refused", "printed", "written", "lines",
"end")  # fmt: skip
_CODES = {0: "harmless", 2: "refused"}
_TOLD = 4  # faults of a try


def table(tries: Sequence[Try]) -> Iterator[str]:
    """A row for each kind of mutation, and one for all; a try counts once for each of its kinds."""
    rows: dict[str, Counter[str]] = {}
    for item in tries:
        for kind in [*sorted(set(item["kinds"])), "all"]:
            rows.setdefault(kind, Counter()).update(_counts(item))
    names = [*_ALWAYS, *(name for name in _FURTHER if any(row[name] for row in rows.values()))]
    yield f"| mutation | tries | {' | '.join(names)} |"
    yield f"|---|{'---:|' * (len(names) + 1)}"
    for kind in sorted(rows, key=lambda name: (name == "all", name)):
        row = rows[kind]
        yield f"| {kind} | {row['tries']} | {' | '.join(str(row[name]) for name in names)} |"


def _counts(value: Try) -> set[str]:
    classes = {fault.partition(":")[0] for fault in value["faults"]}
    return {"tries", _CODES.get(value["code"], "other error"), *classes}


def summary(tries: Sequence[Try]) -> str:
    """How many failed, and how long they took."""
    seconds = [item["seconds"] for item in tries] or [0.0]
    failed = sum(bool(item["faults"]) for item in tries)
    calls = sum(item.get("calls", 0) for item in tries)
    seen = f"; {calls} system calls were looked at" if calls else ""
    return (
        f"{len(tries)} tries, {failed} failed; {sum(seconds):.0f} s in commands, the longest "
        f"{max(seconds):.1f} s{seen}"
    )


def about(each: Try, *, everything: bool = False) -> Iterator[str]:
    """What was done in a try and what was wrong."""
    yield f"--replay {each['seed']}: depthcut {' '.join(each['arguments'])}"
    yield f"  {', '.join(each['mutations'])}: {each['notes']}"
    yield f"  exit code {each['code']}, {each['seconds']:.1f} s"
    for fault in each["faults"][: None if everything else _TOLD]:
        yield f"  {fault[:400]}"
    if everything:
        yield each["said"]
