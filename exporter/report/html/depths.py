"""The page of pruning at several depths: what each way of dropping costs at each number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exporter.artifacts import DepthCell, DepthDamage, DepthsReport, Way
from exporter.report.html.charts.lines import Line, LinePoint, lines_chart
from exporter.report.html.study import render_study
from exporter.report.html.view import Figure, Section
from exporter.report.parts.depths import WAYS, damage_words, depths_lead, depths_parts
from exporter.report.parts.part import Part

TITLE = "Pruning at several depths"
_COLOURS: dict[Way, str] = {
    "attention": "baseline",
    "mlp": "ref1",
    "block": "ref3",
    "joint": "candidate",
}
_NAMES: dict[Way, str] = {
    "attention": "attention",
    "mlp": "MLP",
    "block": "block",
    "joint": "joint",
}
Reading = Callable[[DepthDamage], tuple[float, tuple[float, float] | None]]


def render_depths(report: DepthsReport) -> str:
    """The page.

    Args:
        report: The ways of dropping and their numbers.
    """
    sections = [
        Section(part.key, part.title, _figures(part, report), part.blocks)
        for part in depths_parts(report)
    ]
    return render_study(
        command="depths",
        title=TITLE,
        subject=report.model.source,
        lead=depths_lead(report),
        sections=sections,
        version=report.versions.get("depthcut", ""),
    )


def _figures(part: Part, report: DepthsReport) -> Sequence[Figure]:
    if part.key != "overview" or not any(cell.damage for cell in report.cells):
        return ()
    numbers = [str(number) for number in report.numbers]
    at_number = {number: place for place, number in enumerate(report.numbers)}
    by_number: Callable[[DepthCell], float] = lambda cell: at_number[cell.number]  # noqa: E731
    return (
        Figure(
            lines_chart(
                "perplexity-number", _lines(report, by_number, _perplexity), numbers,
                title="Perplexity by number", across="n, dropped", logarithmic=True,
                up="perplexity, times the whole model's", limits=(1.0, None),
            ),
            "Lower is better; the bars are 95 % intervals over samples.",
            title="Perplexity, by how many are dropped",
        ),
        Figure(
            lines_chart(
                "perplexity-parameters", _lines(report, _removed, _perplexity),
                title="Perplexity by parameters", across="parameters removed", unit=" %",
                up="perplexity, times the whole model's", logarithmic=True, limits=(1.0, None),
            ),
            "The same figures by what goes: an attention is smaller than an MLP, and a block is "
            "both.",
            title="Perplexity, by the parameters that go",
        ),
        Figure(
            lines_chart(
                "kl-number", _lines(report, by_number, _kl), numbers, title="KL by number",
                across="n, dropped", up="KL divergence, nats", logarithmic=True,
            ),
            "How far the answers are from the whole model's; lower is better.",
            title="KL divergence, by how many are dropped",
        ),
    )  # fmt: skip


def _lines(report: DepthsReport, place: Callable[[DepthCell], float], read: Reading) -> list[Line]:
    found = []
    for way in WAYS:
        points = [
            LinePoint(
                place(cell), max(read(cell.damage)[0], 1e-9),
                f"{WAYS[way]} of {cell.number}: {damage_words(cell.damage)}", read(cell.damage)[1],
            )
            for cell in report.of_way(way)
            if cell.damage is not None
        ]  # fmt: skip
        found.append(Line(_NAMES[way], _COLOURS[way], points))
    return found


def _removed(cell: DepthCell) -> float:
    return 100 * (cell.parameters_removed or 0.0)


def _perplexity(damage: DepthDamage) -> tuple[float, tuple[float, float] | None]:
    return damage.perplexity_ratio, damage.perplexity_ratio_ci95


def _kl(damage: DepthDamage) -> tuple[float, tuple[float, float] | None]:
    return damage.kl, damage.kl_ci95
