"""What may be asked of a plan, how it is written, and what is refused before any work."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

from exporter.artifacts import PruningPlan
from exporter.choose.budgets.budget import USUAL_REQUEST, Budget, Floors, Memory, SearchOptions
from exporter.choose.budgets.by_scores import by_scores_inside
from exporter.choose.budgets.options import (
    bytes_of,
    goals_of,
    numbers_of,
    on_graph,
    parameters_of,
    time_of,
    unit_to_use_up,
)
from exporter.choose.budgets.settings import PlanRequest, PlanSettings
from exporter.choose.costs.table import RequestShape
from exporter.choose.costs.weighing import CacheSize, GraphSizes, SublayerSize
from exporter.cli import cli, run
from exporter.cli.console import ConsoleProgress
from exporter.cli.export import export
from exporter.errors import OptionError, PlanError, UndecidedGoalError, UnmetGoalError, UsageError
from exporter.options import build, values_of
from tests.made_reports import importance_of
from tests.made_tables import made_table
from tests.raising import raises, tells
from tests.reading import in_file

AT = RequestShape(batch=1, prompt=8, new=4)
NAMES: list[Any] = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]
SIZES = GraphSizes(
    sublayers={
        name: SublayerSize(
            parameters=100, linear_parameters=90, weight_bytes=400, linear_weight_bytes=360,
            caches=(CacheSize(per_token=8),) if name[1] == "attention" else (),
        )
        for name in NAMES
    },
    parameters=1000, weight_bytes=4000, hidden=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "given", "key"),
    [
        *(
            (Memory, {"limit_bytes": 1, "context": text}, "context")
            for text in ("0", "-1", "k", "1.5k")
        ),
        (Memory, {"limit_bytes": 0, "context": 8}, "fits"),
        *((Budget, {"parameters": share}, "parameters") for share in (1.0, -0.1)),
        *((Budget, {"target_speedup": n, "at": AT}, "faster") for n in (1.0, math.nan)),
        (Budget, {"joint": 2, "attention": 1}, "drop_joint"),
        *((Budget, {kind: 1, "kinds": ("attention",)}, "kinds") for kind in ("mlp", "block")),
        (Budget, {"kinds": ()}, "kinds"),
        *((Floors, {"perplexity_increase": n}, "at_most") for n in (0.0, -0.1, math.nan, math.inf)),
        *((Floors, {"top1_agreement": n}, "min_top1_agreement") for n in (0.0, 1.0)),
    ],
)
def test_budgets_that_make_no_sense(schema: Any, given: Any, key: str) -> None:
    with pytest.raises(OptionError) as caught:
        schema(**given)
    assert key in caught.value.keys
    assert Memory(1, "32k").context == 32768


def test_a_plan_notes_what_was_asked_for() -> None:
    budget = Budget(
        attention=2, target_speedup=1.2, at=AT, floors=Floors(0.05, 0.9),
        fits=Memory(8000, 64, 2), kinds=("attention",),
    )  # fmt: skip
    assert budget.asked() == {
        "attention": 2, "target_speedup": 1.2, "at": str(AT), "max_perplexity_increase": 0.05,
        "min_top1_agreement": 0.9, "fits_bytes": 8000, "context": 64, "batch": 2,
        "kinds": "attention",
    }  # fmt: skip
    assert Budget(parameters=0.1).asked() == {"parameters": 0.1}


def test_gains_add_up_in_every_unit() -> None:
    names: list[Any] = [(0, "attention"), (0, "mlp")]
    memory = Memory(3000, context=10, batch=2)
    # A bias brings 4 numbers, a linear map 4 * 5 and leaves the norm of 10.
    gains = [parameters_of(SIZES).gain(names, how) for how in ("none", "bias", "linear")]
    assert gains == [200, 192, 140]
    gains = [bytes_of(SIZES, memory).gain([name], "none") for name in names]
    assert gains == [400 + 8 * 10 * 2, 400]
    attentions, blocks = numbers_of(("attention",), "attention"), numbers_of((), "block")
    assert [attentions.words(n) for n in (1, 2)] == ["1 attention dropped", "2 attentions dropped"]
    assert [blocks.words(n) for n in (1, 0)] == ["1 block dropped", "0 blocks dropped"]
    cuts = [names[:1], names[1:], names]
    assert [attentions.gain(cut, "none") for cut in cuts] == [1, 0, 0]
    assert [blocks.gain(cut, "none") for cut in cuts] == [0, 0, 1]
    costs = made_table({name: {"none": 5.0, "bias": 4.0} for name in NAMES}, at=AT)
    assert time_of(costs).gain(names, "bias") == 8
    assert time_of(costs).words(20.0) == "a speedup of 1.250"


def test_goals_are_what_has_to_go() -> None:
    costs = made_table({name: {"none": 5.0} for name in NAMES}, at=AT)
    budget = Budget(
        attention=1, parameters=0.2, target_speedup=1.25, at=AT, fits=Memory(4000, 10)
    )  # fmt: skip
    goals = goals_of(budget, SIZES, costs)
    assert [goal.amount for goal in goals] == pytest.approx([20.0, 200.0, 240.0, 1.0])
    units = [unit_to_use_up(asked, SIZES, costs) for asked in (budget, Budget())]
    assert [unit.gain([NAMES[0]], "none") for unit in units] == [5.0, 100.0]


def test_what_fits_as_it_is_needs_no_plan() -> None:
    with raises(PlanError, "fits-already"):
        goals_of(Budget(fits=Memory(10_000, 10)), SIZES, None)
    both = goals_of(Budget(fits=Memory(10_000, 10), attention=1), SIZES, None)
    assert [goal.amount for goal in both] == [1]


def _importance(folder: Path) -> Path:
    rising = [0.0, 0.1, 0.2]
    report = importance_of({"attention": rising, "mlp": rising}, "gone")
    return report.write(folder / "importance.json")


def _invoked(*call: str) -> BaseException | None:
    return CliRunner().invoke(cli, call, obj=ConsoleProgress()).exception


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        (["--faster", "1.2x"], "needs-graph", "--onnx"),
        (["--fits", "8GB"], "needs-graph", "--onnx"),
        (["--at", "batch=1", "--drop-attn", "1"], "options-clash", "--at"),
        (["--check-text", "self", "--parameters", "10%", "--heal", "none"], 2, ""),
        (["--onnx", "GRAPH", "--drop-attn", "1"], "options-clash", "--onnx"),
        (["--threads", "2", "--parameters", "10%"], "options-clash", "--threads"),
        (["--parameters", "10"], 2, ""),
        (
            ["--parameters", "10%", "--search", "one-shot"],
            "options-clash",
            "--search one-shot",
        ),
        (["kinds: attention,head", "--parameters", "1%"], "option-value", "kinds"),
        (["--heal", "bias"], "nothing-asked", "--fits"),
        (["sequences: 4", "--drop-attn", "1"], "options-clash", "sequences"),
        ([], "nothing-asked", "--fits"),
        (["--drop-joint", "6", "--search", "greedy"], "too-many", 5),
        (["--drop-block", "3", "--search", "greedy"], "too-many", 2),
        (["--drop-block", "1"], "too-many", "--blocks"),
        (["--keep-first", "4"], "nothing-to-drop", 3),
        *(
            (["--keep-first", "2", name, value], "options-clash", name)
            for name, value in (
                *(("--drop-attn", "1"), ("--drop-block", "1"), ("--parameters", "10%")),
                *(("--fits", "8GB"), ("--faster", "1.2x"), ("--at-most", "5%")),
            )
        ),
        (["--keep-first", "1", "--search", "greedy"], "options-clash", "--search"),
        (["--keep-first", "1", "--protect", "last"], "options-clash", "--protect"),
    ],
)
def test_calls_that_make_no_plan(
    tmp_path: Path, options: list[str], code: str | int, field: object
) -> None:
    path = _importance(tmp_path)
    options = [str(path) if option == "GRAPH" else option for option in options]
    call = ["plan", str(path), "-o", str(tmp_path / "plan.json")]
    error: Any = _invoked(*call, *in_file(tmp_path, options))
    (tmp_path / "keys.yaml").unlink()
    assert error.code == code
    assert tells(str(error), field)
    assert [item.name for item in tmp_path.iterdir()] == ["importance.json"]


def test_numbers_of_several_kinds_combine_and_an_exit_has_the_last_first(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    call = ["plan", str(_importance(tmp_path)), "-o", str(out)]
    assert _invoked(*call, "--drop-attn", "2", "--drop-mlp", "1") is None
    assert PruningPlan.read(out).budget == {"attention": 2, "mlp": 1}
    assert _invoked(*call, "--keep-first", "1", "--protect", "first") is None
    plan = PruningPlan.read(out)
    assert [(cut.layer, cut.kind) for cut in plan.deletions] == [(2, "block"), (1, "block")]
    assert plan.budget["keep_first"] == 1


@pytest.mark.parametrize("budget", [Budget(parameters=0.1), Budget(fits=Memory(10**6, 64))])
def test_a_budget_is_held_by_measured_damage_alone(budget: Budget) -> None:
    with raises(UsageError, "options-clash", "one-shot"):
        PlanSettings(SearchOptions("one-shot")).for_budget(budget)
    assert PlanSettings().for_budget(budget).search.search == "greedy"
    assert PlanSettings().for_budget(Budget(attention=1)).search.search == "one-shot"


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("plan.json", ["--calibration", "plan.report.json"], "overwrites-input"),
        ("plan.json", ["--calibration", "plan.safetensors"], "overwrites-input"),
        ("plan.safetensors", [], "plan-place"),
        ("folder/plan.json", ["--model", "folder"], "plan-place"),
    ],
)
def test_no_file_of_a_plan_takes_an_inputs_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], code: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--calibration" in options:
        Path(options[1]).write_text("a text to search on")
    Path("folder").mkdir()
    call = ["plan", str(_importance(tmp_path)), "-o", name, "--parameters", "10%", *options]
    before = sorted(tmp_path.rglob("*"))
    error = _invoked(*call)
    assert isinstance(error, UsageError)
    assert error.code == code
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["plan", "export"])
@pytest.mark.parametrize(
    ("error", "code"), [(PlanError, 2), (UnmetGoalError, 1), (UndecidedGoalError, 3)]
)
def test_a_goal_out_of_reach_is_told_by_the_exit_code(
    command: str, error: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (graph := tmp_path / "g.onnx").touch()
    call = ["export", "model", "-o", str(tmp_path / "out"), "--no-measure"]
    if command == "plan":
        call = ["plan", str(_importance(tmp_path)), "--onnx", str(graph)]
    for name in ("choose.budgets.planner.make_plan", "pipeline.road.write_models"):
        monkeypatch.setattr(f"exporter.{name}", Mock(side_effect=error("no such plan.")))
    assert run([*call, "--faster", "1.25"]) == code


@pytest.mark.parametrize(
    ("name", "said"), [("objective", "perplexity"), ("shortlist", 7), ("search_tokens", 7)]
)
def test_what_only_searches_heed_is_refused_where_nothing_is_searched(name: str, said: Any) -> None:
    with pytest.raises(OptionError) as refused:
        build(PlanRequest, {**NUMBER, name: said})
    assert refused.value.keys[0] == name
    heeded = build(PlanRequest, {**NUMBER, name: said, "search": "greedy"})
    assert values_of(heeded)[name] == said


@pytest.mark.parametrize(
    ("longest", "longest_text", "caches", "context", "request_of"),
    [
        (None, None, True, 4096, (512, 64)),
        (8192, None, True, 4096, (512, 64)),
        (540, None, True, 540, (476, 64)),
        (64, None, True, 64, (32, 32)),
        (None, None, False, 4096, (512, 0)),
        (256, None, False, 256, (256, 0)),  # an encoder of sentences
        *((512, cut, False, 512, (512, 0)) for cut in (512, 8192)),
        (512, 256, False, 512, (256, 0)),
    ],
)
def test_the_usual_request_and_context_are_what_the_model_can_serve(
    longest: Any, longest_text: Any, caches: bool, context: int, request_of: tuple[int, int]
) -> None:
    bare = {name: replace(sublayer, caches=()) for name, sublayer in SIZES.sublayers.items()}
    sizes = replace(SIZES, longest=longest, longest_text=longest_text)
    sizes = sizes if caches else replace(sizes, sublayers=bare)
    given = Budget(at=USUAL_REQUEST, floors=Floors(0.02)), Budget(at=AT), Budget(parameters=0.1)
    expected = RequestShape(1, *request_of), AT, None
    assert tuple(on_graph(item, sizes).at for item in given) == expected
    fits = [Memory(10**6), Memory(10**6, 60)]
    fitted = [on_graph(Budget(fits=item), sizes).fits for item in fits]
    assert fitted == [Memory(10**6, context), Memory(10**6, 60)]


@pytest.mark.parametrize(
    ("asked", "at", "kind"),
    [
        ("", USUAL_REQUEST, "auto"),
        ("--at-most 5%", USUAL_REQUEST, "auto"),
        (f"--at-most 5% --heal fold --at {AT}", AT, "fold"),
        ("--at-most 5% --heal best", None, "best"),  # as in depthcut plan
        ("--at-most 5% --parameters 10%", None, "auto"),
        ("--parameters 10%", None, "auto"),
        ("--drop-attn 2", None, "auto"),
        ("--drop-attn 2 --search greedy", None, "auto"),
        ("--drop-attn 2 --search one-shot", None, None),
        ("--drop-attn 2 --heal none", None, None),
        ("--drop-attn 2 --heal linear", None, "linear"),
        ("--target tensorrt", None, "auto"),
    ],
)
def test_an_export_without_a_goal_saves_time_and_heals_unless_it_is_the_papers_way(
    asked: str, at: Any, kind: str | None
) -> None:
    request = export.read(["model", "-o", "out", *asked.split()]).request
    assert request.drops.budget.at == at
    assert (request.heal and request.heal.kind) == kind


@pytest.mark.parametrize(
    ("counts", "given", "protect"),
    [
        ({"attention": 2}, (), ("first", "last")),
        ({"attention": 4}, (), ("first", "last")),
        ({"attention": 5}, (), ("last",)),
        ({"attention": 6}, (), ()),
        ({"attention": 2, "mlp": 5}, (), ("last",)),
        ({"joint": 8}, (), ("first", "last")),
        ({"block": 4}, (), ("first", "last")),
        ({"attention": 2}, ("attention:2",), ("attention:2",)),  # a user's own stand alone
    ],
)
def test_the_ends_stay_as_far_as_others_are_enough(
    counts: Any, given: tuple[str, ...], protect: tuple[str, ...]
) -> None:
    report = importance_of({kind: [0.1] * 6 for kind in ("attention", "mlp")})
    result = by_scores_inside(SearchOptions(protect=given), report, counts, allow_all=False)
    assert (result.search, result.protect) == ("one-shot", protect)


NUMBER = {"importance": Path("i.json"), "drop_mlp": 1}
