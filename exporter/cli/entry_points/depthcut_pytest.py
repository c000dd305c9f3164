"""A pytest plugin: the fixture ``depthcut``, so that a team's own tests are the gate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from exporter.artifacts import CheckReport, ComparisonReport
    from exporter.compare.options import CompareOptions
    from exporter.gate.gate import BaselineMatch

_WAYS = ("fail", "skip", "warn")
_CACHE = pytest.StashKey[dict[Any, "ComparisonReport"]]()


class DepthcutWarning(UserWarning):
    """A measurement can't tell whether a limit holds, or other tests ran beside it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--depthcut-*`` and the ini options of the same names."""
    group = parser.getgroup("depthcut", "depthcut: latency and accuracy of models")
    group.addoption(
        "--depthcut-inconclusive",
        choices=_WAYS,
        help="What to do if the measurement can't decide a check; default: fail.",
    )
    group.addoption(
        "--depthcut-time-budget",
        type=float,
        metavar="SECONDS",
        help="Maximum time of one comparison.",
    )
    parser.addini("depthcut_inconclusive", "fail, skip or warn", default="fail")
    parser.addini("depthcut_time_budget", "seconds that one comparison may measure", default="")


@pytest.fixture
def depthcut(request: pytest.FixtureRequest) -> Depthcut:
    """Compares models and asserts what the comparison says."""
    from depthcut_packages import hidden_by

    problem = hidden_by()
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    return Depthcut(request.node)


@contextlib.contextmanager
def _printable_errors() -> Iterator[None]:
    """What pytest prints of an error may hold what a report or a model says."""
    from exporter.errors import DepthcutError
    from exporter.printable import printable_line

    try:
        yield
    except DepthcutError as error:
        message, hint = map(printable_line, (error.message, error.hint))
        raise type(error)(message, hint, code=error.code) from None


class Depthcut:
    """The fixture. Its settings are the command line's, else the ini file's."""

    def __init__(self, item: pytest.Item) -> None:
        self.item = item
        self.inconclusive = self._setting("inconclusive")
        try:
            if self.inconclusive not in _WAYS:
                raise ValueError(
                    f"depthcut_inconclusive is {self.inconclusive!r}, not one of {_WAYS}"
                )
            self.time_budget = float(self._setting("time_budget") or 0)
        except ValueError as error:
            raise pytest.UsageError(f"depthcut: {error}") from None

    def _setting(self, name: str) -> str:
        given = self.item.config.getoption(f"--depthcut-{name.replace('_', '-')}")
        return str(self.item.config.getini(f"depthcut_{name}") if given is None else given)

    def compare(
        self, baseline: str | Path, candidate: str | Path, **options: Any
    ) -> AssertableComparison:
        """Measures a candidate against its unpruned model, once a session for equal arguments."""
        from exporter.compare.session import compare

        cache = self.item.config.stash.setdefault(_CACHE, {})
        key = (Path.cwd(), str(baseline), str(candidate), repr(sorted(options.items())))
        if key not in cache:
            workers = getattr(self.item.config, "workerinput", {}).get("workercount", 1)
            if workers > 1:
                text = f"depthcut measures while {workers} workers of pytest-xdist run: use -n 0."
                warnings.warn(text, DepthcutWarning, stacklevel=2)
            budget = {"time_budget": self.time_budget} if self.time_budget else {}
            with _printable_errors():
                cache[key] = compare(baseline, candidate, _compare_options({**budget, **options}))
        return AssertableComparison(self, cache[key])

    def report(self, path: str | Path) -> AssertableComparison:
        """Reads a report that was measured before; nothing is measured again."""
        from exporter.artifacts import ComparisonReport

        with _printable_errors():
            return AssertableComparison(self, ComparisonReport.read(Path(path)))


def _compare_options(given: dict[str, Any]) -> CompareOptions:
    from exporter.compare.options import CompareOptions
    from exporter.errors import OptionError
    from exporter.options import build, leaves

    known = [leaf.key for leaf in leaves(CompareOptions)]
    for key in given:
        if key not in known:
            raise pytest.UsageError(f"depthcut.compare: {key}: there are {', '.join(known)}")
    try:
        return build(CompareOptions, given)
    except OptionError as error:
        error.say(error.keys)
        raise pytest.UsageError(f"depthcut.compare: {error}") from None


class AssertableComparison:
    """A comparison, ``report``, whose limits a test asserts."""

    def __init__(
        self,
        fixture: Depthcut,
        report: ComparisonReport,
        accepted: BaselineMatch | None = None,
    ) -> None:
        self.report = report
        self._fixture = fixture
        self._accepted = accepted

    def against(self, baseline: str | Path, *, allow: tuple[str, ...] = ()) -> AssertableComparison:
        """The same assertions, against the candidate of an earlier report."""
        from exporter.gate.gate import BaselineMatch
        from exporter.gate.history import find_baseline, read_baselines

        with _printable_errors():
            baselines = read_baselines(Path(baseline))
            accepted = BaselineMatch(*find_baseline(self.report, baselines, allow))
        return AssertableComparison(self._fixture, self.report, accepted)

    def assert_limits(self, **limits: str | float) -> None:
        """Holds the limits of ``depthcut check`` by their names: ``max_slowdown="3%"``."""
        __tracebackhide__ = True
        from exporter.gate.gate import check
        from exporter.gate.limits import Limits
        from exporter.printable import printable_line
        from exporter.report.ci import VERDICT_WORDS, change_words, check_name

        chosen = Limits(**limits)  # type: ignore[arg-type]
        with _printable_errors():
            result = check(self.report, chosen, baseline=self._accepted)
        for one in result.checks:  # properties of the test, which JUnit XML shows
            words = f"{change_words(one)}: {VERDICT_WORDS[one.verdict]}"
            self._fixture.item.user_properties.append(
                (printable_line(f"depthcut {check_name(one)}"), words)
            )
        _end(result, self._fixture.inconclusive)


def _end(result: CheckReport, inconclusive: str) -> None:
    """Fails, skips or warns, as the verdict wants it."""
    __tracebackhide__ = True
    from exporter.printable import printable_line
    from exporter.report.ci import check_sentence

    wrong = [check for check in result.checks if check.verdict == result.verdict]
    text = "\n".join(printable_line(check_sentence(check)) for check in wrong)
    if result.verdict == "regressed" or (result.verdict, inconclusive) == ("inconclusive", "fail"):
        pytest.fail(text, pytrace=False)
    if result.verdict == "inconclusive":
        if inconclusive == "skip":
            pytest.skip(text)
        warnings.warn(text, DepthcutWarning, stacklevel=4)
