"""What the arms are, what was dropped, and where and how they were measured."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from exporter.artifacts import Arm, ComparisonReport, EngineFacts, MachineState
from exporter.printable import counted, significant
from exporter.report.sections.blocks import (
    Block,
    Bullets,
    Cell,
    Command,
    Grid,
    Note,
    Section,
    Sign,
    parts_blocks,
)
from exporter.report.sections.summary import HEADER, size_rows
from exporter.report.words import dropped_lines, named_arms, read_by, weights_words

CPU = "CPUExecutionProvider"
"""Where exporter.export.parity runs, whatever is timed."""


def size_section(report: ComparisonReport) -> Section | None:
    """Bytes, parameters, nodes, KV cache of both arms; None where none is known."""
    rows = [row[:4] for row in size_rows(report)]
    grid = Grid("Size of both arms", HEADER[:4], rows, right=(1, 2, 3))
    return Section("size", "Size", [grid]) if rows else None


def forms_section(report: ComparisonReport) -> Section | None:
    """How each arm's graph is written, and its weights; None where no graph notes anything."""
    arms = named_arms(report)
    if not any(arm.form or arm.quantization for arm in arms.values()):
        return None
    header = ["arm", "form", "fused operators", "weights", "products by bits"]
    grid = Grid("How the graphs are written", header, [_form(*arm) for arm in arms.items()])
    return Section("forms", "Form and weights", [grid, *_remarks(arms)])


def _form(name: str, arm: Arm) -> list[str]:
    form, quantization = arm.form, arm.quantization
    bits = {} if quantization is None else quantization.bits
    return [
        name,
        "-" if form is None else form.name,
        ", ".join(f"{count} {op}" for op, count in form.fused.items()) if form else "-",
        weights_words(arm),
        ", ".join(f"{count} of {width} bits" for width, count in bits.items()) or "-",
    ]


def _remarks(arms: Mapping[str, Arm]) -> Iterator[Note]:
    """Why an arm has no faster form, once for all of which it is true."""
    lines: dict[str, list[str]] = {}
    for name, arm in arms.items():
        if arm.form and arm.form.remark:
            lines.setdefault(arm.form.remark, []).append(name)
    for remark, names in lines.items():
        yield Note(remark, lead=f"Form of {', '.join(names)}:")


def dropped_section(report: ComparisonReport) -> Section:
    """Which sublayers, by kind."""
    lines = dropped_lines(report.plan) or ["No deletion is on record."]
    if (own := report.arms.baseline.encoder_layers) and report.plan:
        lines.append(f"Layers 0 to {own - 1} are the encoder's, those from {own} on the decoder's.")
    blocks = [Bullets(lines), *parts_blocks(report.parts, read=read_by(report))]
    return Section("dropped", "What was dropped", blocks)


def parity_section(report: ComparisonReport) -> Section | None:
    """Every check against a witness; None where none was made."""
    if not report.parity:
        return None
    rows: list[list[Cell]] = [
        [
            check.name,
            check.phase,
            significant(check.max_abs_error, 2),
            significant(check.tolerance, 2),
            "holds" if check.passed else Sign("does not hold", "bad"),
        ]
        for check in report.parity
    ]
    header = ["check", "phase", "max abs error", "tolerance", "result"]
    grid = Grid("Outputs against a witness", header, rows, right=(2, 3))
    provider = report.arms.baseline.provider
    elsewhere = f"not on {provider}, where the arms were timed and compared."
    notes = [Note(f"These checks ran on the CPU ({CPU}), {elsewhere}")] if provider != CPU else []
    return Section("parity", "Parity", [grid, *notes])


_MUCH = 0.1
_WORTH_TELLING = 0.03
_BUSY = (
    "Other processes took {:.0f} % of the machine's CPU time while the arms were timed: expect "
    "wide intervals."
)


def engines_section(report: ComparisonReport) -> Section | None:
    """What is known of the arms' engines without running them; None where there are none."""
    arms = named_arms(report)
    blocks: list[Block] = []
    if built := [(name, e) for name, arm in arms.items() for e in arm.engines]:
        header = ["arm", "engine", "MB", "memory, MB", "built for", "precision", "backend"]
        header += ["against ONNX Runtime"]
        rows = [[name, *_engine(engine)] for name, engine in built]
        blocks.append(Grid("Engines as built", header, rows, right=(2, 3)))
    for name, arm in arms.items():
        if arm.not_run is not None:
            blocks.append(Note(f"{arm.not_run}", lead=f"Not run, {name}:"))
        blocks += [Note(f"{note}.", lead=f"{name}:") for note in arm.notes]
    return Section("engines", "Engines", blocks) if blocks else None


def _engine(engine: EngineFacts) -> list[str]:
    name = engine.path.rpartition("/")[2]
    return [
        name,
        f"{engine.engine_bytes / 1e6:,.1f}",
        ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in engine.memory_bytes.items()) or "-",
        engine.built_for,
        engine.precision,
        f"{engine.backend} {engine.backend_version}",
        "not checked" if engine.check is None else f"off by {significant(engine.check.error, 2)}",
    ]


def environment_section(report: ComparisonReport) -> Section:
    """The machine, its load, the backends and the versions."""
    others = report.environment.other_cpu_share
    note = [Note(_BUSY.format(100 * others))] if others is not None and others > _MUCH else []
    machine = report.environment
    note += [Note(text) for text in machine_remarks(machine.states, machine.threads)]
    grid = Grid("Environment of the measurement", ["what", "value"], list(_facts(report)))
    return Section("environment", "Environment", [grid, *note])


def machine_remarks(states: Sequence[MachineState], threads: int) -> list[str]:
    """What a reader should know of where it was measured, in sentences."""
    quotas = [state.quota_cpus for state in states]
    names = []
    if len(set(quotas)) > 1:
        seen = " to ".join(_cpus_words(quota) for quota in dict.fromkeys(quotas))
        names.append(f"The CPU quota changed while measuring: {seen}.")
    lowest = min((quota for quota in quotas if quota is not None), default=None)
    if lowest is not None and lowest < threads:
        names.append(
            f"The CPU quota of {_cpus_words(lowest)} is less than the {counted(threads, 'thread')}:"
            " times depend on when it is used up."
        )
    if (steal := _mean(states, "steal_share")) > _WORTH_TELLING:
        names.append(f"Other virtual machines took {steal:.0%} of the CPU time.")
    if (waiting := _mean(states, "quota_waiting_share")) > _WORTH_TELLING:
        names.append(f"The CPU quota kept the process waiting for {waiting:.0%} of the time.")
    return names


def _mean(states: Sequence[MachineState], field: str) -> float:
    known = [value for state in states if (value := getattr(state, field)) is not None]
    return sum(known) / len(known) if known else 0.0


def _cpus_words(cpus: float | None) -> str:
    return "none" if cpus is None else f"{cpus:g} CPU{'s' * (cpus != 1)}"


def _facts(report: ComparisonReport) -> Iterator[list[str]]:
    machine, arms = report.environment, report.arms
    others, settings = machine.other_cpu_share, machine.gpu_settings
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    yield ["processor", f"{machine.processor}, {machine.cpu_count} CPUs, {machine.machine}"]
    yield ["threads", str(machine.threads)]
    yield ["GPU", f"{machine.gpu or 'none used'}{text and f' ({text})'}"]
    yield ["memory", f"{machine.memory_bytes / 2**30:.1f} GiB"]
    busy = "unknown" if others is None else f"{100 * others:.0f} % of all CPU time"
    yield ["other processes while timing", busy]
    throttled = [state.throttled for state in machine.states if state.throttled is not None]
    if throttled:
        yield ["throttled", f"in {sum(throttled)} of {len(throttled)} looks"]
    yield ["platform", f"{machine.platform}, Python {machine.python}"]
    yield ["backend", _each(report, lambda arm: f"{arm.backend}, {arm.provider}")]
    yield ["precision", f"{arms.baseline.precision} / {arms.candidate.precision}"]
    yield ["versions", ", ".join(f"{name} {v}" for name, v in report.versions.items())]


def _each(report: ComparisonReport, fact: Callable[[Arm], str]) -> str:
    """One value where all arms agree; else each arm's, by name."""
    values = {name: fact(arm) for name, arm in named_arms(report).items()}
    if len(set(values.values())) == 1:
        return values["baseline"]
    return "; ".join(f"{name}: {value}" for name, value in values.items())


def reproduce_section(report: ComparisonReport) -> Section:
    """The command that wrote the report, if one did, and on which files."""
    pair = {"baseline": report.arms.baseline, "candidate": report.arms.candidate}
    named = (f"{name} {arm.path} (SHA-256 `{arm.sha256[:12]}`)" for name, arm in pair.items())
    files = f"Compared were the {' and the '.join(named)}. The raw samples are in `report.json`."
    blocks: list[Block] = [Note("This report was made from Python.")]
    if report.command:
        blocks = [Note("This report was written by"), Command(shlex.join(report.command))]
    return Section("reproduce", "How to reproduce", [*blocks, Note(files)])
