"""The texts of a healing: what is fitted on, what is held out, and another domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from exporter.artifacts import CalibrationRef, FiguresFrom
from exporter.errors import CalibrationError, HealingError
from exporter.heal.options import NO_TEXT, HealOptions
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import together_in
from exporter.models.tasks import task_of
from exporter.models.texts.calibration import (
    DEFAULT_TOKENS,
    CalibrationText,
    calibration_text,
    cut_to_whole,
    default_calibration,
    joined,
    refuse_same,
    samples_of,
    seed_of,
    seed_of_all,
    spec_of,
    specs_of,
)
from exporter.models.texts.images import MOST_IMAGES, reads_images
from exporter.models.texts.self_text import CHAT, CHAT_TOKENS, SAMPLED, SELF, chat_prefix
from exporter.models.texts.sources import DOCSTRINGS, PYDOC, refuse_same_text
from exporter.progress import QUIET, Progress


def text_behind(
    loaded: LoadedModel,
    text: CalibrationText,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> CalibrationText | None:
    """As much again of the same texts, of other documents; sampled text anew."""
    others = []
    for item in text.apart:
        read = QUIET if spec_of(item.ref.source) not in SAMPLED else progress
        rest = _apart(loaded, [item], len(item.input_ids), cache_dir, read)
        others.append(rest.first_tokens(item.ref.tokens))
        if len(rest.input_ids) < min(2, len(item.input_ids)) or is_less(rest, [item.ref]):
            return None
    return joined(others)


def is_less(text: CalibrationText, used: Sequence[CalibrationRef]) -> bool:
    """Whether there are fewer tokens than in one of several parts."""
    return text.ref.tokens < max((ref.tokens for ref in used), default=0)


def text_beyond(
    loaded: LoadedModel,
    used: Sequence[CalibrationText],
    samples: int,
    cache_dir: Path | None = None,
) -> CalibrationText:
    """Samples of the same texts, of other documents than several parts have.

    As many of each text, and more of the longer ones where others are too short for that.
    """
    texts = list(zip(*(part.apart for part in used), strict=True))
    others: dict[int, CalibrationText] = {}
    longer, share, missing = list(range(len(texts))), 0, samples
    while longer and missing > 0:
        share += math.ceil(missing / len(longer))
        for number in longer:
            others[number] = _apart(loaded, texts[number], share, cache_dir)
        longer = [number for number in longer if len(others[number].input_ids) == share]
        missing = samples - sum(len(text.input_ids) for text in others.values())
    return joined([others[number] for number in range(len(texts))])


def _apart(
    loaded: LoadedModel,
    used: Sequence[CalibrationText],
    samples: int,
    cache_dir: Path | None,
    progress: Progress = QUIET,
) -> CalibrationText:
    """So many samples of one text, of other documents than several parts of it have."""
    source, length = used[0].ref.source, used[0].input_ids.shape[1]
    seed = seed_of(source) + (len(used) if spec_of(source) in SAMPLED else 0)
    options = HealOptions(sequence_length=length, seed=seed)
    refs = [part.ref for part in used]
    text = read_samples(loaded, spec_of(source), samples, options, progress, cache_dir, refs)
    return text.rows(slice(0, samples))


def read_samples(
    loaded: LoadedModel,
    spec: str,
    samples: int,
    options: HealOptions,
    progress: Progress,
    cache_dir: Path | None = None,
    apart_from: Sequence[CalibrationRef] = (),
) -> CalibrationText:
    """Samples of a text, or paragraphs with as many tokens; no more images than fit."""
    return calibration_text(
        loaded,
        spec,
        samples=min(samples, MOST_IMAGES) if reads_images(loaded.model) else samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        cache_dir=cache_dir,
        passages=task_of(loaded.model).passages,
        apart_from=apart_from,
        progress=progress,
    )


FEWEST_HELD_OUT = 4
_SAMPLED_SHARE = 0.25
_FEW_SAMPLED, _SAMPLED_LENGTH = 16, 128
"""Of a text that the model samples just to judge by: each token of a sample takes a run."""
_MOST_PASSAGES = 64
"""That are held out of a text that is read by paragraphs."""
MOST_HELD_OUT = 32
"""For a training, which runs half of them a dozen times."""


@dataclass(frozen=True)
class HealingTexts:
    """Samples by what they are for; no sample serves two ends."""

    fitting: CalibrationText
    sources: tuple[CalibrationRef, ...]
    held: tuple[CalibrationText, ...]
    other: CalibrationText | None  # samples of another domain; None where there is none
    choosing: int | None = None  # None for one half of them
    again: tuple[str, ...] = ()
    chose: tuple[str, ...] = ()
    together: int = 1

    @property
    def held_out(self) -> CalibrationText:
        """All that was held out, as one text."""
        return joined(self.held, self.together)

    @property
    def halves(self) -> tuple[CalibrationText, CalibrationText]:
        """One part of it to choose by, one to judge by; usually a half of each text in both.

        They share no document. Of a text with one held-out sample that sample serves both.
        """
        pairs = [text.in_turn(self.choosing, self.together) for text in self.held]
        first, second = (joined(parts, self.together) for parts in zip(*pairs, strict=True))
        return first, second


def healing_texts(
    loaded: LoadedModel,
    options: HealOptions,
    progress: Progress = QUIET,
    *,
    chosen_on: Sequence[CalibrationRef] = (),
    judging: int = 0,
    fewest: int = 0,
) -> HealingTexts:
    """Reads or samples all that a healing needs.

    Documents that chose the cut are left out, if there are enough others.
    """
    task = task_of(loaded.model)
    options = _with_fresh_seed(options.for_task(task), chosen_on)
    specs = options.calibration or _default_texts(loaded, options)
    few = [_wanted(options, spec, specs) for spec in specs]
    more = math.ceil(judging / len(specs)) if task.passages else judging
    split = _Split(
        room=more + _MOST_PASSAGES // 2 if fewest else 0,
        least=math.ceil(fewest / len(specs)) + FEWEST_HELD_OUT if fewest else 0,
        together=together_in(loaded.model),
    )
    reading = partial(_read, loaded, options=options, chosen_on=chosen_on, progress=progress)
    read = [
        reading(spec, wanted, held if spec in SAMPLED else max(held + more, split.room))
        for spec, (wanted, held) in zip(specs, few, strict=True)
    ]
    whole = [text.whole for text in read]
    refuse_same(whole, HealingError)
    parts = [split.parts(text) for text in read]
    if fewest and sum(len(part.held.input_ids) - FEWEST_HELD_OUT for part in parts) < fewest:
        # A longer text must not show less than a shorter one, which is used again.
        parts = [split.parts(text, reuse=True) for text in read]
    held = sum(len(part.held.input_ids) for part in parts)
    choosing = None
    if fewest:
        choosing = max(FEWEST_HELD_OUT, min(_MOST_PASSAGES // 2, (held - fewest) // len(specs)))
    elif judging and not task.passages:
        choosing = min(held for _, held in few) // 2
    few_sampled, samples = bool(options.trains or judging), sum(held for _, held in few)
    other = _other_text(loaded, specs, samples, options, few_sampled, whole, progress)
    return HealingTexts(
        joined([part.fitting for part in parts]),
        tuple(part.fitting.ref for part in parts),
        tuple(part.held for part in parts),
        other,
        choosing,
        tuple(part.fitting.ref.source for part in parts if part.again),
        tuple(part.held.ref.source for part in parts if part.chose),
        split.together,
    )


class _Read(NamedTuple):
    """Samples of a text."""

    whole: CalibrationText
    others: CalibrationText
    wanted: int
    held: int
    is_short: bool


def _read(
    loaded: LoadedModel,
    spec: str,
    wanted: int,
    held: int,
    options: HealOptions,
    chosen_on: Sequence[CalibrationRef],
    progress: Progress,
) -> _Read:
    together = together_in(loaded.model)
    whole = cut_to_whole(read_samples(loaded, spec, wanted + held, options, progress), together)
    chosen = [ref for ref in chosen_on if ref.sha256 == whole.ref.sha256]
    if not chosen:
        return _Read(whole, whole, wanted, held, is_short=False)
    others = read_samples(loaded, spec, wanted + held, options, QUIET, apart_from=chosen)
    others = cut_to_whole(others, together)
    enough = not is_less(others, [whole.ref]) or not is_less(others, chosen)
    return _Read(whole, others, wanted, held, not enough or len(others.input_ids) < 2)


class _Parts(NamedTuple):
    """A text's samples to fit on and those held out, and which of them are of what has chosen."""

    fitting: CalibrationText
    held: CalibrationText
    again: bool = False
    chose: bool = False


class _Split(NamedTuple):
    """How many samples are held out of a text that has fewer than are wanted."""

    room: int
    least: int
    together: int

    def parts(self, text: _Read, *, reuse: bool = False) -> _Parts:
        """Documents to fit on, and others that are held out."""
        if not text.is_short and not reuse:
            return _Parts(*text.others.apart_at(self._held(text.others, text), self.together))
        held_out = self._held(text.whole, text)
        others = len(text.others.input_ids)
        if reuse or not others:
            again = text.whole is not text.others
            return _Parts(*text.whole.apart_at(held_out, self.together), again, again)
        held = (
            text.others if others <= held_out else text.others.apart_at(held_out, self.together)[1]
        )
        rest = text.whole.rows(~np.isin(text.whole.documents, held.documents))
        return _Parts(rest, held, again=True)

    def _held(self, text: CalibrationText, read: _Read) -> int:
        """How many samples are held out: of a short text a fifth.

        Of a text's paragraphs, which are short, a fifth too, but not more than tell a mean well;
        where there is to be room for so many, what isn't wanted to fit on, or a half, or what is
        needed.
        """
        number, wanted, more = len(text.input_ids), read.wanted, read.held
        if number < 2:
            raise _one_sample(text)
        held = more if number == wanted + more else max(1, min(number // 5, _MOST_PASSAGES))
        if self.room:
            needed = min(self.least, number - FEWEST_HELD_OUT)
            held = max(held, min(self.room, max(number - wanted, number // 2, needed)))
        return held


def _one_sample(text: CalibrationText) -> HealingError:
    one = "image" if text.are_images else f"sample of {text.input_ids.shape[1]} tokens"
    return HealingError(
        f"{text.ref.source} gives one {one}; one is needed to fit on, and one to judge by.",
        "Give more images."
        if text.are_images
        else "Give a longer text, or ask for a shorter --sequence-length.",
        code="too-few-samples",
    )


def _other_text(
    loaded: LoadedModel,
    specs: Sequence[str],
    samples: int,
    options: HealOptions,
    few_sampled: bool,
    fitted: Sequence[CalibrationText],
    progress: Progress,
) -> CalibrationText | None:
    """The other domain's; short, if the model must sample it and something else is waited for."""
    length = options.sequence_length
    if few_sampled and options.check_text is None and _other_spec(loaded, specs) == SELF:
        samples, length = _FEW_SAMPLED, min(length, _SAMPLED_LENGTH)
    result = other_domain(
        loaded,
        specs,
        samples,
        sequence_length=length,
        spec=options.check_text,
        seed=options.seed,
        progress=progress,
    )
    if result is not None:
        refuse_same_text(
            result.ref,
            [text.ref for text in fitted],
            "what is fitted on, and no other domain",
            "Give --check-text another text.",
            HealingError,
        )
    return result


def _with_fresh_seed(options: HealOptions, chosen_on: Sequence[CalibrationRef]) -> HealOptions:
    """Another seed where the model has sampled the text that has chosen, so that it is another."""
    seeds = [seed_of(ref.source) for ref in chosen_on if spec_of(ref.source) in SAMPLED]
    return replace(options, seed=max(seeds) + 1) if options.seed in seeds else options


def _default_texts(loaded: LoadedModel, options: HealOptions) -> tuple[str, ...]:
    """A training wants a mixture: it forgets what it doesn't read. An encoder wants much text."""
    if not options.trains or loaded.tokenizer is None:
        return (default_calibration(loaded),)
    if not loaded.model.can_generate():
        return (PYDOC, DOCSTRINGS)
    return (PYDOC, CHAT if _has_usable_chat(loaded, options) else SELF)


def _has_usable_chat(loaded: LoadedModel, options: HealOptions) -> bool:
    """Whether the model's chat template works, and leaves room in a sample."""
    try:
        return 4 * len(chat_prefix(loaded)) < min(options.sequence_length, CHAT_TOKENS)
    except CalibrationError:
        return False


def _wanted(options: HealOptions, spec: str, specs: Sequence[str]) -> tuple[int, int]:
    """Samples of a text to fit on, and to hold out; few of these where all are run often.

    To sample a text takes as long as to train on it: beside others it is a quarter of the mixture.
    """
    if options.trains:
        alike = [text for text in specs if (text in SAMPLED) == (spec in SAMPLED)]
        share = 1.0
        if len(alike) < len(specs):
            share = _SAMPLED_SHARE if spec in SAMPLED else 1 - _SAMPLED_SHARE
        tokens = options.trained_tokens * share / len(alike)
        wanted = math.ceil(tokens / options.sequence_length)
        return wanted, max(2 * FEWEST_HELD_OUT, min(MOST_HELD_OUT, wanted // 20))
    wanted = options.samples or math.ceil(DEFAULT_TOKENS / options.sequence_length)
    return wanted, max(FEWEST_HELD_OUT, wanted // 4)


def on_text_of(
    options: HealOptions, ref: CalibrationRef, calibration: Sequence[str] = ()
) -> HealOptions:
    """The same options on the texts that scores rest on, where none of their own is named."""
    if options.calibration:
        return options
    return replace(
        options,
        calibration=tuple(calibration) or specs_of(ref),
        samples=options.samples if options.trains else samples_of(ref) or options.samples,
        sequence_length=ref.sequence_length or options.sequence_length,
        seed=seed_of_all(ref),
    )


def other_domain(
    loaded: LoadedModel,
    sources: Sequence[str],
    samples: int,
    *,
    sequence_length: int,
    spec: str | None = None,
    seed: int = 0,
    progress: Progress = QUIET,
) -> CalibrationText | None:
    """Samples of another domain than the calibration's."""
    if spec == NO_TEXT:
        return None
    spec = spec or _other_spec(loaded, sources)
    if spec is None:
        progress.say("heal: there is no text of another domain; give another text to check")
        return None
    return calibration_text(
        loaded,
        spec,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        passages=task_of(loaded.model).passages,
        progress=progress,
    )


def _other_spec(loaded: LoadedModel, sources: Sequence[str]) -> str | None:
    known = {spec_of(source) for source in sources}
    if PYDOC not in known and loaded.tokenizer is not None:
        return PYDOC
    return SELF if SELF not in known and loaded.model.can_generate() else None


def figures_from(options: HealOptions, texts: HealingTexts) -> FiguresFrom:
    """What the text that judges had decided before."""
    if texts.chose:
        return "searched"
    return "checked" if _short(options, texts) else "unseen"


def judged_on(own: CalibrationText, other: CalibrationText | None) -> list[CalibrationRef]:
    """The samples that judge, of both domains."""
    return [*own.parts, *([] if other is None else other.parts)]


def _short(options: HealOptions, texts: HealingTexts) -> list[str]:
    """The texts of which one sample serves to choose kinds and to judge them."""
    short = [text.ref.source for text in texts.held if len(text.input_ids) < 2]
    return short if options.kind in ("best", "fold", "distill") else []


def choice_warnings(options: HealOptions, texts: HealingTexts) -> list[str]:
    """What a reader must know where one text serves for two parts."""
    names, much = [], texts.fitting.read.much
    if short := _short(options, texts):
        names.append(
            f"Of {', '.join(short)} only one sample was held out, so healing is chosen and "
            f"measured on the same one: the gain looks better than it is. Give more {much}."
        )
    if chose := texts.chose:
        names.append(
            f"Some held-out samples of {', '.join(chose)} also decided what to drop, so the healed "
            f"model looks better than it is. Give more {much}, or heal on other {much}."
        )
    if again := [source for source in texts.again if source not in chose]:
        names.append(
            f"{', '.join(again)}: too short for four parts, so healing is fitted on samples that "
            "also decided what to drop. Those that judge it are others."
        )
    return names
