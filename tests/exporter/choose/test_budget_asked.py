"""What may be asked of a plan, how it is written, and what is refused before any work."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner, Result

from exporter.artifacts import (
    HealingReport,
    ModelRef,
    PlannedDeletion,
    PruningPlan,
    ReplacementsRef,
)
from exporter.choose.budgets.budget import USUAL_REQUEST, Budget, Floors, Memory
from exporter.choose.budgets.candidates import PlanCandidate
from exporter.choose.budgets.figures import size_figures
from exporter.choose.budgets.settings import PlanRequest, PlanSettings
from exporter.choose.budgets.units import (
    Bytes,
    Counted,
    Milliseconds,
    Parameters,
    goals_of,
    unit_to_use_up,
    with_context,
    with_request,
)
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.selection.options import Option
from exporter.choose.selection.search_options import SearchOptions
from exporter.cli import run
from exporter.cli.export import export
from exporter.errors import (
    DepthcutError,
    OptionError,
    PlanError,
    UndecidedGoalError,
    UnmetGoalError,
    UsageError,
)
from exporter.heal.options import HealOptions
from exporter.options import build, values_of
from exporter.score.options import ScoreOptions
from tests.made_reports import full_report, importance_of
from tests.made_tables import made_table
from tests.raising import raises
from tests.reading import in_file

AT = RequestShape(batch=1, prompt=8, new=4)
ROOM = Memory(10**6, 64)
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


@pytest.mark.parametrize(("text", "value"), [("32k", 32768), ("32768", 32768), ("1K", 1024)])
def test_contexts(text: str, value: int) -> None:
    assert Memory(1, text).context == value  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "-1", "k", "1.5k", "8M"])
def test_what_is_no_context(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Memory(1, text)  # type: ignore[arg-type]
    assert caught.value.keys == ("context",)


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"parameters": 1.0}, "parameters"),
        ({"parameters": -0.1}, "parameters"),
        ({"target_speedup": 1.0, "at": AT}, "faster"),
        ({"target_speedup": float("nan"), "at": AT}, "faster"),
        ({"target_speedup": 1.2}, "at"),
        ({"joint": 2, "attention": 1}, "drop_joint"),
        ({"mlp": 1, "kinds": ("attention",)}, "kinds"),
        ({"block": 1, "kinds": ("attention",)}, "kinds"),
        ({"kinds": ()}, "kinds"),
    ],
)
def test_budgets_that_make_no_sense(asked: Any, key: str) -> None:
    with pytest.raises(OptionError) as caught:
        Budget(**asked)
    assert key in caught.value.keys


@pytest.mark.parametrize(
    "asked",
    [(0.0, None), (-0.1, None), (math.nan, None), (math.inf, None), (None, 0.0), (None, 1.0)],
)
def test_floors_that_make_no_sense(asked: Any) -> None:
    with pytest.raises(UsageError):
        Floors(*asked)


def test_memory_of_nothing() -> None:
    with pytest.raises(OptionError) as caught:
        Memory(0, 8)
    assert caught.value.keys == ("fits",)


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
    block = [(0, "attention"), (0, "mlp")]
    memory = Memory(3000, context=10, batch=2)
    # A bias brings 4 numbers, a linear map 4 * 5 and leaves the norm of 10.
    assert Parameters(SIZES).gain(block, "none") == 200  # type: ignore[arg-type]
    assert Parameters(SIZES).gain(block, "bias") == 192  # type: ignore[arg-type]
    assert Parameters(SIZES).gain(block, "linear") == 140  # type: ignore[arg-type]
    assert Bytes(SIZES, memory).whole == 4000 + 3 * 8 * 10 * 2
    assert Bytes(SIZES, memory).gain([(0, "attention")], "none") == 400 + 8 * 10 * 2
    assert Bytes(SIZES, memory).gain([(0, "mlp")], "none") == 400
    attentions = Counted(("attention",), "attention")
    assert [attentions.words(n) for n in (1, 2)] == ["1 attention dropped", "2 attentions dropped"]
    blocks = Counted((), "block")
    assert [blocks.words(n) for n in (1, 0)] == ["1 block dropped", "0 blocks dropped"]
    assert attentions.gain([(0, "attention")], "linear") == 1
    assert attentions.gain([(0, "mlp")], "none") == attentions.gain(block, "none") == 0  # type: ignore[arg-type]
    assert blocks.gain(block, "none") == 1  # type: ignore[arg-type]
    assert blocks.gain([(0, "mlp")], "none") == 0
    costs = made_table({name: {"none": 5.0, "bias": 4.0} for name in NAMES}, at=AT)
    assert Milliseconds(costs).gain(block, "bias") == 8  # type: ignore[arg-type]
    assert Milliseconds(costs).speedup(20.0) == pytest.approx(1.25, rel=1e-12)


def test_goals_are_what_has_to_go() -> None:
    costs = made_table({name: {"none": 5.0} for name in NAMES}, at=AT)
    budget = Budget(
        attention=1, parameters=0.2, target_speedup=1.25, at=AT, fits=Memory(4000, 10)
    )  # fmt: skip
    goals = goals_of(budget, SIZES, costs)
    assert [goal.amount for goal in goals] == pytest.approx([20.0, 200.0, 240.0, 1.0])
    assert isinstance(unit_to_use_up(budget, SIZES, costs), Milliseconds)
    assert isinstance(unit_to_use_up(Budget(), SIZES, costs), Parameters)


def test_what_fits_as_it_is_needs_no_plan() -> None:
    with raises(PlanError, "fits-already"):
        goals_of(Budget(fits=Memory(10_000, 10)), SIZES, None)
    both = goals_of(Budget(fits=Memory(10_000, 10), attention=1), SIZES, None)
    assert [goal.amount for goal in both] == [1]


def _importance(folder: Path) -> Path:
    rising = [0.0, 0.1, 0.2]
    report = importance_of({"attention": rising, "mlp": rising}, "gone")
    return report.write(folder / "importance.json")


def _invoked(*call: str) -> Result:
    from exporter.cli import cli
    from exporter.cli.console import ConsoleProgress

    return CliRunner().invoke(cli, call, obj=ConsoleProgress())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--faster", "1.2x"], "Give it with --onnx"),
        (["--faster", "1.2y"], "--faster"),
        (["--faster", "1.2", "--at", "batch=1,prompt=8,new=4"], "Give it with --onnx"),
        (
            ["--faster", "1.2", "--at", "batch=1,prompt=8,new=4", "require_speedup: true"],
            "--onnx",
        ),
        (["require_speedup: true", "--parameters", "10%"], "--faster"),
        (["require_speedup: true", "--drop-attn", "1"], "require_speedup"),
        (["--fits", "8GB"], "Name it with --onnx"),
        (["--at", "batch=1", "--drop-attn", "1"], "--at"),
        (["--check-text", "self", "--parameters", "10%", "--heal", "none"], "--check-text"),
        (["--onnx", "GRAPH", "--drop-attn", "1"], "--onnx"),
        (["--threads", "2", "--parameters", "10%"], "--threads"),
        (["--provider", "cuda", "--parameters", "10%"], "--provider"),
        (["--time-budget", "9s", "--parameters", "10%"], "--time-budget"),
        (["--threads", "2", "--drop-attn", "1"], "--threads"),
        (["--parameters", "10%", "--search", "one-shot"], "--search one-shot"),
        (["--heal", "bias"], "Give a budget"),
        (["sequences: 4", "--drop-attn", "1"], "sequences"),
        (["sequences: 4", "--parameters", "10%"], "sequences"),
        ([], "Give a budget"),
        (["--drop-joint", "6", "--search", "greedy"], "only 5 may be dropped"),
        (["--drop-block", "3", "--search", "greedy"], "only 2 may be dropped"),
        (["--drop-block", "1"], "--metric kl with --blocks"),
        (["--drop-block", "1"], "1 block is to be dropped, but no block of gone is scored"),
        (["--drop-block", "2"], "2 blocks are to be dropped, but no block of gone is scored"),
        (["--drop-block", "1", "--protect", "first"], "--metric kl with --blocks"),
    ],
)
def test_calls_that_lack_something(tmp_path: Path, options: list[str], words: str) -> None:
    path = _importance(tmp_path)
    options = [str(path) if option == "GRAPH" else option for option in options]
    call = ["plan", str(path), "-o", str(tmp_path / "plan.json"), *in_file(tmp_path, options)]
    done = _invoked(*call)
    (tmp_path / "keys.yaml").unlink()
    assert done.exit_code != 0
    output = done.output + (
        str(done.exception) if isinstance(done.exception, DepthcutError) else ""
    )
    assert words in re.sub(r"\s+", " ", output)
    assert [item.name for item in tmp_path.iterdir()] == ["importance.json"]


@pytest.mark.parametrize(
    ("search", "budget"), [("one-shot", Budget(parameters=0.1)), ("one-shot", Budget(fits=ROOM))]
)
def test_a_budget_is_held_by_measured_damage_alone(search: Any, budget: Budget) -> None:
    with pytest.raises(UsageError):
        PlanSettings(SearchOptions(search)).for_budget(budget)
    assert PlanSettings().for_budget(budget).search.search == "greedy"
    assert PlanSettings().for_budget(Budget(attention=1)).search.search == "one-shot"


def test_a_search_that_weighs_replacements_fits_them_in_its_own_way() -> None:
    heal = HealOptions(calibration=("mine.txt",))
    settings = PlanSettings(SearchOptions("greedy"), heal=heal, calibration=("a.txt",))
    with pytest.raises(UsageError):
        settings.for_budget(Budget(attention=1))
    assert (
        replace(settings, search=SearchOptions()).for_budget(Budget(attention=1)).heals_afterwards
    )
    assert replace(settings, heal=HealOptions(calibration=("a.txt",))).for_budget(Budget(joint=1))


def test_a_training_with_replacements_weighs_them_before_it() -> None:
    def settings(**heal: Any) -> PlanSettings:
        plan_settings = PlanSettings(
            SearchOptions("greedy"), heal=HealOptions(kind="distill", **heal)
        )
        return plan_settings.for_budget(Budget(attention=1))

    result = settings(replacements="linear", rank=4)
    assert result.weighed == HealOptions(kind="linear")
    assert result.heals_afterwards
    bare = settings()
    assert bare.weighed is None
    assert bare.heals_afterwards
    best = PlanSettings(SearchOptions("greedy"), heal=HealOptions(kind="best"))
    assert not best.for_budget(Budget(attention=1)).heals_afterwards


@pytest.mark.parametrize("schema", [PlanSettings, ScoreOptions])
def test_a_mixture_names_each_text_once(schema: Any) -> None:
    with raises(OptionError, "", "--calibration"):
        schema(calibration=("a.txt", "b.txt", "a.txt"))
    assert schema(calibration=("a.txt", "b.txt")).calibration == ("a.txt", "b.txt")


def test_a_bare_plan_takes_along_what_a_healed_one_had_beside_it(tmp_path: Path) -> None:
    out, numbers = tmp_path / "plan.json", tmp_path / "plan.safetensors"
    call = ["plan", str(_importance(tmp_path)), "-o", str(out), "--drop-attn", "1"]
    copy, report = tmp_path / "copy.json", tmp_path / "plan.report.json"
    for is_copied in (True, False):
        numbers.write_bytes(b"numbers")
        healing = full_report().healing
        assert healing is not None
        model = ModelRef(source="gone", architecture="X", num_layers=3, sha256="0" * 64)
        HealingReport(model=model, healing=healing).write(report)
        healed = PruningPlan(
            deletions=[PlannedDeletion(layer=1, kind="attention", replacement="linear")],
            replacements=ReplacementsRef(path=numbers.name, sha256="1" * 64),
        )
        healed.write(out)
        healed.write(copy) if is_copied else copy.unlink()
        assert _invoked(*call).exception is None
        assert PruningPlan.read(out).replacements is None
        # A copy of the healed plan may still want them.
        assert numbers.exists() is report.exists() is is_copied


def test_a_plan_beside_a_copy_of_an_earlier_one_leaves_its_numbers(tmp_path: Path) -> None:
    from exporter.heal.plan_file import refuse_places

    numbers = tmp_path / "plan.safetensors"
    numbers.write_bytes(b"numbers")
    healed = PruningPlan(
        deletions=[PlannedDeletion(layer=1, kind="attention", replacement="linear")],
        replacements=ReplacementsRef(path=numbers.name, sha256="1" * 64),
    )
    healed.write(tmp_path / "plan.json")
    refuse_places(tmp_path / "plan.json", [], tmp_path / "model.gguf")
    healed.write(tmp_path / "copy.json")
    with raises(UsageError, "numbers-in-use", tmp_path / "copy.json"):
        refuse_places(tmp_path / "plan.json", [], tmp_path / "model.gguf")


def test_numbers_of_several_kinds_combine(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    call = ["plan", str(_importance(tmp_path)), "-o", str(out)]
    assert _invoked(*call, "--drop-attn", "2", "--drop-mlp", "1").exception is None
    assert PruningPlan.read(out).budget == {"attention": 2, "mlp": 1}
    done = _invoked(*call, "--drop-joint", "2", "--drop-mlp", "1")
    assert "--drop-joint" in str(done.exception)


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("plan.json", ["--calibration", "plan.report.json"], "overwrites-input"),
        ("plan.json", ["--calibration", "plan.safetensors"], "overwrites-input"),
        ("plan.safetensors", [], "numbers-name"),
        ("folder/plan.json", ["--model", "folder"], "among-weights"),
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
    done = _invoked(*call)
    assert isinstance(done.exception, UsageError)
    assert done.exception.code == code
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [["--parameters", "10"], ["kinds: attention,head", "--parameters", "1%"],
     ["--at", "prompts=3"], ["--context", "x"]],
)  # fmt: skip
def test_options_that_can_not_be_read(tmp_path: Path, options: list[str]) -> None:
    done = _invoked("plan", str(_importance(tmp_path)), *in_file(tmp_path, options))
    assert done.exit_code == 2 or isinstance(done.exception, OptionError)


def _timed_plan(*ci95: float) -> PruningPlan:
    names = ("measured_speedup_low", "measured_speedup_high")
    figures = {**dict(zip(names, ci95, strict=False)), "measured_speedup": 1.25}
    return PruningPlan(
        deletions=[PlannedDeletion(layer=1, kind="mlp")],
        budget={"target_speedup": 1.25, "at": str(AT)},
        predicted=figures,
    )


@pytest.mark.parametrize("command", ["plan", "export"])
@pytest.mark.parametrize(
    ("ci95", "code", "words"),
    [
        ((1.22, 1.27), 0, ""),  # 3 % below the target is 1.2125
        ((1.3, 1.5), 0, ""),
        ((1.2, 1.27), 3, "speedup of 1.25 is not shown: 1.250 was measured"),
        ((1.1, 1.2), 1, "speedup of 1.25 is not reached"),
        ((), 3, "is not shown"),
    ],
)
def test_a_required_speedup_is_told_by_the_exit_code(
    command: str,
    ci95: tuple[float, ...],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = _timed_plan(*ci95)
    plan.write(tmp_path / "out" / "plan.json")
    makers = "exporter.choose.budgets.making.make_plan", "exporter.pipeline.road.write_models"
    for name in (*makers, "exporter.cli.export.print_models"):
        monkeypatch.setattr(name, lambda *_: plan)
    graph = tmp_path / "g.onnx"
    graph.touch()
    call = ["--faster", "1.25", "--at", str(AT)]
    if command == "plan":
        call = ["plan", str(_importance(tmp_path)), "-o", str(tmp_path / "p.json"), *call]
        call += ["--onnx", str(graph)]
    else:
        call = ["export", "model", "-o", str(tmp_path / "out"), "--no-measure", *call]
    required = in_file(tmp_path, [*call, "require_speedup: true"])
    assert run(required) == code
    assert words in (printed := capsys.readouterr()).err
    assert bool(printed.err) == bool(code)
    assert run(call) == 0, "only who asks for it is told by the exit code"
    for error, ends in ((PlanError, 2), (UnmetGoalError, 1), (UndecidedGoalError, 3)):
        for name in makers:
            monkeypatch.setattr(name, Mock(side_effect=error("no such plan.")))
        assert run(call) == ends
    monkeypatch.setattr(makers[command == "export"], Mock(side_effect=PlanError("no such plan.")))
    assert run(required) == 2, "1 says that there is a plan"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(("objective", "perplexity"), ("shortlist", 7), ("search_tokens", 7)),
        *(("model", "m"), ("calibration", ("text.txt",)), ("batch_size", 7), ("revision", "v1")),
        *(("trust_remote_code", True), ("allow_pickle", True), ("allow_any_model_type", True)),
    ],
)
def test_what_only_searches_heed_is_refused_where_nothing_is_searched(name: str, said: Any) -> None:
    result = {"importance": Path("i.json"), "drop_mlp": 1, name: said}
    with pytest.raises(OptionError) as refused:
        build(PlanRequest, result)
    assert refused.value.keys[0] == name
    heeded = build(PlanRequest, {**result, "search": "greedy"})
    assert values_of(heeded)[name] == said


def test_the_model_is_of_use_where_something_is_fitted_or_held() -> None:
    result = {"importance": Path("i.json"), "model": "m"}
    for more in ({"drop_mlp": 1, "heal": "bias"}, {"parameters": 0.1}):
        assert build(PlanRequest, {**result, **more}).model == "m"


def test_the_usual_request_is_made_faster_where_none_is_named() -> None:
    assert build(Budget, {"faster": "1.2x"}) == Budget(
        target_speedup=1.2, at=RequestShape(batch=1, prompt=512, new=64)
    )
    assert build(Budget, {"faster": 1.2, "at": AT}).at == AT
    assert build(Budget, {"parameters": 0.1}).at is None


@pytest.mark.parametrize(("longest", "context"), [(None, 4096), (64, 64), (8192, 4096)])
def test_the_usual_context_is_what_the_model_can_hold(longest: Any, context: int) -> None:
    sizes = replace(SIZES, longest=longest)
    result = Budget(fits=Memory(10**6)), Budget(fits=Memory(10**6, 60))
    fits = [with_context(item, sizes).fits for item in result]
    assert fits == [Memory(10**6, context), Memory(10**6, 60)]


@pytest.mark.parametrize(
    ("longest", "caches", "found"),
    [
        (None, True, (512, 64)),
        (8192, True, (512, 64)),
        (540, True, (476, 64)),
        (64, True, (32, 32)),
        (None, False, (512, 0)),
        (256, False, (256, 0)),  # an encoder of sentences
    ],
)
def test_the_usual_request_is_one_that_the_model_can_serve(
    longest: Any, caches: bool, found: tuple[int, int]
) -> None:
    sizes = replace(SIZES, longest=longest)
    if not caches:
        bare = {name: replace(sublayer, caches=()) for name, sublayer in SIZES.sublayers.items()}
        sizes = replace(sizes, sublayers=bare)
    fitted = with_request(Budget(floors=Floors(0.02), at=USUAL_REQUEST), sizes)
    assert fitted.at == RequestShape(1, *found)
    assert with_request(Budget(at=AT), sizes).at == AT
    assert with_request(Budget(parameters=0.1), sizes).at is None


@pytest.mark.parametrize(
    ("longest_text", "prompt"), [(None, 512), (512, 512), (256, 256), (8192, 512)]
)
def test_the_usual_request_of_an_encoder_ends_where_texts_are_cut(
    longest_text: int | None, prompt: int
) -> None:
    bare = {name: replace(sublayer, caches=()) for name, sublayer in SIZES.sublayers.items()}
    sizes = replace(SIZES, sublayers=bare, longest=512, longest_text=longest_text)
    assert with_request(Budget(at=USUAL_REQUEST), sizes).at == RequestShape(1, prompt, 0)
    assert with_request(Budget(at=AT), sizes).at == AT


@pytest.mark.parametrize(
    ("asked", "at"),
    [
        ((), USUAL_REQUEST),
        (("--at-most", "5%"), USUAL_REQUEST),
        (("--at-most", "5%", "--heal", "fold", "--at", str(AT)), AT),
        (("--at-most", "5%", "--heal", "best"), None),  # as in depthcut plan
        (("--at-most", "5%", "--parameters", "10%"), None),
        (("--drop-attn", "2"), None),
        (("--target", "tensorrt"), None),
    ],
)
def test_an_export_without_a_goal_saves_time(asked: tuple[str, ...], at: Any) -> None:
    budget = export.read(["model", "-o", "out", *asked]).request.drops.budget
    assert budget is not None
    assert budget.at == at


def test_costs_that_can_not_be_right_foretell_nothing() -> None:
    cut = PlanCandidate(tuple(Option((name,)) for name in NAMES[:3]))

    def told(saved_ms: float) -> dict[str, float]:
        table = made_table({name: {"none": saved_ms} for name in NAMES}, at=AT)
        return size_figures(Budget(at=AT), cut, SIZES, table, None)

    assert told(20.0)["speedup"] == 2.5
    assert "speedup" not in told(40.0)
    assert told(40.0)["parameters"] == told(20.0)["parameters"]


def test_a_first_look_that_trains_nothing_takes_no_time_for_a_training() -> None:
    result = ["model", "-o", "out", "--quick", "--time", "5m"]
    with raises(OptionError, "", "--quick", "--time"):
        export.read(result)
    heal = export.read([*result, "--heal", "distill"]).request.heal
    assert heal is not None
    assert (heal.kind, heal.time_s) == ("distill", 300.0)
    assert export.read(["model", "-o", "out", "--time", "5m"]).request.heal is not None
