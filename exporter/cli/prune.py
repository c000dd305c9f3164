"""`depthcut prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    ONNX_FILE,
    Size,
    collecting_rarely,
    json_option,
    verbosity_options,
)

if TYPE_CHECKING:
    from exporter.artifacts import EngineParse, Verification
    from exporter.engines.build.flavours import Backend


@click.command(short_help="Cut sublayers out of an ONNX file.")
@click.argument("model", type=ONNX_FILE)
@click.option("-o", "--output", type=ANY_PATH, required=True, help="The pruned ONNX file.")
@click.option("--plan", "plan_path", type=EXISTING_FILE, help="Drop what this plan.json says.")
@click.option(
    "--drop", "drops", multiple=True, metavar="KIND:LAYERS",
    help="Drop these, such as attention:25,26 or mlp:3 or block:10-12. Can be repeated.",
)  # fmt: skip
@click.option(
    "--verify", type=click.Choice(["oracle", "none"]), default="oracle", show_default=True,
    help="Hold the result against the original with the branches multiplied by zero.",
)  # fmt: skip
@click.option(
    "--verify-limit", type=Size(), default="8GB", show_default=True, metavar="SIZE",
    help="Above this size of the weights, verify at a cheaper setting that needs little memory.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(["compact", "share"]), default="compact", show_default=True,
    help="Write a data file with the survivors, or point into the original's (same folder).",
)  # fmt: skip
@click.option(
    "--report", "report_path", type=ANY_PATH,
    help="The report's file.  [default: prune.json beside the result]",
)  # fmt: skip
@click.option(
    "--check-engine", type=click.Choice(["tensorrt-rtx", "tensorrt"]), is_flag=False,
    flag_value="tensorrt-rtx", metavar="[BACKEND]",
    help="Fail if an engine's parser takes the original and not the result. [tensorrt-rtx]",
)  # fmt: skip
@click.option("--renumber-kv", is_flag=True, help="Number the remaining KV caches from 0.")
@click.option(
    "--genai-config", type=click.Choice(["rewrite", "none"]), default="rewrite", show_default=True,
    help="Write onnxruntime-genai's config for the result, where the original has one.",
)  # fmt: skip
@click.option(
    "--force", is_flag=True,
    help="Cut even if no attention and no MLP at all is left. Lifts no other refusal.",
)  # fmt: skip
@click.option("--keep-debug", is_flag=True, help="Keep the exporter's stack traces.")
@json_option
@verbosity_options
@click.pass_obj
@collecting_rarely
def prune(
    progress: ConsoleProgress,
    /,
    model: Path,
    output: Path,
    *,
    plan_path: Path | None,
    drops: tuple[str, ...],
    verify: Literal["oracle", "none"],
    verify_limit: int,
    weights: Literal["compact", "share"],
    report_path: Path | None,
    check_engine: Backend | None,
    renumber_kv: bool,
    genai_config: Literal["rewrite", "none"],
    force: bool,
    keep_debug: bool,
    as_json: bool,
) -> None:
    """Cut sublayers out of MODEL, an ONNX file or a folder with one. Needs no PyTorch.

    A report, prune.json, is written beside the result, unless --report names another file.
    """
    from exporter.artifacts.plans.by_score import parse_drops, read_plan
    from exporter.artifacts.plans.origin import hold_against_model
    from exporter.artifacts.replacement_file import read_replacements
    from exporter.cli.results import print_artifact
    from exporter.cut.surgery import prune_file
    from exporter.errors import UsageError
    from exporter.files import refuse_overwriting, sha256_file
    from exporter.printable import counted

    gate = None
    if check_engine is not None:
        from exporter.engines.build.check import engine_gate

        gate = engine_gate(check_engine, progress)
    if (plan_path is None) == (not drops):
        raise UsageError("Say what to drop:", "--plan FILE or --drop KIND:LAYERS, one of them.")
    plan = parse_drops(drops) if plan_path is None else read_plan(plan_path)
    replacements = None
    if plan_path is not None:
        exported_from = _exported_from(model) if plan.made_from else None
        hold_against_model(plan, exported_from, model=str(model), path=plan_path, progress=progress)
        replacements = read_replacements(plan, plan_path)
        for written in (output, report_path or output.with_name("prune.json")):
            refuse_overwriting(written, [plan_path])
    report = prune_file(
        model,
        output,
        plan.deletions,
        plan_sha256=sha256_file(plan_path) if plan_path else None,
        replacements=replacements,
        verify=verify,
        verify_limit_bytes=verify_limit,
        weights=weights,
        renumber_kv=renumber_kv,
        keep_debug=keep_debug,
        allow_all=force,
        genai_config=genai_config,
        report_path=report_path,
        engine_check=gate,
        progress=progress,
    )
    replaced = sum(entry.replacement != "none" for entry in report.deleted)
    place = f", {replaced} of them replaced" if replaced else ""
    line = (
        f"{counted(len(report.deleted), 'sublayer')} deleted{place}: "
        f"{report.before.nodes} -> {report.after.nodes}"
        f" nodes, {report.before.bytes / 1e6:.1f} -> {report.after.bytes / 1e6:.1f} MB of weights,"
        f" verification: {_verification(report.verification, verify)}{_parse(report.engine)}"
    )
    print_artifact(report, output, as_json, line)


def _exported_from(model: Path) -> str | None:
    """The hash of the model that a graph was exported from, where it tells."""
    from exporter.artifacts.plans.origin import MODEL_KEY
    from graph_passes.files.storage import load_model

    return load_model(model).metadata_props.get(MODEL_KEY)


def _parse(done: EngineParse | None) -> str:
    if done is None:
        return ""
    return f"; {done.backend} {done.version} {'parses it' if done.parsed else 'does not parse it'}"


def _verification(done: Verification, asked: str) -> str:
    if done.max_abs_error is None:
        return "none"
    asked += " at the cheaper setting" if "cheaper setting" in done.method else ""
    undecided = "" if done.passed else ", undecided, since the deleted branches change nothing"
    return f"{asked}, max error {done.max_abs_error:.1e}{undecided}"
