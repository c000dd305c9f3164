"""From what is asked for to the sites that will be cut, or a clear error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from graph_passes.errors import SurgeryError
from graph_passes.locate import Findings, FoundSite
from graph_passes.plan_record import RecordedReplacement
from graph_passes.replacements import ReplacementTensors, digest_of
from graph_passes.types import Deletion, Replacement, SublayerRef

_FROM_THE_ORIGINAL = "Cut the original graph, with all deletions at once."


def select(
    findings: Findings,
    deletions: Sequence[Deletion],
    already: Collection[SublayerRef] = (),
    *,
    allow_all: bool = False,
) -> list[FoundSite]:
    """The sites to cut, in stream order."""
    if not deletions:
        raise SurgeryError(
            "Nothing to delete.", "Name at least one sublayer.", code="nothing-to-delete"
        )
    chosen = {site.ref for d in deletions for site in findings.sites if d.names(site.ref)}
    known = [*(site.ref for site in findings.sites), *already]
    missing = [d for d in deletions if not any(map(d.names, known))]
    if missing:
        names = ", ".join(dict.fromkeys(f"{d.kind} {d.layer}" for d in missing))
        raise SurgeryError(
            f"The graph has no {names}.",
            f"Found: {summary(findings)}",
            code="sublayer-missing",
        )
    sites = [site for site in findings.sites if site.ref in chosen]
    for site in sites:
        if site.obstacle is not None:
            raise SurgeryError(
                f"{site.ref} can't be cut at node {site.obstacle.node.name!r}: "
                f"{site.obstacle.reason}.",
                "Leave it out of the plan.",
                code=site.obstacle.code,
            )
    if sites and len(sites) == len(findings.sites) and not allow_all:
        raise SurgeryError(
            "Deleting every sublayer of the graph would leave no model.",
            "Keep at least one; --allow-empty deletes them all the same.",
            code="nothing-left",
        )
    return sites


def summary(findings: Findings) -> str:
    """What was found, in one line: ``attention 0-29; mlp 0-29``."""
    layers: dict[str, list[int]] = {}
    for site in findings.sites:
        layers.setdefault(site.kind, []).append(site.layer)
    parts = [f"{kind} {_ranges(numbers)}" for kind, numbers in layers.items()]
    parts += [f"at node {refusal.node!r}: {refusal.reason}" for refusal in findings.refusals]
    return "; ".join(parts) + "."


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def replacements_of(
    sites: Iterable[FoundSite], deletions: Sequence[Deletion]
) -> dict[SublayerRef, Replacement]:
    """What takes each site's place: a block's replacement is that of each of its sublayers."""
    replacements = {}
    for site in sites:
        kinds = {d.replacement for d in deletions if d.names(site.ref)}
        if len(kinds) > 1:
            raise SurgeryError(
                f"{site.ref} is to be replaced in two ways: {' and '.join(sorted(kinds))}.",
                "Name one of them, for the sublayer or for its block.",
                code="other-numbers",
            )
        replacements[site.ref] = kinds.pop()
    return replacements


def check_recorded(
    deletions: Iterable[Deletion],
    sites: Iterable[FoundSite],
    earlier: Mapping[SublayerRef, RecordedReplacement],
    given: Mapping[SublayerRef, ReplacementTensors],
) -> None:
    """Holds what is asked for against what was done to the model earlier."""
    for deletion in deletions:
        for ref, done in earlier.items():
            if deletion.names(ref):
                _check_same(ref, deletion.replacement, done, given.get(ref))
    chosen = {site.ref for site in sites}
    for ref, done in earlier.items():
        if held := sorted(chosen.intersection(done.folded_into)):
            raise SurgeryError(
                f"{held[0]} can't be cut: the bias that took the place of {ref} in an earlier cut "
                "was added to its own.",
                _FROM_THE_ORIGINAL,
                code="bias-folded",
            )


def _check_same(
    ref: SublayerRef,
    replacement: Replacement,
    done: RecordedReplacement,
    given: ReplacementTensors | None,
) -> None:
    if replacement != done.kind:
        raise SurgeryError(
            f"{ref} was cut out of this graph earlier with the replacement {done.kind!r}; "
            f"now {replacement!r} is asked for.",
            _FROM_THE_ORIGINAL,
            code="other-numbers",
        )
    if given is not None and done.digest and digest_of(given) != done.digest:
        raise SurgeryError(
            f"{ref} was replaced in this graph earlier, by other numbers than those given now.",
            _FROM_THE_ORIGINAL,
            code="other-numbers",
        )
