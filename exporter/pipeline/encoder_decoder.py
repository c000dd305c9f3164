"""The stages of `depthcut export` that make and compare the three graphs of an encoder-decoder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.planner import refuse_more_than_scores
from exporter.compare.kept import decided_on, refuse_deciding
from exporter.compare.sequences import (
    OF_ONE_GRAPH,
    refuse_of_one_graph,
    refuse_of_other_source,
)
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_stacks
from exporter.errors import UsageError
from exporter.files import staged_directory
from exporter.heal.healed import heal_stacks, refuse_other_ways
from exporter.heal.options import TRAINED, HealOptions
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.model_folder import GRAPHS
from exporter.models.sentence_folder import copy_processor_files
from exporter.models.texts.pairs import PAIRS, read_pairs, scored_pairs
from exporter.models.texts.sources import PYDOC, Part, TextSource
from exporter.options import Options, is_given, key_at, refusal
from exporter.pipeline.request import QUICK, ExportRequest
from exporter.pipeline.run import HEALING, Key, Run, files_below, score_key
from exporter.pipeline.stages import judge, say_pruned
from exporter.progress import Progress
from exporter.report.sections.healing import healing_words
from exporter.score.options import refuse_idle_of_pairs

_O = TypeVar("_O", bound=Options)
_OF_WEIGHTS = (*TRAINED, "replacements")
"""What is said of healing kept weights."""
_GRAPHS = tuple(f"{graph}.onnx*" for graph in GRAPHS)


def refuse_unfit(request: ExportRequest) -> None:
    """Refuses what an encoder-decoder can't be exported with, before anything is done."""
    budget = request.drops.budget
    if budget is not None:
        refuse_more_than_scores(budget, request.search)
    result = {
        "target": request.target != "portable",
        "exporter": request.exporter == "optimum",
        "pooling": request.pooling,
        "checkpoint": request.checkpoint,
        "also": bool(request.also),
        "server": request.server is not None,
        "stream": request.stream,
        "quantize": request.quantize is not None,
        "engines": request.engines is not None,
    }
    outcome = next((name for name, given in result.items() if given), None)
    if outcome is not None:
        words = "{0} is for models of one graph; an encoder-decoder becomes three."
        raise refusal(request, [outcome], words, "Leave {0} out.", code="one-graph-option")
    if request.load.dtype == "bfloat16":
        raise UsageError(
            "An encoder-decoder in bfloat16 has no graphs that ONNX Runtime's CPU runs.",
            "Say --dtype float32 or float16.",
            code="one-graph-option",
        )
    refuse_of_one_graph(request.compare)
    refuse_idle_of_pairs(request.score, "sequence_length", "seed")
    if request.heal is not None:
        _refuse_healing(request, request.heal)


def without_presets(request: ExportRequest) -> ExportRequest:
    """A first look (--quick) without what it asks for by itself and has no effect here."""
    if not request.quick:
        return request
    score, heal = _unset(request.score, "calibration"), request.heal
    if heal is not None and heal.calibration == request.score.calibration:  # taken from there
        heal = replace(heal, calibration=score.calibration)
    return replace(
        request,
        score=score,
        heal=heal,
        compare=_unset(request.compare, *OF_ONE_GRAPH),
        search=_unset(request.search, "tokens"),
    )


def _unset(options: _O, *names: str) -> _O:
    """Options with their defaults where they have the values of :data:`QUICK`."""
    for name in names:
        head, _, rest = name.partition(".")
        key, value = key_at(type(options), name), getattr(options, head)
        if rest:
            options = replace(options, **{head: _unset(value, rest)})
        elif value == QUICK.get(key):
            default = next(field.default for field in fields(options) if field.name == head)
            options = replace(options, **{head: default})
    return options


def refuse_other_pairs(run: Run) -> None:
    """Refuses lengths that recordings don't have, and to judge on what would decide the plan."""
    request = run.request
    if not request.compared:
        return
    refuse_of_other_source(request.compare, hears=run.hears)
    named, scored = request.compare.eval_text, request.score.calibration
    if len(scored) > 1 or (run.hears and named == PYDOC):  # told later, and noise
        return

    def read(spec: str, part: Part) -> TextSource:
        pairs = read_pairs(spec, part=part, sound=run.hears)
        return TextSource(pairs.source, (), pairs.sha256)

    judged, texts = read(named, "evaluation"), [read(item, "calibration") for item in scored]
    known = {} if run.given_plan is None else decided_on(run.given_plan.plan.parts)
    refuse_deciding([judged], {"what importance would be measured on": texts, **known})


def _refuse_healing(request: ExportRequest, heal: HealOptions) -> None:
    scored = request.score
    broken = {
        "check_text": heal.check_text is not None,
        "calibration": heal.calibration not in ((), scored.calibration),
        "samples": heal.samples not in (None, scored.samples),
        **{name: heal.kind == "auto" and is_given(heal, name) for name in _OF_WEIGHTS},
    }
    for name, given in broken.items():
        if given:
            words = "An encoder-decoder is healed on the pairs that it is scored on, and no kept "
            words += "weight is trained: {0} asks for another way."
            raise refusal(heal, [name], words, "Leave {0} out.", code="one-graph-option")
    refuse_other_ways(_without_weights(heal))


def settled(request: ExportRequest, progress: Progress) -> ExportRequest:
    """The request with what export does by itself as it goes with such a model; it says so."""
    heal = request.heal
    if heal is not None and heal != (own := _without_weights(heal)):
        progress.say("heal: by biases and linear maps; kept weights stay as they are")
        heal = own
    return replace(request, heal=heal, in_stacks=True)


def export(run: Run) -> tuple[list[Path], list[dict[str, Any]]]:
    """Writes the three graphs of the baseline, and holds them against PyTorch."""
    from exporter.export.encoder_decoder import check_stacks, write_stacks

    folder = run.ledger.work / "baseline"
    with staged_directory(folder) as stage:
        write_stacks(run.loaded, stage, opset=run.request.opset, progress=run.progress)
        save_pretrained_files(run.loaded, stage)
        copy_processor_files(run.loaded.path, stage)
        provider = run.request.compare.provider
        checks = check_stacks(run.loaded, stage, provider=provider, progress=run.progress)
        judge(run, "baseline against PyTorch", checks)
    return files_below(folder), [check.model_dump() for check in checks]


def prune(run: Run) -> tuple[list[Path], list[dict[str, Any]]]:
    """Cuts the candidate's graphs, and holds them against PyTorch and the masked baseline."""
    from exporter.export.encoder_decoder import check_stacks

    baseline, folder = run.ledger.path("baseline"), run.ledger.work / "candidate"
    plan = run.plan
    with staged_directory(folder) as stage:
        run.ledger.copy("export", "baseline", stage, leave_out=_GRAPHS)
        report = prune_stacks(
            baseline,
            stage,
            plan,
            stacks(run),
            CutOptions(allow_all=run.request.allow_empty),
            progress=run.progress,
        )
        say_pruned(run, report)
        checks = check_stacks(
            run.loaded,
            stage,
            deletions=plan.plan.deletions,
            replacements=plan.replacements,
            provider=run.request.compare.provider,
            progress=run.progress,
        )
        done = "skipped" if plan.replacements is None else "skipped or replaced"
        judge(run, f"candidate against PyTorch with the same modules {done}", checks)
    files = [*files_below(folder), report.write(run.ledger.work / "prune.json")]
    return files, [check.model_dump() for check in checks]


def _without_weights(heal: HealOptions) -> HealOptions:
    """The usual ways of healing, with what they do where no kept weight can be changed."""
    if heal.kind == "auto":
        return replace(heal, kind="best", replacements="none")
    if heal.kind == "fold" and heal.replacements != "none":
        return replace(heal, kind=heal.replacements, replacements="none")
    return heal


def heal_key(run: Run, wanted: HealOptions) -> Key:
    """The model, the plan, how it is healed, and the pairs, which are those of the scores."""
    return {
        "model": run.source_sha256,
        "load": vars(run.request.choosing),
        "plan": run.ledger.files_hash("plan"),
        "options": [wanted.kind, wanted.batch_size],
        "pairs": score_key(run)["texts"],
        "samples": run.request.score.samples,
        "versions": run.versions,
    }


def heal(run: Run, wanted: HealOptions) -> tuple[list[Path], None]:
    """Fits what takes the dropped branches' places, on the pairs that the scores rest on."""
    score, folder = run.request.score, run.ledger.work / HEALING
    samples = -(-(score.samples or PAIRS) * 5 // 4)  # healing holds a fifth out
    text = scored_pairs(run.choosing, score.calibration, samples=samples, progress=run.progress)
    healed = heal_stacks(run.choosing, run.chosen_plan.plan, text, wanted, run.progress)
    with staged_directory(folder) as stage:
        healed.write(stage)
    report = healed.report
    run.progress.say(f"heal: {healing_words(report.healing, report.reads)}")
    return files_below(folder), None


def stacks(run: Run) -> Stacks:
    """How many layers the encoder and the decoder have."""
    encoder = run.encoder_layers or 0
    return Stacks(encoder, run.num_layers - encoder)
