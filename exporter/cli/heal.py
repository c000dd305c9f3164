"""`depthcut heal`, `checkpoint` and `gguf`: models that are healed or cut without ONNX."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from exporter.artifacts import HealingReport
from exporter.artifacts.plans import hold_against_model, read_plan, validate_plan
from exporter.artifacts.servers import CHECKPOINT_SERVERS, Server
from exporter.checkpoint.facts import CheckpointForm, own_dtype
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.checkpoint.pruned_model import refuse_checkpoint_folder
from exporter.cli.command import command
from exporter.cli.console import NORMAL, ConsoleProgress
from exporter.cli.prune import DropOptions
from exporter.cli.results import print_result, table_lines
from exporter.files import sha256_file
from exporter.heal.options import HealOptions
from exporter.models.loading.meta_model import load_meta
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.loading.sources import LOADING, SourceOptions, StreamOptions
from exporter.option_types import Dtype, InputFile, OutputFile, OutputFolder, OutputPath
from exporter.options import Options, Rule, argument, dataclass, excludes, option, part, required
from exporter.report.sections.healing import healing_grid, healing_words
from graph_passes.files.placing import working


@dataclass(frozen=True, kw_only=True)
class HealCall(Options):
    """What `depthcut heal` is asked to do."""

    model: str = argument("MODEL")
    plan: InputFile = argument("PLAN")
    output: OutputPath = option(Path("healed.json"), "The healed plan.", "-o", "--output")
    heal: HealOptions = part(HealOptions())
    allow_empty: bool = option(
        False, "Accept a plan that leaves no attention and no MLP. Disables no other check."
    )
    load: SourceOptions = part(SourceOptions())


@command(HealCall)
def heal(call: HealCall, progress: ConsoleProgress) -> None:
    """Recover quality that MODEL loses by PLAN, and measure the gain.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Writes the healed plan, its
    numbers and a report: healed.json, healed.safetensors and healed.report.json. The gain is
    measured on held-out text of the calibration's domain and on text of another domain. After an
    interruption the same command resumes.
    """
    from exporter import heal_model
    from exporter.heal.plan_file import numbers_of, refuse_places, write_healed_plan

    plan = read_plan(call.plan)
    texts = map(Path, filter(None, (*call.heal.calibration, call.heal.check_text)))
    inputs = [call.plan, *texts, *numbers_of(plan, call.plan)]
    refuse_places(call.output, inputs, Path(call.model))
    with progress.task(f"load {call.model}"):
        loaded = load_model(call.model, **vars(call.load))
    with working(call.output) as kept:
        healed = heal_model(
            loaded,
            plan,
            call.heal,
            made_from={"plan": sha256_file(call.plan)},
            allow_all=call.allow_empty,
            work=kept,
            progress=progress,
        )
        write_healed_plan(
            call.output,
            healed.plan,
            healed.branch_replacements,
            weights=healed.weights,
            report=healed.report,
        )
    report, lines = healed.report, list[str]()
    if report.healing.texts:
        grid = healing_grid(report.healing, read=report.reads)
        lines += table_lines(grid.header, grid.rows)
    if progress.verbosity < NORMAL:  # whoever isn't quiet has heard the warnings already
        lines += [f"Warning: {warning}" for warning in report.healing.warnings]
    words = healing_words(report.healing, report.reads).capitalize()
    print_result(report, progress.as_json, *lines, words, call.output)


@dataclass(frozen=True, kw_only=True)
class CheckpointCall(Options):
    """What `depthcut checkpoint` is asked to do."""

    model: str = argument("MODEL")
    plan: InputFile = argument("PLAN")
    output: OutputFolder = required("Folder for the checkpoint.", "-o", "--output")
    form: CheckpointForm = option(
        "own",
        "How the folder says what is dropped: as transformers has it, or as DeciLM, which vLLM, "
        "SGLang, TensorRT-LLM and mlx-lm load.",
        "--as",
    )
    server: Server | None = option(
        None,
        "The runtime that --as decilm is for; linear maps have other names in each.",
        "--for",
        usual="all that load it",
    )
    dtype: Dtype | None = option(
        None, "Type of the written weights.", usual="the model's own", section=LOADING
    )
    streaming: StreamOptions = part(StreamOptions(), without=("stream_dir",))
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    rules = (
        *(
            excludes("streaming.stream", other, "it reads safetensors a layer at a time")
            for other in ("form", "load.trust_remote_code", "load.allow_pickle")
        ),
        Rule(
            ("server", "form"),
            lambda told: (
                told.server is not None
                and (told.form != "decilm" or told.server not in CHECKPOINT_SERVERS)
            ),
            "{0} is for {1} decilm, and names one of " + ", ".join(CHECKPOINT_SERVERS) + ".",
            "For llama.cpp cut the GGUF file: depthcut gguf.",
        ),
    )


@command(CheckpointCall)
def checkpoint(call: CheckpointCall, progress: ConsoleProgress) -> None:
    """Drop the sublayers of PLAN from MODEL, and write the rest as a Hugging Face checkpoint.

    MODEL is a Hugging Face folder, a hub id or a GGUF file; PLAN is a plan.json, healed or not, or
    a config.json of LLM-Drop, Puzzletron or transformers that says what is dropped. The dropped
    weights are not written. If only whole blocks are dropped, the result is a plain model with
    fewer layers.
    """
    from exporter import write_checkpoint
    from exporter.artifacts.loaded_plan import read_replacements
    from exporter.heal.plan_file import report_of

    plan = read_plan(call.plan)
    replacements, report = read_replacements(plan, call.plan), report_of(plan, call.plan)
    known = None if report is None else HealingReport.read(report, named=False).healing
    numbers = [] if replacements is None else [replacements.path]
    refuse_checkpoint_folder(call.output, [call.plan, *numbers, Path(call.model)])
    with working(call.output):
        with progress.task(f"load {call.model}"):
            loaded = _loaded(call)
        # A plan that leaves no sublayer was asked for with --allow-empty when it was made.
        validate_plan(
            plan,
            loaded.ref.num_layers,
            encoder_layers=loaded.ref.encoder_layers,
            model=call.model,
            path=call.plan,
            allow_all=True,
        )
        hold_against_model(
            plan, loaded.ref.sha256, model=call.model, path=call.plan, progress=progress
        )
        facts = write_checkpoint(
            loaded,
            plan,
            call.output,
            replacements=replacements,
            card=lambda facts: model_card(facts, CardSources(plan, healing=known)),
            form=call.form,
            server=call.server,
            progress=progress,
        )
    before, after = facts.before.parameters / 1e6, facts.after.parameters / 1e6
    words = f"{before:,.2f} -> {after:,.2f} million parameters; {facts.loader_words}"
    print_result(facts, progress.as_json, words, call.output)


def _loaded(call: CheckpointCall) -> LoadedModel:
    """The model, with its weights or without, in the dtype that was asked for or its own."""
    source = call.load.reading
    dtype = call.dtype or own_dtype(call.model, **source)
    if call.streaming.stream:
        names = ("revision", "allow_any_model_type")
        return load_meta(call.model, dtype=dtype, **{name: source[name] for name in names})
    return load_model(call.model, dtype=dtype, **source)


@dataclass(frozen=True, kw_only=True)
class GgufCall(Options):
    """What `depthcut gguf` is asked to do."""

    model: InputFile = argument("FILE")
    output: OutputFile = required("The cut GGUF file.", "-o", "--output")
    what: DropOptions = part()


@command(GgufCall)
def gguf(call: GgufCall, progress: ConsoleProgress) -> None:
    """Cut sublayers out of FILE, a GGUF file or one of its shards. Needs no PyTorch.

    What stays is copied byte for byte. If only whole blocks go, the result is of FILE's own
    architecture; otherwise FILE must be a Llama, and the result is of llama.cpp's architecture
    deci. A cut that llama.cpp would compute wrongly is refused.
    """
    from exporter import cut_gguf

    facts = cut_gguf(call.model, call.output, call.what.read(), progress=progress)
    before, after = facts.bytes_before / 1e6, facts.bytes_after / 1e6
    words = (
        f"{len(facts.kept)} of {facts.layers} layers, architecture {facts.architecture[1]}: "
        f"{facts.tensors_kept} tensors kept, {facts.tensors_removed} removed, "
        f"{facts.tensors_added} added; {before:.1f} -> {after:.1f} MB"
    )
    arms = [f"llama.cpp:{path}" for path in (call.model, call.output)]
    judge = shlex.join(["depthcut", "compare", *arms, "-o", "report"])
    if importlib.util.find_spec("llama_cpp") is None:
        judge += "   # after: pip install 'depthcut[llama-cpp]'"
    print_result(facts, progress.as_json, words, call.output, f"Measure it: {judge}")
