"""What attentions read: caches that are told by lengths against those that are told by a mask."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from exporter.artifacts import GpuCheck, GpuTime
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.profiles import Ranges, Span
from exporter.pipeline.gpu.answers import BOTH, RANGES, answers, checks, relative_error
from exporter.pipeline.gpu.sizes import Sizes
from exporter.pipeline.gpu.timing import opened, prefill_time, prompt_logits, step_time, stepping
from exporter.pipeline.gpu.workplace import Workplace, record_of

FORMS = {"lengths": "filled", "mask": "room"}
"""By how an attention is told what its caches hold, what the builder is asked to let it read."""

_SUBJECT = "attention"
_KEPT = ("last", "all")


def time_attention(place: Workplace) -> None:
    """Both forms compute the same; then a decode step of each at several numbers of positions."""
    _compare_forms(place)
    for form in FORMS:
        _time_form(place, form)


def _compare_forms(place: Workplace) -> None:
    shape = place.case.tiny
    dtype, tolerance = list(place.case.dtypes.items())[-1]

    def measured() -> list[GpuCheck]:
        onnx = place.model("tiny", replace(shape, dtype=dtype))
        found = {}
        for form, reads in FORMS.items():
            engines = place.engines(onnx, f"tiny-{form}", BOTH, RANGES, cache_reads=reads)
            with opened(engines) as decoder:
                found[form] = answers(decoder, place.case.room)
        facts = {"subject": "told by lengths", "against": "told by a mask"}
        return checks(found["lengths"], found["mask"], tolerance, **facts)

    place.rows("lengths against mask", GpuCheck, measured)


def _time_form(place: Workplace, form: str) -> None:
    case = place.case
    ranges = Ranges(batch=Span(1, max(case.batches), max(case.batches)))
    sizes = Sizes.of(case.attention)
    onnx = place.model(_SUBJECT, case.attention)
    engines = place.engines(onnx, form, ("decode",), ranges, cache_reads=FORMS[form])
    record = record_of(engines)
    if record.attention is not None and record.attention.told_by != form:
        place.found.notes.append(f"{form}: {record.attention.remark}")

    def measured(batch: int) -> list[GpuTime]:
        facts = {
            "subject": _SUBJECT,
            "arm": form,
            "scratch_bytes": record.memory_bytes.get("activation"),
        }
        with stepping(find_engines(engines), batch) as decoder:
            return [
                step_time(decoder, place, batch, past, sizes.step_bytes(batch, past), **facts)
                for past in case.pasts
            ]

    for batch in case.batches:  # one that is too large for the card leaves those before it
        name = f"a decode step, told by {form}, batch {batch}"
        place.rows(name, GpuTime, partial(measured, batch))


def time_last_logits(place: Workplace) -> None:
    """A prompt's logits at the last position against those at all; then both times."""
    case = place.case
    tolerance = list(case.dtypes.values())[-1]

    def compared() -> list[GpuCheck]:
        last, whole = (
            prompt_logits(_prefill_engine(place, kept), 1, case.prompt) for kept in _KEPT
        )
        return [
            GpuCheck(
                subject="logits of the last position", against="logits of all", phase="prefill",
                largest_error=relative_error(last, whole), tolerance=tolerance,
            )
        ]  # fmt: skip

    def timed(kept: str) -> list[GpuTime]:
        engines = _prefill_engine(place, kept)
        scratch = record_of(engines, "prefill").memory_bytes.get("activation")
        facts = {"subject": "logits", "arm": kept, "scratch_bytes": scratch}
        return [prefill_time(engines, place, 1, case.prompt, **facts)]

    place.rows("logits of the last position against all", GpuCheck, compared)
    for kept in _KEPT:
        place.rows(f"a prompt, logits: {kept}", GpuTime, partial(timed, kept))


def _prefill_engine(place: Workplace, kept: str) -> Path:
    onnx, prompt = place.model("head", place.case.head), place.case.prompt
    ranges = Ranges(batch=Span(1, 1, 1), prompt=Span(prompt, prompt, prompt))
    return place.engines(onnx, f"logits-{kept}", ("prefill",), ranges, logits=kept)
