"""The texts of a healing: what is fitted on, what is held out, and another domain."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Samples by what they are for; no sample serves two ends.

    Of each text most is fitted on, and other documents are held out. One half of these decides,
    between kinds or when a training stops, and the other half judges; where nothing is decided all
    of them judge.
    """

    fitting: CalibrationText
    sources: tuple[CalibrationRef, ...]
    held: tuple[CalibrationText, ...]  # of each text
    other: CalibrationText | None  # samples of another domain; None where there is none
    deciding: int | None = None  # so many samples of each text; None: a half
    again: tuple[str, ...] = ()  # the texts that are fitted on what has chosen the cut
    chose: tuple[str, ...] = ()  # those that are judged on it, too
    together: int = 1

    @property
    def held_out(self) -> CalibrationText:
        """All that was held out, as one text."""
        return joined(self.held, self.together)

    @property
    def halves(self) -> tuple[CalibrationText, CalibrationText]:
        """What decides, and what judges; of a text with one held-out sample both are that."""
        pairs = [text.in_turn(self.deciding, self.together) for text in self.held]
        first, second = (joined(parts, self.together) for parts in zip(*pairs, strict=True))
        return first, second


def healing_texts(
    loaded: LoadedModel,
    options: HealOptions,
    progress: Progress = QUIET,
    *,
    chosen_on: Sequence[CalibrationRef] = (),  # left out, if there is enough else
    judging: int = 0,  # so many samples more than usual judge
    fewest: int = 0,  # so many of them show a limit, and judge before anything is fitted
) -> HealingTexts:
    """Reads or samples all that a healing needs."""
    task, together = task_of(loaded.model), together_in(loaded.model)
    options = options.for_task(task)
    seeds = [seed_of(ref.source) for ref in chosen_on if spec_of(ref.source) in SAMPLED]
    if options.seed in seeds:  # what the model sampled has chosen, so it samples another text
        options = replace(options, seed=max(seeds) + 1)
    specs = options.calibration or _default_texts(loaded, options)
    more = math.ceil(judging / len(specs)) if task.passages else judging
    sizes = [_usual_sizes(options, spec, specs) for spec in specs]
    samples, usual = sum(size.held for size in sizes), min(size.held for size in sizes)
    if fewest:
        room, least = more + _MOST_PASSAGES // 2, math.ceil(fewest / len(specs)) + FEWEST_HELD_OUT
        sizes = [size._replace(room=room, least=least) for size in sizes]
    texts = [
        _read(
            loaded,
            spec,
            size if spec in SAMPLED else size._replace(held=max(size.held + more, size.room)),
            options,
            chosen_on,
            progress,
        )
        for spec, size in zip(specs, sizes, strict=True)
    ]
    refuse_same([text.whole for text in texts], HealingError)
    parts = [text.parts(together) for text in texts]
    if fewest and sum(len(part.held.input_ids) - FEWEST_HELD_OUT for part in parts) < fewest:
        # A longer text must not show less than a shorter one, which is used again.
        parts = [text.parts(together, reuse=True) for text in texts]
    deciding = None
    if fewest:
        left = sum(len(part.held.input_ids) for part in parts) - fewest
        deciding = max(FEWEST_HELD_OUT, min(_MOST_PASSAGES // 2, left // len(specs)))
    elif judging and not task.passages:
        deciding = usual // 2
    elsewhere, is_waited_for = options, options.trains or judging > 0
    if is_waited_for and options.check_text is None and _other_spec(loaded, specs) == SELF:
        length = min(options.sequence_length, _SAMPLED_LENGTH)
        samples, elsewhere = _FEW_SAMPLED, replace(options, sequence_length=length)
    return HealingTexts(
        joined([part.fitting for part in parts]),
        tuple(part.fitting.ref for part in parts),
        tuple(part.held for part in parts),
        other_domain(loaded, [text.whole.ref for text in texts], samples, elsewhere, progress),
        deciding,
        tuple(part.fitting.ref.source for part in parts if part.again),
        tuple(part.held.ref.source for part in parts if part.chose),
        together,
    )


def texts_of_pairs(text: CalibrationText) -> HealingTexts:
    """Pairs of an encoder-decoder: most are fitted on, and a fifth judges."""
    number = len(text.input_ids)
    if number < 2:
        raise HealingError(
            f"{text.ref.source} holds one pair; healing fits on some and measures on others.",
            "Give more pairs with --calibration.",
            code="too-few-samples",
        )
    first = number - max(1, number // 5)
    fitted, held = text.rows(slice(0, first)), text.rows(slice(first, None))
    return HealingTexts(fitted, (fitted.ref,), (held,), None)


class _Sizes(NamedTuple):
    """How many samples of a text serve which end."""

    fitted: int
    held: int
    room: int = 0  # how many may be held out where many show a limit
    least: int = 0  # how many of these are needed

    def held_of(self, text: CalibrationText) -> int:
        """How many are held out: of a short text a fifth, but not more than tell a mean well.

        Where many show a limit, what isn't wanted to fit on, or a half, or what is needed.
        """
        number = len(text.input_ids)
        if number < 2:
            raise HealingError(
                f"{text.ref.source} gives one sample of {text.input_ids.shape[1]} tokens, or one "
                "image; one is needed to fit on, and one to judge by.",
                f"Give more {text.read.much}, or ask for a shorter --sequence-length.",
                code="too-few-samples",
            )
        if number == self.fitted + self.held:
            held = self.held
        else:
            held = max(1, min(number // 5, _MOST_PASSAGES))
        if self.room:
            needed = min(self.least, number - FEWEST_HELD_OUT)
            held = max(held, min(self.room, max(number - self.fitted, number // 2, needed)))
        return held


class _Parts(NamedTuple):
    """A text's samples to fit on and those held out, and which of them are of what has chosen."""

    fitting: CalibrationText
    held: CalibrationText
    again: bool = False
    chose: bool = False


class _Text(NamedTuple):
    """A text, and what is left of it beside what has chosen the cut."""

    whole: CalibrationText
    unused: CalibrationText
    sizes: _Sizes
    is_short: bool

    def parts(self, together: int, *, reuse: bool = False) -> _Parts:
        """Documents to fit on, and others that are held out; of a short text these are unused."""
        if not self.is_short and not reuse:
            return _Parts(*self.unused.apart_at(self.sizes.held_of(self.unused), together))
        number, held = self.sizes.held_of(self.whole), self.unused
        if reuse or not len(held.input_ids):
            again = self.whole is not held
            return _Parts(*self.whole.apart_at(number, together), again, again)
        if len(held.input_ids) > number:
            _, held = held.apart_at(number, together)
        rest = self.whole.rows(~np.isin(self.whole.documents, held.documents))
        return _Parts(rest, held, again=True)


def _read(
    loaded: LoadedModel,
    spec: str,
    sizes: _Sizes,
    options: HealOptions,
    chosen_on: Sequence[CalibrationRef],
    progress: Progress,
) -> _Text:
    together, samples = together_in(loaded.model), sizes.fitted + sizes.held
    whole = cut_to_whole(read_samples(loaded, spec, samples, options, progress), together)
    chosen = [ref for ref in chosen_on if ref.sha256 == whole.ref.sha256]
    if not chosen:
        return _Text(whole, whole, sizes, is_short=False)
    unused = read_samples(loaded, spec, samples, options, QUIET, apart_from=chosen)
    unused = cut_to_whole(unused, together)
    short = is_less(unused, [whole.ref]) and is_less(unused, chosen)
    return _Text(whole, unused, sizes, short or len(unused.input_ids) < 2)


def _default_texts(loaded: LoadedModel, options: HealOptions) -> tuple[str, ...]:
    """A training wants a mixture: it forgets what it doesn't read. An encoder wants much text."""
    if not options.trains or loaded.tokenizer is None:
        return (default_calibration(loaded),)
    if not loaded.model.can_generate():
        return (PYDOC, DOCSTRINGS)
    with contextlib.suppress(CalibrationError):  # its chat template may not work
        if 4 * len(chat_prefix(loaded)) < min(options.sequence_length, CHAT_TOKENS):
            return (PYDOC, CHAT)
    return (PYDOC, SELF)


def _usual_sizes(options: HealOptions, spec: str, specs: Sequence[str]) -> _Sizes:
    """Samples of a text to fit on, and to hold out; few of these where all are run often.

    To sample a text takes as long as to train on it: beside others it is a quarter of the mixture.
    """
    if not options.trains:
        fitted = options.samples or math.ceil(DEFAULT_TOKENS / options.sequence_length)
        return _Sizes(fitted, max(FEWEST_HELD_OUT, fitted // 4))
    alike = [text for text in specs if (text in SAMPLED) == (spec in SAMPLED)]
    share = 1.0
    if len(alike) < len(specs):
        share = _SAMPLED_SHARE if spec in SAMPLED else 1 - _SAMPLED_SHARE
    tokens = options.trained_tokens * share / len(alike)
    fitted = math.ceil(tokens / options.sequence_length)
    return _Sizes(fitted, max(2 * FEWEST_HELD_OUT, min(MOST_HELD_OUT, fitted // 20)))


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
    fitted: Sequence[CalibrationRef],
    samples: int,
    options: HealOptions,
    progress: Progress = QUIET,
) -> CalibrationText | None:
    """Samples of another domain than those that are fitted on; None where there is none."""
    if options.check_text == NO_TEXT:
        return None
    spec = options.check_text or _other_spec(loaded, [ref.source for ref in fitted])
    if spec is None:
        progress.say("heal: there is no text of another domain; give another text to check")
        return None
    text = calibration_text(
        loaded,
        spec,
        samples=samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        passages=task_of(loaded.model).passages,
        progress=progress,
    )
    what, hint = "what is fitted on, and no other domain", "Give --check-text another text."
    refuse_same_text(text.ref, fitted, what, hint, HealingError)
    return text


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


def _short(options: HealOptions, texts: HealingTexts) -> list[str]:
    """The texts of which one sample serves to choose kinds and to judge them."""
    short = [text.ref.source for text in texts.held if len(text.input_ids) < 2]
    return short if options.kind in ("best", "fold", "distill") else []


def choice_warnings(options: HealOptions, texts: HealingTexts) -> list[str]:
    """What a reader must know where one text serves for two parts."""
    much = texts.fitting.read.much
    ends = {
        "choose how to heal and judge it, which flatters it": _short(options, texts),
        "decided what to drop and judge the healed model, which flatters it": texts.chose,
        "decided what to drop and are fitted on; others judge": [
            source for source in texts.again if source not in texts.chose
        ],
    }
    return [
        f"{', '.join(names)}: too short for four parts, so the same samples {what}. Give more "
        f"{much}, or heal on other {much}."
        for what, names in ends.items()
        if names
    ]
