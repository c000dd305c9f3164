"""A GPU session as one page: what ran, what differed from what is known, the tables.

Of a rehearsal no number is shown: nothing in it was measured on a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.artifacts import GpuCard, GpuFinding, GpuLargest, GpuSession, GpuStep, GpuTime, gains
from exporter.printable import counted
from exporter.report.sections.blocks import (
    Block,
    Bullets,
    Cell,
    Document,
    Grid,
    Note,
    Section,
    Sign,
)
from exporter.report.words import milliseconds, percent

_REHEARSED = "rehearsed"
_REHEARSAL = (
    "REHEARSAL WITHOUT A GPU. A stand-in computed everything on a CPU, with tiny models under the "
    "names of the large ones. Nothing was measured, so this page has no numbers."
)
_IN_TURN = (
    "Random weights in bfloat16; every second attention is cut. The batch is the largest whose "
    "caches fit beside the decode engine. Prompts run one at a time: the time of one, times the "
    "batch. The engines for prefill and decode are loaded in turns, so that the weights lie on the "
    "card once; with both loaded they lie there twice, and fewer sequences fit: *with both*, "
    "reckoned."
)
_EXTRAPOLATED = (
    "Rows named extrapolated were not measured: as if as many cards as needed each held such a "
    "slice and worked one after the other, without the time between cards."
)
_SHARES = (
    "What a step must read (the weights, and what is filled of the caches) over its time, as a "
    "share of the memory's speed: by its clock and bus, and in a copy within the card."
)


def session_document(session: GpuSession) -> Document:
    """The page."""
    shown = _Shown(session)
    card = session.card
    sections = [
        Section("steps", "What ran", [_steps(session.steps, shown)]),
        Section("known", "What differed from what is known", [_findings(session.findings)]),
        Section("largest", "Tokens a second at the largest batch", _largest(session, shown)),
        Section("bandwidth", "Decode and the memory's bandwidth", _bandwidth(session, card, shown)),
        Section("attention", "Attention by lengths against by mask", _attention(session, shown)),
        Section("times", "Other times", _others(session, shown)),
        Section("machine", "The machine", _machine(session)),
    ]
    return Document(
        command="gpu-session",
        version=session.versions.get("depthcut", ""),
        title=_title(session),
        subject=card.name if card and not session.rehearsal else "",
        lead=_lead(session),
        sections=sections,
    )


class _Shown:
    """Numbers in words; of a rehearsal none."""

    def __init__(self, session: GpuSession) -> None:
        self._rehearsal = session.rehearsal

    def __call__(self, words: str) -> str:
        return _REHEARSED if self._rehearsal else words


def _title(session: GpuSession) -> str:
    if session.rehearsal:
        return "rehearsal without a GPU"
    return session.card.name if session.card else "no card looked at yet"


def _lead(session: GpuSession) -> str:
    done = sum(step.status == "done" for step in session.steps)
    steps = f"{done} of {counted(len(session.steps), 'step')} done"
    if session.rehearsal:
        return f"{_REHEARSAL} {steps}."
    told = [each.agrees for each in session.findings if each.agrees is not None]
    return f"{steps}; {sum(told)} of {counted(len(told), 'known thing')} found so."


def _steps(steps: Sequence[GpuStep], shown: _Shown) -> Grid:
    rows: list[list[Cell]] = [
        [step.title, _status(step), shown(f"{step.seconds:.0f}"), _why(step)] for step in steps
    ]
    return Grid("Steps", ["step", "status", "seconds", "why"], rows, right=(2,))


def _status(step: GpuStep) -> Cell:
    match step.status:
        case "done":
            return "done"
        case "failed":
            return Sign("FAILED", "bad")
        case "late":
            return Sign("stopped", "unsure")
        case _:
            return "not run"


def _why(step: GpuStep) -> str:
    if step.failure is not None:
        return step.failure.message
    if step.tests is not None and step.tests.failures:
        return f"failed: {', '.join(step.tests.failures)}"
    if step.status == "late":
        return "its time was over; it goes on when the session is run again"
    return "" if step.rehearsal or step.name == "doctor" else "; ".join(step.notes)


def _findings(findings: Sequence[GpuFinding]) -> Grid:
    """What differs comes first."""
    ordered = sorted(findings, key=lambda each: (each.agrees is not False, each.agrees is None))
    rows: list[list[Cell]] = [[e.what, e.known, e.found or "-", _agrees(e)] for e in ordered]
    return Grid("Known", ["what", "known before", "found", "so"], rows)


def _agrees(finding: GpuFinding) -> Cell:
    if finding.agrees is None:
        return "not measured"
    return Sign("yes", "good") if finding.agrees else Sign("NO", "bad")


def _largest(session: GpuSession, shown: _Shown) -> list[Block]:
    rows = [row for step in session.steps for row in step.largest]
    if not rows:
        return [Note("Not measured.")]
    ratios, told = gains(session.steps), list[list[Cell]]()
    for subject in dict.fromkeys(row.subject for row in rows):
        by_arm = {row.arm: row for row in rows if row.subject == subject}
        told += _model_rows(by_arm, ratios.get(subject), shown)
    header = ["model", "layers", "arm", "batch", "with both", "prompt + new", "tokens a second"]
    header.append("cut / whole")
    notes: list[Block] = [Note(_IN_TURN)]
    if any(row.layers < row.of_layers for row in rows):
        notes.append(Note(_EXTRAPOLATED))
    return [Grid("Tokens a second", header, told, right=(3, 4, 6, 7)), *notes]


def _model_rows(
    by_arm: dict[str, GpuLargest], ratio: float | None, shown: _Shown
) -> Iterator[list[Cell]]:
    for arm, row in by_arm.items():
        slice_of = f"{row.layers} of {row.of_layers}" if row.layers < row.of_layers else "all"
        batch = f"{row.batch}" + ("" if row.fits_not else " or more")
        gain = shown(f"{ratio:.2f}") if arm == "cut" and ratio else ""
        lengths, layers = f"{row.prompt} + {row.new}", shown(slice_of)
        both = shown(str(row.batch_with_both))
        fixed: list[Cell] = [row.subject, layers, arm, shown(batch), both, shown(lengths)]
        yield [*fixed, shown(f"{row.tokens_per_s:,.0f}"), gain]
        if row.layers < row.of_layers:
            fixed[0] = f"{row.subject}, extrapolated"
            fixed[1] = shown(str(row.of_layers))
            whole_per_s = row.tokens_per_s * row.layers / row.of_layers
            yield [*fixed, shown(f"{whole_per_s:,.0f}"), gain]


def _bandwidth(session: GpuSession, card: GpuCard | None, shown: _Shown) -> list[Block]:
    rows: list[list[Cell]] = []
    for row in (r for s in session.steps if s.largest for r in s.times if r.phase == "decode"):
        shares = [
            shown(percent(row.bytes_per_s / speed)) if row.bytes_per_s and speed else "-"
            for speed in (
                card.peak_bytes_per_s if card else None,
                card.copy_bytes_per_s if card else None,
            )
        ]
        place = [row.subject, row.arm, shown(str(row.batch)), shown(str(row.past_length))]
        read = shown(f"{(row.least_bytes or 0) / 1e9:.2f}")
        rows.append([*place, shown(milliseconds(row.median_ms)), read, *shares])
    if not rows:
        return [Note("Not measured.")]
    header = ["model", "arm", "batch", "filled", "ms", "GB to read", "of the peak", "of a copy"]
    return [Grid("Decode steps", header, rows, right=(2, 3, 4, 5, 6, 7)), Note(_SHARES)]


def _attention(session: GpuSession, shown: _Shown) -> list[Block]:
    rows = [row for step in session.steps for row in step.times if row.subject == "attention"]
    if not rows:
        return [Note("Not measured.")]
    by_place: dict[tuple[int, int], dict[str, GpuTime]] = {}
    for row in rows:
        by_place.setdefault((row.batch, row.past_length), {})[row.arm] = row
    told: list[list[Cell]] = [
        [
            shown(str(batch)),
            shown(str(past)),
            *(
                shown(milliseconds(of_arm[arm].median_ms)) if arm in of_arm else "-"
                for arm in ("lengths", "mask")
            ),
        ]
        for (batch, past), of_arm in sorted(by_place.items())
    ]
    header = ["batch", "filled", "ms by lengths", "ms by mask"]
    return [Grid("A decode step", header, told, right=(0, 1, 2, 3))]


def _others(session: GpuSession, shown: _Shown) -> list[Block]:
    rows = [
        row
        for step in session.steps
        for row in step.times
        if row.subject != "attention" and not (step.largest and row.phase == "decode")
    ]
    if not rows:
        return [Note("Not measured.")]
    told: list[list[Cell]] = [
        [
            row.subject,
            row.arm,
            row.phase,
            shown(str(row.sequence_length if row.phase == "prefill" else row.past_length)),
            shown(milliseconds(row.median_ms)),
            row.clock,
        ]
        for row in rows
    ]
    header = ["model", "arm", "phase", "tokens", "ms", "clock"]
    return [Grid("Times", header, told, right=(3, 4))]


def _machine(session: GpuSession) -> list[Block]:
    notes = next((step.notes for step in session.steps if step.name == "doctor"), [])
    if session.rehearsal or not notes:
        return [Note("A rehearsal has no card." if session.rehearsal else "Not looked at.")]
    card = session.card
    lines = [] if card is None else [f"{card.name}, {card.compute_capability}, {_speeds(card)}"]
    return [Bullets([*lines, *notes])]


def _speeds(card: GpuCard) -> str:
    told = {"peak": card.peak_bytes_per_s, "copy": card.copy_bytes_per_s}
    speeds = [f"{speed / 1e12:.2f} TB/s ({name})" for name, speed in told.items() if speed]
    return f"{card.memory_bytes / 1e9:.0f} GB, CUDA {card.cuda_version}, {', '.join(speeds)}"
