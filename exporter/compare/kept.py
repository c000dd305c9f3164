"""What a comparison has measured so far: a run that is killed goes on from there.

A chunk of rounds is kept whole or not at all. Chunks are loads of their own anyway, so that some of
an earlier process are worth as much as those of this one, under the same key: the same files,
options, libraries and machine. Beside them stand finished results of accuracy, which depend on
texts, tokenizers, tasks and options of quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from exporter.artifacts import ComparisonReport, library_versions
from exporter.artifacts.ledger import FOLDER
from exporter.artifacts.store import Store
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.options import CompareOptions
from exporter.compare.prompts import questions
from exporter.compare.tasks.choosing import task_versions
from exporter.compare.tasks.probes import make_probes
from exporter.engines.environment import default_threads, environment
from exporter.files import sha256_file
from exporter.models.companions import settings_hashes
from exporter.models.texts.chat_template import ChatTemplate
from exporter.models.texts.images import Images
from exporter.models.texts.sources import TextSource
from exporter.progress import Progress

_T = TypeVar("_T")
_NAME = "comparison.jsonl"


def open_store(pair: Pair, folder: Path | None) -> Store:
    """What an earlier run of the same comparison has left in a folder, or a new store.

    Args:
        pair: What times depend on; it need not run yet.
        folder: The output folder; None keeps nothing.
    """
    arms = {name: _identity(arm) for name, arm in pair.arms.items()}
    return store_of(arms, pair.options, folder, gpu=pair.on_gpu, progress=pair.progress)


def store_of(
    arms: Mapping[str, Sequence[str]],
    options: CompareOptions,
    folder: Path | None,
    *,
    gpu: bool,
    progress: Progress,
) -> Store:
    """The same of arms that are known by what tells each from others, such as hashes.

    Args:
        arms: By name.
        options: How they are timed.
        folder: The output folder; None keeps nothing.
        gpu: Whether they run on one.
        progress: Told where there is something.
    """
    if folder is None:
        return Store(None)
    machine = environment(threads=options.threads or default_threads(), gpu=gpu)
    same = ("machine", "processor", "cpu_count", "threads", "python", "gpu", "affinity")
    made_from: dict[str, Any] = {
        "arms": dict(arms),
        "options": [options.rounds, options.timing.kept],
        "versions": library_versions(),
        "machine": {name: getattr(machine, name) for name in same},
    }
    store = Store(folder / FOLDER / _NAME, made_from)
    if store.count:
        progress.say(f"time: going on with {store.count} parts that an earlier run timed")
    return store


def _identity(arm: ComparedArm) -> list[str]:
    engines = [engine.sha256 for engine in arm.engines]
    return [arm.runner.backend, arm.runner.provider, arm.facts.sha256, *engines]


def forget(folder: Path, report: ComparisonReport) -> None:
    """Removes what was kept: the report is written.

    Where a row hasn't the power that was asked for, its times stay: another run goes on with them.
    """
    if all(row.power is None or row.power.is_reached for row in report.latency):
        (folder / FOLDER / _NAME).unlink(missing_ok=True)


class AccuracyCache:
    """Finished results of accuracy, each found or measured once.

    Args:
        pair: Whose answers.
        texts: What the arms are judged on.
        store: Where results are kept; None keeps none.
        other: The text of another domain.
    """

    def __init__(
        self,
        pair: Pair,
        texts: TextSource,
        store: Store | None = None,
        other: TextSource | None = None,
    ) -> None:
        self._pair = pair
        self._store = store or Store(None)
        self._asked = _asked(pair, texts, other)

    def found(self, name: str, kind: TypeAdapter[_T], find: Callable[[], _T]) -> _T:
        """What an earlier run found under a name, or what is found now: that is kept if it is any.

        Args:
            name: As the user may read it: ``predictions``.
            kind: Of the result.
            find: Measures it.
        """
        told = f"accuracy: kept from an earlier run: {name}"
        return self._store.once(
            name, kind, find, key=self._asked, on_found=lambda: self._pair.progress.say(told)
        )


def _asked(pair: Pair, texts: TextSource, other: TextSource | None) -> dict[str, Any]:
    """Everything that answers depend on, beside what times do."""
    options = pair.options
    return {
        "text": [texts.source, _hash_of(texts)],
        "other text": other and [other.source, other.sha256],
        "samples": [options.eval_tokens, options.eval_sequence_length],
        "quality": vars(options.quality),
        "tasks": task_versions(options.quality),
        "probes": [probe.sha256 for probe in make_probes(options.quality.probes)],
        "prompts": questions(options.quality.prompts).texts,
        "folders": {name: _beside(arm) for name, arm in pair.judged.items()},
    }


def _hash_of(texts: TextSource) -> str:
    """Of all that is asked; the labels of images count."""
    return texts.content_sha256 if isinstance(texts, Images) else texts.sha256


def _beside(arm: ComparedArm) -> list[Any]:
    tokenizer, onnx = arm.folder.tokenizer, arm.folder.onnx
    home = onnx if onnx.is_dir() else arm.folder.home  # a PyTorch model is its folder
    known = [arm.folder.config, settings_hashes(home)]
    if tokenizer is None:
        return known
    return [*known, sha256_file(tokenizer), ChatTemplate.beside(tokenizer)]
