"""What a comparison has found of the arms' answers: a run that goes on asks only for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts.store import key_hash
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.asked_tasks import tasks_version
from exporter.compare.journal import Journal
from exporter.files import sha256_file

if TYPE_CHECKING:
    from exporter.models.texts import TextSource

_T = TypeVar("_T")


class Answers:
    """Finished results by name, in a comparison's journal.

    They count for the same arms, libraries and machine as its times do, and beyond that for the
    same text, tokenizers, tasks and options of quality.

    Args:
        pair: Whose answers.
        texts: What the arms are judged on.
        journal: Where results are kept; None keeps none.
    """

    def __init__(self, pair: Pair, texts: TextSource, journal: Journal | None) -> None:
        self._pair = pair
        self._journal = journal
        self._key = "" if journal is None else key_hash(_asked(pair, texts))

    def found(self, name: str, kind: TypeAdapter[_T], find: Callable[[], _T]) -> _T:
        """What an earlier run found under a name, or what is found now: that is kept if it is any.

        Args:
            name: As the user may read it: ``predictions``.
            kind: Of the result.
            find: Measures it.
        """
        if self._journal is None:
            return find()
        kept = self._journal.recall_answers(name, self._key)
        try:
            if kept is not None:
                result = kind.validate_python(kept)
                self._pair.progress.say(f"accuracy: kept from an earlier run: {name}")
                return result
        except ValidationError:
            pass  # Another depthcut's: it is measured again.
        result = find()
        if result:
            self._journal.keep_answers(name, self._key, kind.dump_python(result, mode="json"))
        return result


def _asked(pair: Pair, texts: TextSource) -> dict[str, Any]:
    """Everything that answers depend on, beside what the journal's own key has."""
    options = pair.options
    return {
        "text": [texts.source, texts.sha256],
        "samples": [options.eval_tokens, options.eval_sequence_length],
        "quality": vars(options.quality),
        "tasks": tasks_version(options.quality),
        "folders": {name: _beside(arm) for name, arm in pair.judged.items()},
    }


def _beside(arm: ComparedArm) -> list[Any]:
    tokenizer = arm.folder.tokenizer
    return [arm.folder.config, None if tokenizer is None else sha256_file(tokenizer)]
