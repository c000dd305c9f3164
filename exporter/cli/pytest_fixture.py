"""What the pytest fixture ``depthcut`` gives; the plugin itself is `depthcut_pytest`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from depthcut_pytest import DepthcutWarning

if TYPE_CHECKING:
    from exporter.artifacts import Check, CheckReport, ComparisonReport
    from exporter.compare.options import CompareOptions
    from exporter.gate.limits import Limits

_WAYS = ("fail", "skip", "warn")
_CACHE = pytest.StashKey[dict[Any, "ComparisonReport"]]()


class Settings:
    """What the command line says, else the ini file.

    Args:
        inconclusive: What a check does that the measurement can't decide.
        time_budget: Seconds that one comparison may measure.
        confirm: Measurements before a regression is believed.
    """

    def __init__(self, inconclusive: str, time_budget: float | None, confirm: int) -> None:
        self.inconclusive = inconclusive
        self.time_budget = time_budget
        self.confirm = confirm

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Reads them.

        Raises:
            pytest.UsageError: One is not valid.
        """

        def told(name: str) -> str:
            given = config.getoption(f"--depthcut-{name.replace('_', '-')}")
            return str(config.getini(f"depthcut_{name}") if given is None else given)

        inconclusive, budget, confirm = map(told, ("inconclusive", "time_budget", "confirm"))
        try:
            if inconclusive not in _WAYS:
                raise ValueError(f"depthcut_inconclusive is {inconclusive!r}, not one of {_WAYS}")
            return cls(inconclusive, float(budget) if budget else None, int(confirm))
        except ValueError as error:
            raise pytest.UsageError(f"depthcut: {error}") from None


class Depthcut:
    """The fixture."""

    def __init__(self, item: pytest.Item, settings: Settings) -> None:
        self._item = item
        self._settings = settings

    def compare(
        self, baseline: str | Path, candidate: str | Path, **options: Any
    ) -> AssertableComparison:
        """Measures a candidate against its unpruned model, once a session for equal arguments.

        Args:
            baseline: The unpruned model, as `depthcut compare` takes it: an ONNX file, a folder.
            candidate: The pruned model, likewise.
            options: Those of `depthcut compare`, by the keys of its configuration file, such as
                ``threads=1`` and ``prefill=(128,)``.
        """
        cache = self._item.config.stash.setdefault(_CACHE, {})
        key = (Path.cwd(), str(baseline), str(candidate), repr(sorted(options.items())))
        if key not in cache:
            _warn_of_workers(self._item.config)
            cache[key] = self._measure(baseline, candidate, options)
        return AssertableComparison(
            self._item,
            self._settings,
            cache[key],
            lambda: self._measure(baseline, candidate, options),
        )

    def report(self, path: str | Path) -> AssertableComparison:
        """Reads a report that was measured before; nothing is measured again."""
        from exporter.artifacts import ComparisonReport

        report = ComparisonReport.read(Path(path))
        return AssertableComparison(self._item, self._settings, report, None)

    def _measure(
        self, baseline: str | Path, candidate: str | Path, options: dict[str, Any]
    ) -> ComparisonReport:
        from exporter.compare.session import compare

        if self._settings.time_budget is not None:
            options = {"time_budget": self._settings.time_budget, **options}
        return compare(baseline, candidate, _compare_options(options))


def _warn_of_workers(config: pytest.Config) -> None:
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        text = f"depthcut measures while {workers} workers of pytest-xdist run: use -n 0."
        warnings.warn(text, DepthcutWarning, stacklevel=3)


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
        raise pytest.UsageError(f"depthcut.compare: {error}") from None


class AssertableComparison:
    """A comparison whose limits a test asserts.

    Attributes:
        report: What was measured.
    """

    def __init__(
        self,
        item: pytest.Item,
        settings: Settings,
        report: ComparisonReport,
        again: Any,
        accepted: Any = None,
    ) -> None:
        self.report = report
        self._item = item
        self._settings = settings
        self._again = again
        self._accepted = accepted

    def against(self, baseline: str | Path, *, allow: tuple[str, ...] = ()) -> AssertableComparison:
        """The same assertions, against the candidate of an earlier report.

        Args:
            baseline: The report, a file with several, or a folder.
            allow: Differences of the runs that are let pass.
        """
        from exporter.gate.baselines import find_baseline, read_baselines
        from exporter.gate.gate import BaselineMatch

        accepted = BaselineMatch(*find_baseline(self.report, read_baselines(Path(baseline)), allow))
        return AssertableComparison(self._item, self._settings, self.report, self._again, accepted)

    def assert_not_slower(self, max_slowdown: str | float = "0%") -> None:
        """No shape takes more time, by more than this share, than on the unpruned model."""
        self._assert(max_slowdown=max_slowdown)

    def assert_speedup(self, factor: str | float) -> None:
        """Every shape is at least so many times as fast as on the unpruned model."""
        self._assert(min_speedup=factor)

    def assert_perplexity_increase(self, at_most: str | float) -> None:
        """Perplexity grew by at most this share."""
        self._assert(max_perplexity_increase=at_most)

    def assert_kl(self, at_most: str | float) -> None:
        """KL divergence from the unpruned model is at most so many nats."""
        self._assert(max_kl=at_most)

    def assert_top1_agreement(self, at_least: str | float) -> None:
        """At least this share of positions has the unpruned model's most likely token."""
        self._assert(min_top1_agreement=at_least)

    def assert_embedding_cosine(self, at_least: str | float) -> None:
        """An encoder's embeddings have at least this mean cosine with the unpruned model's."""
        self._assert(min_embedding_cosine=at_least)

    def assert_rank_agreement(self, at_least: str | float) -> None:
        """An encoder ranks pairs of texts at least so alike (Spearman's correlation)."""
        self._assert(min_rank_agreement=at_least)

    def assert_task_drop(self, at_most: str | float) -> None:
        """No task's score fell by more than so many points: 1% is 0.01."""
        self._assert(max_task_drop=at_most)

    def assert_probe_drop(self, at_most: str | float) -> None:
        """No probe's share of right answers fell by more than so many points: 1% is 0.01."""
        self._assert(max_probe_drop=at_most)

    def assert_size_increase(self, at_most: str | float = "0%") -> None:
        """Files and engines grew by at most this share."""
        self._assert(max_size_increase=at_most)

    def assert_memory_increase(self, at_most: str | float = "0%") -> None:
        """KV cache and device memory grew by at most this share."""
        self._assert(max_memory_increase=at_most)

    def _assert(self, **limits: str | float) -> None:
        __tracebackhide__ = True
        from exporter.gate.limits import Limits

        chosen = Limits(**limits)  # type: ignore[arg-type]
        found = self._check(self.report, chosen)
        if self._again is not None:
            found = self._confirmed(found, chosen)
        self._attach(found.checks)
        _tell(found, self._settings.inconclusive)

    def _check(self, report: ComparisonReport, limits: Limits) -> CheckReport:
        from exporter.gate.gate import check

        return check(report, limits, baseline=self._accepted)

    def _confirmed(self, found: CheckReport, limits: Limits) -> CheckReport:
        from exporter.gate.gate import confirmed

        return confirmed(
            found,
            lambda: self._check(self._again(), limits),
            report=self.report,
            baseline=self._accepted,
            measurements=self._settings.confirm,
        )

    def _attach(self, checks: list[Check]) -> None:
        """As properties of the test, which JUnit XML shows."""
        from exporter.report.checks import VERDICT_WORDS, change_words, check_name

        for check in checks:
            told = f"{change_words(check)}: {VERDICT_WORDS[check.verdict]}"
            self._item.user_properties.append((f"depthcut {check_name(check)}", told))


def _tell(found: CheckReport, inconclusive: str) -> None:
    __tracebackhide__ = True
    from exporter.report.checks import check_sentence

    wrong = [check for check in found.checks if check.verdict == found.verdict]
    text = "\n".join(check_sentence(check) for check in wrong)
    if found.verdict == "regressed":
        pytest.fail(text, pytrace=False)
    if found.verdict == "inconclusive":
        if inconclusive == "fail":
            pytest.fail(text, pytrace=False)
        if inconclusive == "skip":
            pytest.skip(text)
        warnings.warn(text, DepthcutWarning, stacklevel=4)
