"""Training that lets the whole model teach the cut one, on tiny models of several families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from healed_models import planned
from tiny_families import hook_count, tiny_loaded

from exporter.artifacts import CalibrationRef, PruningPlan
from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.artifacts.store import Store
from exporter.cli.export import export
from exporter.errors import HealingError, PlanError
from exporter.heal.options import HealOptions
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.mixtures import joined
from exporter.progress import QUIET, Quiet
from graph_passes.types import SublayerRef
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.automatic import USUAL_TIME_S, in_turn, settled  # noqa: E402
from exporter.heal.distill.distilled import distilled  # noqa: E402
from exporter.heal.distill.loss import answer_loss  # noqa: E402
from exporter.heal.distill.student import Student  # noqa: E402
from exporter.heal.distill.training import Trainer  # noqa: E402
from exporter.heal.fitting import Fitting  # noqa: E402
from exporter.heal.fold.folded import folded_values  # noqa: E402
from exporter.heal.plan_file import write_healed_plan  # noqa: E402
from exporter.heal.texts import HealingTexts  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.changed_weights import change_weights  # noqa: E402

DROPPED = [SublayerRef(1, "attention"), SublayerRef(2, "mlp")]
IDS = torch.arange(3, 19)[None]


def text(samples: int = 24, length: int = 16, seed: int = 0) -> CalibrationText:
    ids = np.random.default_rng(seed).integers(3, 60, (samples, length))
    ref = CalibrationRef(
        source=f"test {seed}", samples=samples, sequence_length=length, tokens=ids.size,
        sha256=f"{seed}" * 64,
    )  # fmt: skip
    return CalibrationText(ref, ids, np.ones(ids.shape, dtype=np.bool_))


RATES = {"adapters": 0.01, "all": 0.002}


def fitting(loaded: Any, work: Path | None = None, **options: Any) -> Fitting:
    usual = {"kind": "distill", "tokens": 12 * 64, "step_tokens": 64, "sequence_length": 16}
    rate = {"learning_rate": RATES[options.get("train", "adapters")]}
    asked = HealOptions(**usual | rate | options)
    first = text()
    texts = HealingTexts(first, (first.ref,), (text(8, seed=1),), None)
    return Fitting(loaded, texts, DROPPED, asked, work, QUIET)


def answer(model: Any) -> Any:
    with torch.inference_mode():
        found = model(IDS)
        return (found.logits if hasattr(found, "logits") else found[0]).clone()


@pytest.mark.parametrize(
    ("family", "train"),
    [("llama", "adapters"), ("llama", "all"), ("gpt2", "adapters"), ("bert", "adapters")],
)
def test_held_out_loss_falls_and_the_model_is_as_it_was(family: str, train: Any) -> None:
    loaded = tiny_loaded(family)
    before, hooks = answer(loaded.model), hook_count(loaded.model)
    modules = [type(module) for module in loaded.model.modules()]
    with distilled(fitting(loaded, train=train)) as made:
        assert made.training is not None
        losses = [check.held_out_loss for check in made.training.checks]
        assert min(losses) < 0.95 * losses[0]
        assert made.weights
        assert not any(each.maps or each.bias is not None
                       for each in made.branch_replacements.values())  # fmt: skip
    assert torch.equal(answer(loaded.model), before)
    assert hook_count(loaded.model) == hooks
    assert [type(module) for module in loaded.model.modules()] == modules
    assert not any(each.requires_grad for each in loaded.model.parameters())


@pytest.mark.parametrize(
    ("family", "train"),
    [
        *(("llama", "adapters"), ("llama", "all"), ("gpt2", "adapters"), ("bert", "all")),
        *(("gpt_neox", "adapters"), ("mixtral", "adapters")),
    ],
)
def test_written_weights_give_the_student(family: str, train: Any, tmp_path: Path) -> None:
    """What the student answered is what the model answers with the plan's weights and the cut."""
    loaded = tiny_loaded(family)
    cut = dict.fromkeys(DROPPED, NOTHING)
    with distilled(fitting(loaded, train=train)) as made:
        assert made.within is not None
        with made.within(), branches_replaced(loaded.model, cut):
            wanted = answer(loaded.model)
        plan = PruningPlan(deletions=planned(("attention", 1, "none"), ("mlp", 2, "none")))
        written = write_healed_plan(tmp_path / "plan.json", plan, {}, weights=made.weights)
    assert written.changed_weights == len(made.weights)
    read = LoadedPlan.read(tmp_path / "plan.json")
    with branches_replaced(loaded.model, cut):
        bare = answer(loaded.model)
    change_weights(loaded.model, read.changed_weights)
    with branches_replaced(loaded.model, cut):
        found = answer(loaded.model)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(found, bare, atol=1e-3)


def student_of(loaded: Any, train: Any = "adapters") -> Student:
    torch.manual_seed(0)
    return Student(loaded.model, dict.fromkeys(DROPPED, NOTHING), train, 4)


def test_the_loss_and_its_gradient_are_those_of_kl_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 11).unbind()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 4 + [False]])
    student.requires_grad_(True)
    loss = answer_loss(student, teacher, mask)
    loss.backward()
    found, student.grad = student.grad, None
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    wanted.backward()
    assert torch.allclose(loss, wanted, atol=1e-6)
    assert torch.allclose(found, student.grad, atol=1e-6)


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.heal.distill.training._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("exporter.heal.distill.training._SHARE_FOR_SAVING", 1e9)
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded, train=train)) as made:
        wanted, training = made.weights, made.training
    assert training is not None
    assert training.steps > 8
    steps, step = [], Trainer._step

    def interrupted(trainer: Trainer) -> float:
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        return step(trainer)

    kept: list[str] = []
    keep = Store.keep_arrays
    monkeypatch.setattr(
        Store,
        "keep_arrays",
        lambda store, name, *more: (kept.append(name), keep(store, name, *more)),
    )
    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt), distilled(fitting(loaded, tmp_path, train=train)):
        pass
    monkeypatch.setattr(Trainer, "_step", lambda trainer: (steps.append(1), step(trainer))[1])
    with distilled(fitting(loaded, tmp_path, train=train)) as made:
        found = made.weights
    assert len(steps) == training.steps
    assert len(kept) > 8
    assert all(one != other for one, other in pairwise(kept)), "the newest state is written over"
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        for one, other in zip(found[name].numbers, change.numbers, strict=True):
            assert torch.equal(one, other)


class Heard(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_state_of_other_settings_is_not_gone_on_from_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.heal.distill.training._SAVE_EVERY_S", 0.0)
    loaded = tiny_loaded("llama")
    counted: list[int] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda trainer: (counted.append(1), step(trainer))[1])
    said = []
    for folder, rank in (("one", None), ("one", 2), ("other", 2)):
        heard = Heard()
        counted.clear()
        asked = fitting(loaded, tmp_path / folder, rank=rank)
        with distilled(replace(asked, progress=heard)):
            assert len(counted) == 12
        said.append(len(heard.lines))
    assert said[1] == said[2] + 1


def test_a_training_that_gains_nothing_is_refused_and_leaves_the_model() -> None:
    loaded = tiny_loaded("llama")
    before = answer(loaded.model)
    with (
        raises(HealingError, "distillation-gained-nothing"),
        distilled(fitting(loaded, learning_rate=30.0, train="all")),
    ):
        pass
    assert torch.equal(answer(loaded.model), before)


def test_a_training_begins_with_folded_weights_and_keeps_them_where_it_gains_nothing() -> None:
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded, learning_rate=30.0)) as made:
        assert made.training is not None
        bare, folded, *trained = made.training.checks
        assert (bare.tokens, folded.tokens) == (0, 0)
        assert folded.held_out_loss < bare.held_out_loss
        assert made.training.fitted_loss == folded.held_out_loss
        assert all(folded.held_out_loss <= check.held_out_loss for check in trained)
        assert made.weights
        assert {len(each.numbers) for each in made.weights.values()} == {1}
        places = {name.split(".")[-2] for name in made.weights}
        assert places <= {"down_proj", "o_proj", "embed_tokens"}


@pytest.mark.parametrize(
    ("most", "samples"),
    [(6, [5, 2]), (16, [12, 4]), (600, [36, 12])],
    ids=["an eighth", "a third", "all"],
)
def test_the_fold_is_of_alike_much_of_each_text(
    monkeypatch: pytest.MonkeyPatch, most: int, samples: list[int]
) -> None:
    heard: list[CalibrationText] = []

    def hear(_: Any, few: CalibrationText) -> Any:
        heard.append(few)
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", hear)
    monkeypatch.setattr("exporter.heal.distill.distilled.DEFAULT_TOKENS", most * 16)
    asked = fitting(tiny_loaded("llama"))
    mixture = joined([text(36, seed=2), text(12, seed=3)])
    texts = replace(asked.texts, fitting=mixture)
    with pytest.raises(KeyboardInterrupt), distilled(replace(asked, texts=texts)):
        pass
    (few,) = heard
    assert [each.ref.samples for each in few.apart] == samples


def test_a_model_that_can_not_be_folded_is_trained_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_given: Any) -> Any:
        raise HealingError("", code="nothing-to-fold-into")

    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", refused)
    with distilled(fitting(tiny_loaded("llama"))) as made:
        assert made.training is not None
        assert [check.tokens > 0 for check in made.training.checks[:2]] == [False, True]
        assert made.training.fitted_loss is None


def test_folded_weights_that_do_harm_are_not_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(*given: Any) -> Any:
        found = folded_values(*given)
        assert found
        for each in found:
            each.other = each.other + 5.0
        return found

    loaded = tiny_loaded("llama")
    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", harmful)
    with distilled(fitting(loaded)) as made:
        assert made.training is not None
        bare, folded, *trained = made.training.checks
        assert folded.held_out_loss > bare.held_out_loss
        assert made.training.fitted_loss is None
        assert min(check.held_out_loss for check in trained) < bare.held_out_loss
        products = [each for name, each in made.weights.items() if "proj" in name]
        assert products
        assert {len(each.numbers) for each in products} == {2}


def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = tiny_loaded("llama")
    step = Trainer._step

    def diverging(trainer: Trainer) -> float:
        found = step(trainer)
        return float("nan") if trainer._state.steps == 8 else found

    monkeypatch.setattr(Trainer, "_step", diverging)
    with distilled(fitting(loaded)) as made:
        assert made.training is not None
        assert made.training.stopped_by == "diverged"
        losses = [check.held_out_loss for check in made.training.checks]
        assert min(losses) < losses[0]


@pytest.mark.parametrize(("times", "stopped"), [(50.0, "diverged"), (1.0, "tokens")])
def test_a_loss_that_only_grows_ends_the_training_with_the_best_state(
    times: float, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = Trainer._held_out_loss

    def growing(trainer: Trainer) -> float:
        return held_out(trainer) * (times if trainer._state.steps > 12 else 1.0)

    monkeypatch.setattr(Trainer, "_held_out_loss", growing)
    with distilled(fitting(tiny_loaded("llama"), tokens=64 * 40)) as made:
        assert made.training is not None
        assert made.training.stopped_by == stopped
        assert (made.training.tokens < 64 * 40) == (stopped == "diverged")
        losses = [check.held_out_loss for check in made.training.checks]
        assert min(losses) < losses[0]


def test_memory_that_is_short_for_the_fold_leaves_the_training_to_begin_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(*_given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", short)
    with distilled(fitting(tiny_loaded("llama"))) as made:
        assert made.training is not None
        assert made.training.fitted_loss is None


@pytest.mark.parametrize(("scale", "full"), [(1, False), (60, True)])
def test_the_rate_is_lower_where_answers_are_near(scale: float, full: bool) -> None:
    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight *= scale
    with distilled(fitting(loaded, learning_rate=None, tokens=12 * 64)) as made:
        assert made.training is not None
        begins = min(check.held_out_loss for check in made.training.checks if not check.tokens)
        assert (begins > 0.2) is full
        assert made.training.learning_rate == pytest.approx(
            1e-3 * min(1.0, (begins / 0.2) ** 0.5), rel=1e-6
        )


def test_a_rate_that_is_asked_for_is_taken() -> None:
    with distilled(fitting(tiny_loaded("llama"), learning_rate=0.01)) as made:
        assert made.training is not None
        assert made.training.learning_rate == 0.01


def test_a_training_that_gains_nothing_ends_early_but_not_while_the_rate_is_high() -> None:
    with distilled(fitting(tiny_loaded("llama"), tokens=64 * 400, learning_rate=1e-7)) as made:
        assert made.training is not None
        assert made.training.stopped_by == "no_gain"
        assert 0.5 <= made.training.tokens / (64 * 400) < 0.95


@pytest.mark.parametrize(("steps", "checks"), [(12, 3), (24, 6)])
def test_held_out_text_takes_a_small_part_of_the_tokens(
    monkeypatch: pytest.MonkeyPatch, steps: int, checks: int
) -> None:
    monkeypatch.setattr("exporter.heal.distill.training._PATIENCE", checks)
    with distilled(fitting(tiny_loaded("llama"), tokens=steps * 64)) as made:
        assert made.training is not None
        assert sum(check.tokens > 0 for check in made.training.checks) == checks


def test_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # With little time left the rate is low, and what gains nothing then would end it before.
    monkeypatch.setattr("exporter.heal.distill.training._PATIENCE", 10**6)
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded, tokens=10**6, time_s=3.0, learning_rate=1e-3)) as made:
        assert made.training is not None
        assert made.training.stopped_by == "time"
        assert made.training.tokens < 10**6


def test_the_last_check_is_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    step, held_out = Trainer._step, Trainer._held_out_loss

    def taking(seconds: float, real: Any) -> Any:
        def run(trainer: Trainer) -> Any:
            now[0] += seconds
            return real(trainer)

        return run

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("exporter.heal.distill.training._PATIENCE", 100)
    monkeypatch.setattr("exporter.heal.distill.training.time", clock)
    monkeypatch.setattr(Trainer, "_step", taking(1.0, step))
    monkeypatch.setattr(Trainer, "_held_out_loss", taking(4.0, held_out))
    asked = fitting(tiny_loaded("llama"), tokens=10**6, time_s=60.0, learning_rate=1e-3)
    with distilled(asked) as made:
        assert made.training is not None
        assert made.training.stopped_by == "time"
        assert made.training.checks[-1].tokens == made.training.tokens
        assert 59.0 <= made.training.seconds <= 61.0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_short_memory_says_what_needs_less(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Trainer) -> float:
        raise error

    monkeypatch.setattr(Trainer, "_step", failing)
    loaded = tiny_loaded("llama")
    with (
        raises(HealingError, "out-of-memory", "step_tokens 32", "--rank"),
        distilled(fitting(loaded)),
    ):
        pass


def test_quantised_weights_are_no_student() -> None:
    loaded = tiny_loaded("llama")
    loaded.model.is_quantized = True
    with raises(HealingError, "quantized-student"):
        student_of(loaded)


@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_replacements_are_fitted_trained_and_written(kind: Any, tmp_path: Path) -> None:
    loaded = tiny_loaded("llama")
    asked = fitting(loaded, replacements=kind, learning_rate=1e-3)
    before = asked.alike(kind)[0]
    with distilled(asked) as made:
        assert made.training is not None
        bare, fitted, *trained = (check.held_out_loss for check in made.training.checks)
        assert min(trained) < fitted < bare
        assert made.within is not None
        with made.within(), branches_replaced(loaded.model, made.branch_replacements):
            wanted = answer(loaded.model)
        deletions = planned(("attention", 1, kind), ("mlp", 2, kind))
        write_healed_plan(
            tmp_path / "plan.json", PruningPlan(deletions=deletions), made.branch_replacements,
            weights=made.weights,
        )  # fmt: skip
    for name, each in made.branch_replacements.items():
        assert each.bias is not None
        assert bool(each.maps) == (kind == "linear")
        assert not torch.equal(each.bias, before[name].bias)
    read = LoadedPlan.read(tmp_path / "plan.json")
    change_weights(loaded.model, read.changed_weights)
    with branches_replaced(loaded.model, made.branch_replacements):
        assert torch.allclose(answer(loaded.model), wanted, atol=2e-5)


def test_maps_in_the_branches_places_are_trained_too() -> None:
    loaded = tiny_loaded("llama")
    torch.manual_seed(1)
    maps = (torch.randn(32, 32) * 0.01,)
    student = Student(loaded.model, {DROPPED[0]: BranchReplacement(torch.zeros(32), maps)},
                      "adapters", 4)  # fmt: skip
    Trainer(student, text(), text(8, seed=1), fitting(loaded).options).run()
    (trained,) = student.branch_replacements()[DROPPED[0]].maps
    student.close()
    assert not torch.allclose(trained, maps[0])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded)) as made:
        weights = made.weights
    with raises(PlanError, "weight-of-another-shape"):
        change_weights(tiny_loaded("llama", hidden_size=64).model, weights)
    with raises(PlanError, "unknown-weight"):
        change_weights(tiny_loaded("gpt2").model, weights)
    plan = PruningPlan(deletions=planned(("attention", 1, "none")))
    write_healed_plan(tmp_path / "plan.json", plan, {}, weights=weights)
    told = PruningPlan.read(tmp_path / "plan.json")
    told.model_copy(update={"changed_weights": 3}).write(tmp_path / "plan.json")
    with raises(PlanError, "other-count-of-weights", 3, len(weights)):
        LoadedPlan.read(tmp_path / "plan.json")


@pytest.mark.long
def test_two_processes_train_one_student_together_and_the_first_decides(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=os.pathsep.join([str(here), str(here.parent), *sys.path]),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(here / "distill_worker.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alike, other = first
    assert other == alike
    # Half of the steps of one process: each takes a share.
    assert (alike["steps"], alike["stopped_by"], alike["kind"]) == (6, "tokens", "distill")
    assert min(alike["losses"][1:]) < alike["losses"][0]


@pytest.mark.parametrize(
    ("free_bytes", "rate", "kind"),
    [(1 << 40, 1e12, "distill"), (1 << 10, 1e12, "fold"), (1 << 40, 1.0, "fold")],
)
def test_what_a_machine_can_not_afford_is_not_trained(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, rate: float, kind: str
) -> None:
    monkeypatch.setattr("exporter.heal.fold.memory.available_bytes", lambda: free_bytes)
    monkeypatch.setattr("exporter.heal.automatic._RATES", {"cpu": rate, "cuda": rate})
    asked = HealOptions(kind="auto", tokens=1000)
    found = settled(asked, tiny_loaded("llama"))
    assert found.kind == kind
    assert found.time_s == (USUAL_TIME_S if kind == "distill" else None)
    assert found.tokens == (1000 if kind == "distill" else HealOptions().tokens)


@pytest.mark.parametrize(("family", "tokens"), [("llama", 200_000), ("bert", 600_000)])
@pytest.mark.parametrize("kind", ["auto", "distill"])
def test_a_training_has_the_tokens_of_its_models_kind(
    monkeypatch: pytest.MonkeyPatch, family: str, tokens: int, kind: Any
) -> None:
    monkeypatch.setattr("exporter.heal.fold.memory.available_bytes", lambda: 1 << 40)
    monkeypatch.setattr("exporter.heal.automatic._RATES", {"cpu": 1e14, "cuda": 1e14})
    loaded = tiny_loaded(family)
    assert settled(HealOptions(kind=kind), loaded).tokens == tokens
    assert settled(HealOptions(kind=kind, tokens=5), loaded).tokens == 5
    assert in_turn(HealOptions(kind=kind), loaded)[0].tokens == tokens


def test_what_auto_takes_next_is_asked_for_with_options_that_it_has() -> None:
    asked = HealOptions(kind="auto", tokens=1000, replacements="linear", rank=4)
    loaded = tiny_loaded("llama")
    assert [each.kind for each in in_turn(replace(asked, kind="distill"), loaded)] == ["distill"]
    _, folded, best = in_turn(asked, loaded)
    assert (folded.kind, folded.replacements, folded.rank) == ("fold", "linear", None)
    assert (best.kind, best.replacements) == ("best", "none")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--drop-attn", "2"), "auto"),
        (("--drop-attn", "2", "--search", "greedy"), "auto"),
        (("--drop-attn", "2", "--search", "one-shot"), None),
        (("--drop-attn", "2", "--heal", "none"), None),
        (("--drop-attn", "2", "--heal", "linear"), "linear"),
        (("--parameters", "10%"), "auto"),
        (("--at-most", "5%", "--heal", "best"), "best"),
        ((), "auto"),
    ],
)
def test_an_export_heals_unless_it_is_to_be_the_papers_way(
    options: tuple[str, ...], kind: str | None
) -> None:
    heal = export.read(["model", "-o", "out", *options]).request.heal
    assert (None if heal is None else heal.kind) == kind


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "phimoe"])
def test_experts_and_routers_have_no_adapters_and_are_as_they_were(family: str) -> None:
    loaded = tiny_loaded(family)
    before = answer(loaded.model)
    modules = [type(module) for module in loaded.model.modules()]
    student = student_of(loaded)
    assert student.trained
    student.close()
    assert [type(module) for module in loaded.model.modules()] == modules
    assert torch.equal(answer(loaded.model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_narrow_weights_are_wide_and_learn(dtype: Any) -> None:
    loaded = tiny_loaded("llama")
    loaded.model.to(dtype)
    with distilled(fitting(loaded)) as made:
        assert made.training is not None
        losses = [check.held_out_loss for check in made.training.checks]
        assert min(losses) < 0.97 * losses[0]
    assert {each.dtype for each in loaded.model.parameters()} == {dtype}


def test_narrow_weights_are_not_trained_themselves() -> None:
    loaded = tiny_loaded("llama")
    loaded.model.to(torch.bfloat16)
    with raises(HealingError, "narrow-weights"):
        student_of(loaded, "all")


def test_a_failure_while_the_student_is_made_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(_: Student) -> None:
        raise KeyboardInterrupt

    loaded = tiny_loaded("llama")
    modules = [type(module) for module in loaded.model.modules()]
    monkeypatch.setattr(Student, "_count_outputs", failing)
    with pytest.raises(KeyboardInterrupt):
        student_of(loaded)
    assert [type(module) for module in loaded.model.modules()] == modules
    assert not any(each.requires_grad for each in loaded.model.parameters())


def test_a_loss_that_is_never_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_held_out_loss", lambda _: float("nan"))
    asked = fitting(tiny_loaded("llama"))
    with raises(HealingError, "distillation-gained-nothing"), distilled(asked):
        pass
