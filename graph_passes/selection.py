"""From what is asked for to the sites that will be cut, or a clear error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from graph_passes.errors import SurgeryError
from graph_passes.locate import Findings, FoundSite
from graph_passes.types import Deletion, Refusal, SublayerRef


def select(
    findings: Findings, deletions: Sequence[Deletion], already: Collection[SublayerRef] = ()
) -> list[FoundSite]:
    """The sites to cut, in stream order.

    Args:
        findings: What the graph holds.
        deletions: What is asked for; what is named twice, or once alone and once in its block,
            counts once.
        already: Sublayers whose absence is no error, since they were cut out earlier.

    Raises:
        SurgeryError: Nothing is asked for, something asked for isn't there or can't be cut, a
            replacement is asked for, or no sublayer would be left.
    """
    if not deletions:
        raise SurgeryError("Nothing to delete.", "Name at least one sublayer.")
    _refuse_replacements(deletions)
    chosen = {site.ref for deletion in deletions for site in _matches(findings, deletion)}
    missing = [d for d in deletions if not _matches(findings, d) and not _is_gone(d, already)]
    if missing:
        raise SurgeryError(f"The graph has no {_names(missing)}.", f"Found: {summary(findings)}")
    sites = [site for site in findings.sites if site.ref in chosen]
    for site in sites:
        if site.obstacle is not None:
            raise SurgeryError(
                f"{site.ref} can't be cut at node {site.obstacle[0].name!r}: {site.obstacle[1]}.",
                "Leave it out of the plan.",
            )
    if sites and len(sites) == len(findings.sites):
        raise SurgeryError(
            "Deleting every sublayer of the graph would leave no model.", "Keep at least one."
        )
    return sites


def summary(findings: Findings) -> str:
    """What was found, in one line: ``attention 0-29; mlp 0-29``."""
    layers: dict[str, list[int]] = {}
    for site in findings.sites:
        layers.setdefault(site.kind, []).append(site.layer)
    parts = [f"{kind} {_ranges(numbers)}" for kind, numbers in layers.items()]
    parts += [_refusal_text(refusal) for refusal in findings.refusals]
    return "; ".join(parts) + "."


def _refusal_text(refusal: Refusal) -> str:
    return f"at node {refusal.node!r}: {refusal.reason}"


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _matches(findings: Findings, deletion: Deletion) -> list[FoundSite]:
    return [
        site
        for site in findings.sites
        if site.layer == deletion.layer and deletion.kind in (site.kind, "block")
    ]


def _is_gone(deletion: Deletion, already: Collection[SublayerRef]) -> bool:
    return any(
        ref.layer == deletion.layer and deletion.kind in (ref.kind, "block") for ref in already
    )


def _names(deletions: Iterable[Deletion]) -> str:
    return ", ".join(dict.fromkeys(f"{d.kind} {d.layer}" for d in deletions))


def _refuse_replacements(deletions: Iterable[Deletion]) -> None:
    for deletion in deletions:
        if deletion.replacement != "none":
            raise SurgeryError(
                f"{deletion.kind} {deletion.layer} is to be replaced by "
                f"{deletion.replacement!r}; the surgery only knows 'none' so far.",
                "Plan the deletion without a replacement.",
            )
