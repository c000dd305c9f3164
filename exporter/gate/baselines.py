"""Where earlier reports are kept, and which of them one may be held against.

A baseline is a report, a file with several, or a folder of reports. Each report has a key
(:class:`exporter.artifacts.RunKey`); a report is compared with one of its own key and no other.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from exporter.artifacts import BaselineSet, ComparisonReport, KeyDifference
from exporter.artifacts.ledger import in_turn
from exporter.errors import ArtifactError, RegressionError, UsageError
from exporter.gate.keys import FIELDS, difference_words, differences, key_of, key_sha256
from exporter.gate.sanity import refuse_unsound
from graph_passes.files.reading import RECORD_BYTES, read_json

Named = dict[str, ComparisonReport]
"""Where each report lies, in words, and the report."""

_UPDATE = "Write one with --update-baseline, on the machine that runs the check."


def read_baselines(path: Path) -> Named:
    """Reads all reports of a baseline.

    Args:
        path: A report, a file with several, or a folder of reports and of no other ``.json``.

    Raises:
        ArtifactError: A file can't be read or is of another kind.
        RegressionError: There is none, or one can't be the result of a measurement.
    """
    if not path.exists():
        raise RegressionError(f"{path}: there is no baseline.", _UPDATE, code="baseline-missing")
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        found = {str(file): ComparisonReport.read(file, named=False) for file in files}
    else:
        found = _read(path)
    if not found:
        raise RegressionError(f"{path} holds no report.", _UPDATE, code="no-report")
    for name, report in found.items():
        refuse_unsound(report, name)
    return found


def find_baseline(
    report: ComparisonReport, baselines: Named, allow: Collection[str] = ()
) -> tuple[ComparisonReport, list[KeyDifference]]:
    """The earlier report that a report may be held against.

    Args:
        report: The new report.
        baselines: What there is.
        allow: Fields of the key that may differ.

    Returns:
        The report that differs in the fewest fields, all of them allowed, and these differences.

    Raises:
        UsageError: ``allow`` names what is no field of the key.
        RegressionError: All differ in more, or two fit equally well.
    """
    unknown = sorted(set(allow) - set(FIELDS))
    if unknown:
        raise UsageError(
            f"A key has no field {unknown[0]!r}. It has {', '.join(FIELDS)}.", code="unknown-field"
        )
    key = key_of(report)
    told = [(differences(key_of(other), key), name) for name, other in baselines.items()]
    told.sort(key=lambda pair: len(pair[0]))
    fitting = [(found, name) for found, name in told if {d.field for d in found} <= set(allow)]
    if not fitting:
        raise _no_baseline(*told[0], len(told))
    best = [name for found, name in fitting if len(found) == len(fitting[0][0])]
    if len(best) > 1:
        raise RegressionError(
            f"{best[0]} and {best[1]} fit equally well.",
            "Keep one of them, or allow less.",
            code="several-baselines",
        )
    return baselines[best[0]], fitting[0][0]


def updated(path: Path, report: ComparisonReport) -> Path:
    """Puts a report in the place of the one of its key, or beside those of other keys.

    Jobs that do so at the same time wait for one another, so that none of their reports is lost.

    Args:
        path: The baseline: a file, or a folder where there is one, or where the name has no ending.
        report: The new report.

    Returns:
        The file that was written, whole or not at all.
    """
    # Asked so that the answer stays the same when another job makes the folder meanwhile.
    folder = not path.is_file() and (not path.suffix or path.is_dir())
    with in_turn(path if folder else path.parent):
        return _put(path, report, folder=folder)


def _put(path: Path, report: ComparisonReport, *, folder: bool) -> Path:
    there = read_baselines(path) if path.exists() and _has_reports(path) else {}
    digest = key_sha256(key_of(report))
    mine = [name for name, old in there.items() if key_sha256(key_of(old)) == digest]
    if folder:
        file = Path(mine[0]) if mine else path / f"{digest[:12]}.json"
        return report.write(file)
    kept = [old for name, old in there.items() if name not in mine]
    return BaselineSet(reports=[*kept, report]).write(path)


def _has_reports(path: Path) -> bool:
    return path.is_file() or any(path.glob("*.json"))


def _read(file: Path) -> Named:
    if _kind(file) == "baseline_set":
        reports = BaselineSet.read(file).reports
        return {f"{file}: $.reports[{n}]": report for n, report in enumerate(reports)}
    return {str(file): ComparisonReport.read(file)}


def _kind(file: Path) -> object:
    try:
        head = read_json(file, limit=RECORD_BYTES, named=True)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(f"{file} can't be read as JSON: {error}.", code="not-json") from error
    return head.get("kind") if isinstance(head, dict) else None


def _no_baseline(nearest: list[KeyDifference], name: str, count: int) -> RegressionError:
    others = "" if count == 1 else f" (the nearest of {count})"
    allow = " ".join(f"--allow {difference.field}" for difference in nearest)
    return RegressionError(
        f"There is no baseline to compare with. {name}{others} was measured under other "
        f"conditions: {difference_words(nearest)}.",
        f"Write one for these conditions with --update-baseline, or accept the difference: "
        f"{allow}.",
        code="other-conditions",
    )
