"""`depthcut plan` and `depthcut export` are one planner: the same options give the same plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter import cli
from exporter.artifacts import PruningPlan
from exporter.artifacts.store import locked
from exporter.choose.costs.weighing import sizes
from exporter.cli.export import export
from exporter.errors import DepthcutError
from exporter.heal.options import HealOptions
from exporter.pipeline.run import Run
from exporter.progress import Quiet

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from tests.made_tables import make_times  # noqa: E402
from tests.reading import in_file  # noqa: E402
from tests.text_graphs import write_llama_folder  # noqa: E402

AT = "batch=1,prompt=8,new=2"
LAYERS = range(3)
SCORED = ["--samples", "24", "--sequence-length", "16", "batch_size: 8"]
ASKED = (
    ["--drop-attn", "1"],
    ["--drop-attn", "2", "--drop-mlp", "1"],
    ["--drop-joint", "2"],
    ["--drop-block", "1"],
    ["--drop-joint", "9"],
    ["--parameters", "8%"],
    ["--parameters", "8%", "--drop-mlp", "1"],
    ["--parameters", "8%", "kinds: mlp"],
    ["--at-most", "90%"],
    ["--fits", "SOME", "context: 100"],
    ["--fits", "SOME", "context: 100", "sequences: 4"],
    ["--faster", "1.2", "--at", AT],
)
SEARCHES = ([], *(["--search", way] for way in ("one-shot", "greedy")))
HEALS = ([], *(["--heal", kind] for kind in ("none", "bias", "linear", "best")))
SIZES = ("parameters", "parameters_before", "bytes")
"""By the model's modules where no graph is named, which leaves the norms out."""
OTHERS = ([], ["--protect", "first"], ["objective: perplexity"])


class Road:
    """One model with its scores and an export's folder, in which both commands are given."""

    def __init__(self, folder: Path) -> None:
        self.model, self.out = folder / "llama", folder / "out"
        self.model.mkdir()
        write_llama_folder(self.model)
        self._folder, self._calls = folder, count()
        self._planned(self._requested(["--drop-attn", "1"]))
        self.scores = self.out / "importance.json"
        self.graph = self.out / "baseline" / "model.onnx"

    def plan(self, asked: list[str]) -> Path | None:
        """The plan of `depthcut plan`; None where it is refused."""
        path = self._folder / f"plan-{next(self._calls)}.json"
        wants_graph = {"--fits", "--parameters", "--at", "--at-most"} & {*asked}
        graph = ["--onnx", str(self.graph)] if wants_graph else []
        runs = graph or {"greedy", "bias", "linear", "best"} & {*asked}
        batch = ["batch_size: 8"] if runs else []
        call = ["plan", str(self.scores), "-o", str(path), "-q"]
        words = in_file(self._folder, [*call, *batch, *graph, *asked])
        return path if cli.run(words) == 0 else None

    def export(self, asked: list[str]) -> Path | None:
        """The plan that `depthcut export` would carry out; None where it is refused."""
        request = self._requested(asked)
        try:
            return None if request is None else self._planned(request)
        except DepthcutError:
            return None

    def _requested(self, texts: list[str]) -> Any:
        call = [str(self.model), "-o", str(self.out), "--no-measure", *SCORED]
        try:
            request = export.read(in_file(self._folder, [*call, *texts])).request
            if request.search.search == "auto":  # numbers alone go by scores in a plan
                request = replace(request, search=replace(request.search, search=None))
            by_itself = request.heal is not None and request.heal.kind == "auto"
            return _as_planned(request, texts) if by_itself else request
        except (DepthcutError, click.ClickException):
            return None

    def _planned(self, request: Any) -> Path:
        from exporter.pipeline import road

        with locked(request.out):
            run = Run(request, Quiet())
            for stage in road.order(run):
                if stage.name == "prune":
                    break
                run.finish(stage)
            return run.plan.path


def _as_planned(request: Any, texts: list[str]) -> Any:
    """What a plan does where nothing is said: replacements, and parameters instead of a time."""
    budget = request.drops.budget
    usual = None if budget.only_counts else HealOptions(kind="best")
    at = budget.at if {"--at", "--faster"} & {*texts} else None
    drops = replace(request.drops, budget=replace(budget, at=at))
    return replace(request, heal=usual, drops=drops)


@pytest.fixture(scope="module")
def road(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    folder = tmp_path_factory.mktemp("same")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        make_times(patch, {"none": 10.0, "bias": 9.0, "linear": 6.0}, AT)
        yield Road(folder)


def _room(graph: Path, texts: list[str]) -> list[str]:
    """The options with a limit that is 10 % below what the model takes."""
    sequences = 4 if "sequences: 4" in texts else 1
    whole = sizes(graph).total_bytes(context=100, batch=sequences)
    return [str(int(0.9 * whole)) if word == "SOME" else word for word in texts]


def _numbers(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    plan = PruningPlan.read(path)
    return {} if plan.replacements is None else load_file(path.parent / plan.replacements.path)


@settings(
    max_examples=7, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(*map(st.sampled_from, (ASKED, SEARCHES, HEALS, OTHERS)))
def test_the_same_options_give_the_same_plan(
    road: Road, asked: list[str], search: list[str], heal: list[str], other: list[str]
) -> None:
    options = [*_room(road.graph, asked), *search, *heal, *other]
    planned, exported = road.plan(options), road.export(options)
    assert (planned is None) == (exported is None), "refused by one of the two"
    if planned is None or exported is None:
        return
    one, two = PruningPlan.read(planned), PruningPlan.read(exported)
    assert one.deletions == two.deletions
    assert one.budget == two.budget
    assert one.predicted_on == two.predicted_on
    figures = [{n: v for n, v in item.predicted.items() if n not in SIZES} for item in (one, two)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-6)
    numbers = _numbers(planned), _numbers(exported)
    assert numbers[0].keys() == numbers[1].keys()
    for name, value in numbers[0].items():
        np.testing.assert_allclose(value, numbers[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("sequences", [[], ["sequences: 4"]])
def test_the_timed_batch_says_nothing_of_the_caches(road: Road, sequences: list[str]) -> None:
    result = _room(road.graph, ["--fits", "SOME", "context: 100", *sequences, "--heal", "none"])
    exported = road.export([*result, "batch: 8"])
    assert exported is not None
    assert PruningPlan.read(exported).budget["batch"] == (4 if sequences else 1)
    planned = road.plan(result)
    assert planned is not None
    assert PruningPlan.read(planned).deletions == PruningPlan.read(exported).deletions
