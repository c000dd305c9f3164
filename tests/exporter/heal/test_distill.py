"""Training that lets the whole model teach the cut one, on tiny models of several families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from healed_models import planned
from tiny_families import hook_count, tiny_loaded

from exporter.artifacts import PruningPlan
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.store import Store
from exporter.errors import HealingError, PlanError
from exporter.progress import Quiet
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from distill_cases import DROPPED, IDS, answer, fitting, student_of, text  # noqa: E402

from exporter.heal.distill.distilled import distilled  # noqa: E402
from exporter.heal.distill.student import Student  # noqa: E402
from exporter.heal.distill.teacher import answer_loss  # noqa: E402
from exporter.heal.distill.training import (  # noqa: E402
    Trainer,
    rate_groups,
)
from exporter.heal.plan_file import write_healed_plan  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.changed_weights import change_weights, weights_changed  # noqa: E402


class Heard(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


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
    ("family", "train", "dtype"),
    [
        *(("llama", "adapters", torch.bfloat16), ("llama", "adapters", torch.float32)),
        *(("llama", "all", torch.float32), ("bert", "all", torch.float32)),
        *(("gpt2", "adapters", torch.float16), ("gpt_neox", "adapters", torch.float32)),
        ("mixtral", "adapters", torch.bfloat16),
    ],
)
def test_what_is_judged_is_what_is_written(
    family: str, train: Any, dtype: Any, tmp_path: Path
) -> None:
    """To the last bit: merged weights, in the type that the model has."""
    loaded = tiny_loaded(family)
    loaded.model.to(dtype)
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
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, bare, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_merged_weights_give_what_the_student_answers(family: str) -> None:
    loaded = tiny_loaded(family)
    cut, student = dict.fromkeys(DROPPED, NOTHING), student_of(loaded)
    with torch.no_grad():
        for each in student.trained.values():
            each.add_(0.05 * torch.randn_like(each))
    with student.healed(), torch.inference_mode():
        wanted = student.answer({"input_ids": IDS}).given
    changes = student.changes()
    student.close()
    with weights_changed(loaded.model, changes), branches_replaced(loaded.model, cut):
        assert torch.allclose(answer(loaded.model), wanted, atol=2e-5)


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


@pytest.mark.parametrize(
    "how",
    [{"train": "adapters"}, {"train": "all"}, {"train": "adapters", "replacements": "linear"}],
    ids=["adapters", "all", "adapters and maps"],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.heal.distill.training._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("exporter.heal.distill.training._SHARE_FOR_SAVING", 1e9)
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded, **how)) as made:
        wanted, training = made.weights, made.training
        maps = made.branch_replacements
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
    with pytest.raises(KeyboardInterrupt), distilled(fitting(loaded, tmp_path, **how)):
        pass
    monkeypatch.setattr(Trainer, "_step", lambda trainer: (steps.append(1), step(trainer))[1])
    with distilled(fitting(loaded, tmp_path, **how)) as made:
        found = made.weights
        again = made.branch_replacements
    assert len(steps) == training.steps
    assert len(kept) > 8
    assert all(one != other for one, other in pairwise(kept)), "the newest state is written over"
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        for one, other in zip(found[name].numbers, change.numbers, strict=True):
            assert torch.equal(one, other)
    for ref, each in maps.items():
        assert bool(each.maps) == ("replacements" in how)
        for one, other in zip(each.maps, again[ref].maps, strict=True):
            assert torch.equal(one, other)


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


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_beside_adapters_fitted_maps_are_trained_at_a_lower_rate(train: Any) -> None:
    loaded = tiny_loaded("llama")
    cut = {DROPPED[0]: BranchReplacement(torch.zeros(32), (torch.zeros(32, 32),))}
    student = Student(loaded.model, cut, train, 4 if train == "adapters" else None)
    groups = rate_groups(student.trained, student.replacing, train)
    shares = {id(each): group["share"] for group in groups for each in group["params"]}
    trained, names = student.trained, set(student.replacing)
    student.close()
    replaced = [shares.pop(id(trained[name])) for name in names]
    others = [shares.pop(id(trained[name])) for name in trained.keys() - names]
    assert not shares
    assert len(replaced) == 2
    assert max(replaced) < 0.2 if train == "adapters" else set(replaced) == {1.0}
    assert set(others) == {1.0}


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
