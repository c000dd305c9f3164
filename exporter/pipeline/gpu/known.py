"""What was known before any engine had run on a card, held against what a session has found.

Most of it is reckoned: from bytes that have to be read, and from builds without a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.artifacts import GpuCheck, GpuFinding, GpuStep, GpuTime, gains

_FLAT, _SHARE, _GAIN, _SCRATCH_BYTES = 1.15, 0.80, 1.48, 10_000_000
_NO_SLOWER = 1.02


def findings(steps: Sequence[GpuStep]) -> list[GpuFinding]:
    """Each known thing with what was found; in a rehearsal without."""
    found = [*_tests(steps), *_checks(steps), *_attention(_times(steps, "attention"))]
    found += [*_logits(_times(steps, "logits")), *_gains(steps), *_bandwidth(steps)]
    if any(step.rehearsal for step in steps):
        return [each.model_copy(update={"found": "", "agrees": None}) for each in found]
    return found


def _times(steps: Sequence[GpuStep], subject: str) -> list[GpuTime]:
    return [row for step in steps for row in step.times if row.subject == subject]


def _tests(steps: Sequence[GpuStep]) -> Iterator[GpuFinding]:
    told = next((step.tests for step in steps if step.tests), None)
    yield GpuFinding(
        what="the tests that need a GPU",
        known="all pass",
        found="" if told is None else f"{told.passed} passed, {told.failed} failed",
        agrees=None if told is None else not told.failed,
    )


def _checks(steps: Sequence[GpuStep]) -> Iterator[GpuFinding]:
    rows = [row for step in steps for row in step.checks]
    for row in rows:
        yield _check(row)
    if not rows:
        yield GpuFinding(what="logits against ONNX Runtime's", known="within their tolerance")


def _check(row: GpuCheck) -> GpuFinding:
    return GpuFinding(
        what=f"{row.subject} against {row.against}, {row.phase}",
        known=f"differs by at most {row.tolerance:.0e} of the largest logit",
        found=f"{row.largest_error:.1e}",
        agrees=row.passed,
    )


def _attention(rows: Sequence[GpuTime]) -> Iterator[GpuFinding]:
    many = max((row.batch for row in rows), default=0)
    by_arm = {
        arm: [row for row in rows if (row.arm, row.batch) == (arm, many)]
        for arm in ("mask", "lengths")
    }
    growth = {arm: _growth(of_arm) for arm, of_arm in by_arm.items()}
    flat, grows = growth["mask"], growth["lengths"]
    yield GpuFinding(
        what="a step told by a mask",
        known=f"takes at most {_FLAT} times as long with the longest past as with the shortest",
        found="" if flat is None else f"{flat:.2f} times",
        agrees=None if flat is None else flat <= _FLAT,
    )
    yield GpuFinding(
        what="a step told by lengths",
        known=f"takes more than {_FLAT} times as long",
        found="" if grows is None else f"{grows:.2f} times",
        agrees=None if grows is None else grows > _FLAT,
    )
    scratch = next(
        (r.scratch_bytes for r in by_arm["lengths"] if r.scratch_bytes is not None), None
    )
    yield GpuFinding(
        what="scratch memory of attention told by lengths",
        known=f"at most {_SCRATCH_BYTES / 1e6:.0f} MB",
        found="" if scratch is None else f"{scratch / 1e6:.1f} MB",
        agrees=None if scratch is None else scratch <= _SCRATCH_BYTES,
    )


def _growth(rows: Sequence[GpuTime]) -> float | None:
    """How many times as long a step takes with the longest past as with the shortest."""
    ordered = sorted(rows, key=lambda row: row.past_length)
    return ordered[-1].median_ms / ordered[0].median_ms if len(ordered) > 1 else None


def _logits(rows: Sequence[GpuTime]) -> Iterator[GpuFinding]:
    by_arm = {row.arm: row.median_ms for row in rows}
    ratio = by_arm["last"] / by_arm["all"] if len(by_arm) == 2 else None
    yield GpuFinding(
        what="a prompt with the logits of its last position",
        known="takes no longer than with all",
        found="" if ratio is None else f"{ratio:.2f} times",
        agrees=None if ratio is None else ratio <= _NO_SLOWER,
    )


def _gains(steps: Sequence[GpuStep]) -> Iterator[GpuFinding]:
    found = gains(steps)
    for subject, gain in found.items():
        yield GpuFinding(
            what=f"{subject} without half of its attentions, largest batch",
            known=f"{_GAIN} times the tokens a second (the paper has that for 70B)",
            found=f"{gain:.2f} times",
            agrees=gain >= _GAIN,
        )
    if not found:
        yield GpuFinding(
            what="tokens a second at the largest batch", known=f"{_GAIN} times as many"
        )


def _bandwidth(steps: Sequence[GpuStep]) -> Iterator[GpuFinding]:
    card = next((step.card for step in steps if step.card), None)
    rows = [row for step in steps if step.largest for row in step.times if row.phase == "decode"]
    for row in rows if card else []:
        assert card is not None
        if row.bytes_per_s and card.peak_bytes_per_s:
            share = row.bytes_per_s / card.peak_bytes_per_s
            batch = "batch 1" if row.batch == 1 else "the largest batch"
            yield GpuFinding(
                what=f"{row.subject}, {row.arm}, a decode step at {batch}",
                known=f"reads at {_SHARE:.0%} of the memory's bandwidth or more",
                found=f"{share:.0%}",
                agrees=share >= _SHARE,
            )
