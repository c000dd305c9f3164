"""What each stage of `depthcut export` depends on.

A data set of the hub is taken as unchanged.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporter.artifacts import library_versions
from exporter.compare.options import QualityOptions
from exporter.engines.environment import default_threads, gpu_name, processor_name
from exporter.errors import TextSourceError
from exporter.files import sha256_file
from exporter.models.graph_facts import read_facts
from exporter.models.model_folder import find_model
from exporter.models.sentence_folder import longest_text
from exporter.models.texts.images import read_images
from exporter.models.texts.pairs import read_pairs
from exporter.models.texts.sources import PYDOC, Part
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import ENGINES, HEALING, QUANTIZE, Run
from exporter.report.files import REPORTS

Key = dict[str, Any]


def score_key(run: Run) -> Key:
    """The model, how it is loaded, the text."""
    return {
        "model": run.source_sha256,
        "load": vars(run.request.choosing),
        "score": vars(run.request.score),
        "texts": _text_hashes(run, run.request.score.calibration, "calibration"),
        "versions": run.versions,
    }


def export_key(run: Run) -> Key:
    """The model, and how it is written."""
    return {
        "model": run.source_sha256,
        "load": vars(run.request.load),
        "target": run.request.target,
        "cache_room": run.request.cache_room,
        "exporter": run.request.exporter,
        "opset": run.request.opset,
        "pooling": run.request.pooling,
        "versions": run.versions,
    }


def prune_key(run: Run) -> Key:
    """The exported graph, and the plan."""
    return {
        "baseline": run.ledger.files_hash("export"),
        "plan": run.ledger.files_hash("plan"),
        "healed": run.ledger.files_hash(HEALING) if run.request.heals_plan else None,
        "versions": run.versions,
    }


def measure_key(run: Run) -> Key:
    """Both graphs, what was made of them, the text, and the machine."""
    longest = longest_text(run.ledger.path("baseline"))
    compare = run.request.compare.for_texts(longest)
    return {
        **({} if longest is None else {"longest_text": longest}),
        "writes": REPORTS,
        "candidate": run.ledger.files_hash("prune"),
        "baseline": run.ledger.files_hash("export"),
        "plan": run.ledger.files_hash("plan"),
        "healed": run.ledger.files_hash(HEALING) if run.request.heals_plan else None,
        "quantized": None if run.request.quantize is None else run.ledger.files_hash(QUANTIZE),
        "engines": None if run.request.engines is None else run.ledger.files_hash(ENGINES),
        "options": vars(compare) | {"prefill_lengths": compare.prompt_lengths},
        "texts": _text_hashes(run, run.request.compare.texts, "evaluation"),
        "also": [read_facts(find_model(path).onnx).sha256 for path in run.request.also],
        "tasks": _question_hashes(run.request.compare.quality),
        "calibration": run.ledger.files_hash("score"),
        "machine": [processor_name(), default_threads(), gpu_name()],
        "versions": run.versions,
    }


def request_key(request: ExportRequest, source_sha256: str, plan: str | None) -> Key:
    """Everything that a whole run depends on, but for the machine that it is measured on.

    Args:
        request: What is asked for; where it is put doesn't count.
        source_sha256: Of what defines the model.
        plan: The hash of the given plan's file, which need not be there yet; None without one.
    """
    asked = asdict(request) | {"out": None, "redo": None, "shared": None}
    asked["drops"] = asked["drops"] | {"plan": None}
    heal, quantize = request.heal, request.quantize
    texts: list[str | None] = [*request.score.calibration, *request.compare.texts]
    texts += () if heal is None else (*heal.calibration, heal.check_text)
    texts += () if quantize is None else (*quantize.calibration, str(quantize.gguf))
    return {
        "model": source_sha256,
        "asked": asked,
        "plan": plan,
        "texts": [file_hash(text) for text in texts],
        "tasks": _question_hashes(request.compare.quality),
        "items": [file_hash(str(path)) for path in request.search.task_files],
        "writes": REPORTS,
        "versions": {**library_versions(), "python": platform.python_version()},
    }


def _question_hashes(quality: QualityOptions) -> list[str | None]:
    """Of the user's prompts, and of the tasks' files where they are local."""
    folder, prompts = quality.task_data, quality.prompts
    names = () if folder is None else quality.tasks  # mteb's are no files
    files = [*([prompts] if prompts else []), *(f"{folder}/{name}.jsonl" for name in names)]
    return [file_hash(str(file)) for file in files]


def _text_hashes(run: Run, specs: Iterable[str], part: Part) -> list[str | None]:
    """Of the texts that are files; of an encoder-decoder with the recordings that they name."""
    if not run.is_encoder_decoder:
        return [file_hash(text) for text in specs]
    named = [text for text in specs if text != PYDOC]
    return [read_pairs(text, part=part, sound=run.hears).content_sha256 for text in named]


def file_hash(source: str | None) -> str | None:
    """The hash of a text or plan that is a file, or of a folder's images; else None.

    That is for a name such as ``pydoc``, and for a folder of something else.
    """
    if source is None or not Path(source).exists():
        return None
    if Path(source).is_file():
        return sha256_file(Path(source))
    with contextlib.suppress(TextSourceError):
        return read_images(source, part="calibration").content_sha256
    return None
