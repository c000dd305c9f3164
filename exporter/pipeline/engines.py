"""The stage of `depthcut export` that builds engines of both models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import ask_driver
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.usage import write_use
from exporter.files import staged_directory
from exporter.models.sentence_folder import longest_text
from exporter.pipeline.keys import Key
from exporter.pipeline.request import EngineRequest
from exporter.pipeline.run import ENGINES, QUANTIZE, Run, files_below
from exporter.pipeline.uses import arm_engine_uses

_USUAL = 2048  # what an engine serves at least, as exporter.engines.build.profiles has it
_USUAL_CONTEXT = 4096


def engines_key(run: Run, wanted: EngineRequest) -> Key:
    """Both graphs, how they are built, and for which card where that is the one that is here."""
    return {
        **run.sources(),
        "quantized": run.ledger.files_hash(QUANTIZE) if run.request.by_modelopt else None,
        "backend": wanted.backend,
        "builds": wanted.builds,
        "split": wanted.split,
        "settings": asdict(wanted.settings),
        "devices": [str(device) for device in ask_driver().devices],
        "ranges": str(_ranges(run)),
        "versions": run.versions,
    }


def build(run: Run, wanted: EngineRequest) -> tuple[list[Path], dict[str, str]]:
    """Builds the engines of both models; what they were built from is noted."""
    folder = run.ledger.work / ENGINES
    with staged_directory(folder) as stage:
        for arm, source in run.built_from().items():
            (stage / arm).mkdir()
            graph = source / "model.onnx"
            built = build_engines(
                graph,
                stage / arm,
                split=wanted.split,
                builds=wanted.builds,
                ranges=fitting(graph_inputs(graph), _ranges(run)),
                backend=wanted.backend,
                settings=wanted.settings,
                progress=run.progress,
            )
            for path, record in built:
                layers = sum(record.layers.values())
                run.progress.say(
                    f"engines: {arm}, {path.name}: {record.engine_bytes / 1e6:.1f} MB, "
                    f"{layers} layers, in {record.total_s:.1f} s"
                )
            write_use(arm, arm_engine_uses(run, arm), stage / arm)
    return files_below(folder), run.sources()


def _ranges(run: Run) -> Ranges:
    """Usual ranges, widened to what is measured."""
    options = run.request.compare.for_texts(longest_text(run.ledger.path("baseline")))
    prompts = (*options.prompt_lengths, options.eval_sequence_length)
    contexts = options.decode_past_lengths or (1,)
    return Ranges(
        batch=Span(1, min(options.batches), max(options.batches)),
        prompt=Span(1, max(options.prompt_lengths or (1,)), max(_USUAL, *prompts)),
        context=Span(1, max(contexts), max(_USUAL_CONTEXT, *contexts)),
    )
