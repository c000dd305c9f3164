"""Training that lets the whole model teach the cut one, on tiny models of several families."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from exporter.artifacts import PruningPlan, Training
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.store import Store
from exporter.errors import HealingError, PlanError
from exporter.heal.options import HealOptions
from tests.raising import raises
from tests.reading import Heard
from tests.tiny_models import hook_count, planned, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.distill.student import Student  # noqa: E402
from exporter.heal.distill.training import Trainer, rate_groups  # noqa: E402
from exporter.heal.fit import Fitting  # noqa: E402
from exporter.heal.folded import folded_values  # noqa: E402
from exporter.heal.healed import _made, distilled  # noqa: E402
from exporter.heal.plan_file import write_healed_plan  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.ablation.losses import answer_loss  # noqa: E402
from exporter.models.changed_weights import (  # noqa: E402
    bfloat16_where_fast,
    change_weights,
    weights_changed,
)
from tests.exporter.distill_cases import (  # noqa: E402
    DROPPED,
    IDS,
    answer,
    fitting,
    student_of,
)

TRAINING = "exporter.heal.distill.training"


def kinds_of(model: Any) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("family", "train", "dtype"),
    [
        *(("llama", "adapters", torch.bfloat16), ("bert", "all", torch.float32)),
        ("gpt2", "adapters", torch.float16),
        ("mixtral", "adapters", torch.bfloat16),
    ],
)
def test_held_out_loss_falls_and_what_is_judged_is_what_is_written(
    family: str, train: Any, dtype: Any, tmp_path: Path
) -> None:
    """To the last bit: merged weights, in the type that the model has; which is as it was."""
    loaded = tiny_loaded(family)
    loaded.model.to(dtype)
    before = answer(loaded.model), hook_count(loaded.model), kinds_of(loaded.model)
    cut = dict.fromkeys(DROPPED, NOTHING)
    with distilled(fitting(loaded, train=train)) as made:
        losses = losses_of(made.training)
        assert min(losses) < 0.95 * losses[0]
        assert not any(item.numbers for item in made.branch_replacements.values())
        with made.within(), branches_replaced(loaded.model, cut):
            wanted = answer(loaded.model)
        plan = PruningPlan(deletions=planned(("attention", 1, "none"), ("mlp", 2, "none")))
        written = write_healed_plan(tmp_path / "plan.json", plan, {}, weights=made.weights)
    assert torch.equal(answer(loaded.model), before[0])
    assert (hook_count(loaded.model), kinds_of(loaded.model)) == before[1:]
    assert not any(item.requires_grad for item in loaded.model.parameters())
    assert written.changed_weights == len(made.weights) > 0
    with branches_replaced(loaded.model, cut):
        bare = answer(loaded.model)
        change_weights(loaded.model, LoadedPlan.read(tmp_path / "plan.json").changed_weights)
        result = answer(loaded.model)
    assert torch.equal(result, wanted)
    assert not torch.allclose(result, bare, atol=1e-3)


@pytest.mark.parametrize(("dtype", "fast"), [(torch.float32, True), (torch.float16, False)])
def test_a_machine_with_bfloat16_uses_it_where_the_model_runs_in_both(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fast: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = tiny_loaded("gpt2").model.to(dtype)
    with torch.inference_mode(), bfloat16_where_fast(model):
        assert torch.is_autocast_enabled("cpu") is fast
        model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_merged_weights_give_what_the_student_answers(family: str) -> None:
    loaded = tiny_loaded(family)
    cut, student = dict.fromkeys(DROPPED, NOTHING), student_of(loaded)
    with torch.no_grad():
        for item in student.trained.values():
            item.add_(0.05 * torch.randn_like(item))
    with student.healed(), torch.inference_mode():
        wanted = student.answer({"input_ids": IDS}).given
    changes = student.changes()
    student.close()
    with weights_changed(loaded.model, changes), branches_replaced(loaded.model, cut):
        assert torch.allclose(answer(loaded.model), wanted, atol=2e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "phimoe"])
def test_experts_and_routers_have_no_adapters_and_are_as_they_were(family: str) -> None:
    loaded = tiny_loaded(family)
    before, kinds = answer(loaded.model), kinds_of(loaded.model)
    student = student_of(loaded)
    assert student.trained
    student.close()
    assert kinds_of(loaded.model) == kinds
    assert torch.equal(answer(loaded.model), before)


def test_the_loss_and_its_gradient_are_those_of_kl_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 11).unbind()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 4 + [False]])
    student.requires_grad_(True)
    loss = answer_loss(student, teacher, mask)
    loss.backward()
    result, student.grad = student.grad, None
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    wanted.backward()
    assert torch.allclose(loss, wanted, atol=1e-6)
    assert torch.allclose(result, student.grad, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [{"train": "adapters"}, {"train": "all"}, {"train": "adapters", "replacements": "linear"}],
    ids=["adapters", "all", "adapters and maps"],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{TRAINING}._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(f"{TRAINING}._SHARE_FOR_SAVING", 1e9)
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded, **how)) as made:
        wanted, maps = made.weights, made.branch_replacements
    assert made.training.steps > 8
    steps, kept, step, keep = [], list[str](), Trainer._step, Store.keep_arrays

    def interrupted(trainer: Trainer) -> float:
        if len(steps) == 7 and "over" not in steps:
            steps.append("over")
            raise KeyboardInterrupt
        steps.append(1)
        return step(trainer)

    def keeping(store: Store, name: str, *more: Any) -> None:
        kept.append(name)
        keep(store, name, *more)

    monkeypatch.setattr(Store, "keep_arrays", keeping)
    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt), distilled(fitting(loaded, tmp_path, **how)):
        pass
    with distilled(fitting(loaded, tmp_path, **how)) as again:
        assert len(steps) == made.training.steps + 1
    assert len(kept) > 8
    assert all(one != other for one, other in pairwise(kept)), "the newest state is written over"
    assert again.weights.keys() == wanted.keys()
    pairs = [(again.weights[name].numbers, change.numbers) for name, change in wanted.items()]
    pairs += [(again.branch_replacements[ref].numbers, item.numbers) for ref, item in maps.items()]
    for ours, theirs in pairs:
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
    assert all(bool(item.numbers) == ("replacements" in how) for item in maps.values())


def test_a_state_of_other_settings_is_not_gone_on_from_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{TRAINING}._SAVE_EVERY_S", 0.0)
    counted = Mock(side_effect=Trainer._step)
    monkeypatch.setattr(Trainer, "_step", lambda trainer: counted(trainer))
    said = []
    for folder, rank in (("one", 16), ("one", 2), ("other", 2)):
        heard = Heard()
        result = fitting(tiny_loaded("llama"), tmp_path / folder, rank=rank)
        training_of(replace(result, progress=heard))
        said.append(len(heard.lines))
    assert counted.call_count == 3 * 12
    assert said[1] == said[2] + 1


@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_replacements_are_fitted_trained_and_written(kind: Any, tmp_path: Path) -> None:
    loaded = tiny_loaded("llama")
    result = fitting(loaded, replacements=kind, learning_rate=1e-3)
    before = result.alike(kind)[0]
    with distilled(result) as made:
        bare, fitted, *trained = (check.held_out_loss for check in made.training.checks)
        assert min(trained) < fitted < bare
        with made.within(), branches_replaced(loaded.model, made.branch_replacements):
            wanted = answer(loaded.model)
        plan = PruningPlan(deletions=planned(("attention", 1, kind), ("mlp", 2, kind)))
        replacements = made.branch_replacements
        write_healed_plan(tmp_path / "plan.json", plan, replacements, weights=made.weights)
    for name, replacement in replacements.items():
        assert (replacement.weight is not None) == (kind == "linear")
        assert not torch.equal(replacement.bias, before[name].bias)
    change_weights(loaded.model, LoadedPlan.read(tmp_path / "plan.json").changed_weights)
    with branches_replaced(loaded.model, replacements):
        assert torch.allclose(answer(loaded.model), wanted, atol=2e-5)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with distilled(fitting(tiny_loaded("llama"))) as made:
        weights = made.weights
    with raises(PlanError, "unknown-weight"):
        change_weights(tiny_loaded("llama", hidden_size=64).model, weights)
    with raises(PlanError, "unknown-weight"):
        change_weights(tiny_loaded("gpt2").model, weights)
    path, plan = tmp_path / "plan.json", PruningPlan(deletions=planned(("attention", 1, "none")))
    write_healed_plan(path, plan, {}, weights=weights)
    PruningPlan.read(path).model_copy(update={"changed_weights": 3}).write(path)
    with raises(PlanError, "other-numbers", 3, len(weights)):
        LoadedPlan.read(path)


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_beside_adapters_fitted_maps_are_trained_at_a_lower_rate(train: Any) -> None:
    cut = {DROPPED[0]: BranchReplacement(torch.zeros(32), torch.zeros(32, 32))}
    rank = 4 if train == "adapters" else None
    student = Student(tiny_loaded("llama").model, cut, train, rank)
    groups = rate_groups(student.trained, student.replacing, train)
    shares = {id(param): group["share"] for group in groups for param in group["params"]}
    by_name = {name: shares.pop(id(item)) for name, item in student.trained.items()}
    replaced = [by_name.pop(name) for name in set(student.replacing)]
    student.close()
    assert not shares
    assert len(replaced) == 2
    assert max(replaced) < 0.2 if train == "adapters" else set(replaced) == {1.0}
    assert set(by_name.values()) == {1.0}


@pytest.mark.parametrize(
    ("cause", "train", "error", "code"),
    [
        ("quantized", "all", HealingError, "quantized"),
        ("narrow", "all", HealingError, "nothing-to-train"),
        ("interrupted", "adapters", KeyboardInterrupt, ""),
    ],
)
def test_a_student_that_can_not_be_made_leaves_the_model(
    cause: str, train: Any, error: Any, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded("llama")
    kinds = kinds_of(loaded.model)
    if cause == "quantized":
        loaded.model.is_quantized = True
    elif cause == "narrow":
        loaded.model.to(torch.bfloat16)
    else:
        monkeypatch.setattr(Student, "_switch_adapters", failing_with(KeyboardInterrupt()))
    with pytest.raises(error) as caught:
        student_of(loaded, train)
    assert getattr(caught.value, "code", "") == code
    assert kinds_of(loaded.model) == kinds
    assert not any(item.requires_grad for item in loaded.model.parameters())


def training_of(asked: Fitting) -> Training:
    with distilled(asked) as made:
        return made.training


def losses_of(training: Training) -> list[float]:
    return [check.held_out_loss for check in training.checks]


def test_a_training_begins_with_folded_weights_and_keeps_them_where_it_gains_nothing() -> None:
    with distilled(fitting(tiny_loaded("llama"), learning_rate=30.0)) as made:
        bare, folded, *trained = made.training.checks
        assert (bare.tokens, folded.tokens) == (0, 0)
        assert folded.held_out_loss < bare.held_out_loss
        assert made.training.fitted_loss == folded.held_out_loss
        assert all(folded.held_out_loss <= check.held_out_loss for check in trained)
        assert {len(weight.numbers) for weight in made.weights.values()} == {1}
        places = {name.split(".")[-2] for name in made.weights}
        assert places <= {"down_proj", "o_proj", "embed_tokens"}


@pytest.mark.parametrize("replacements", ["none", "linear"])
def test_what_was_fitted_and_does_harm_is_not_begun_with(
    replacements: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Fitting.alike

    def harmful_weights(*given: Any) -> Any:
        values = folded_values(*given)
        for value in values:
            value.other = value.other + 5.0
        return values

    def harmful_maps(self: Fitting, kind: Any) -> Any:
        maps, fits = fitted(self, kind)
        for item in maps.values():
            item.weight.add_(5.0)
        return maps, fits

    monkeypatch.setattr("exporter.heal.healed.folded_values", harmful_weights)
    monkeypatch.setattr(Fitting, "alike", harmful_maps)
    with distilled(fitting(tiny_loaded("llama"), tmp_path, replacements=replacements)) as made:
        bare, harmed, *trained = losses_of(made.training)
        assert harmed > bare > min(trained)
        assert made.training.fitted_loss is None
        if replacements == "none":
            products = [weight for name, weight in made.weights.items() if "proj" in name]
            assert {len(product.numbers) for product in products} == {2}
        else:
            assert all(0 < r.weight.abs().max() < 1 for r in made.branch_replacements.values())


@pytest.mark.parametrize(
    ("losses", "stopped"),
    [
        (lambda loss, steps: float("nan") if steps == 8 else loss, "diverged"),
        (lambda loss, steps: loss * (50.0 if steps > 12 else 1.0), "diverged"),
        (lambda loss, _: loss, "tokens"),
    ],
    ids=["not finite", "only grows", "falls"],
)
def test_a_training_that_diverges_ends_with_the_best_state(
    losses: Any, stopped: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name = "_step" if "not finite" in request.node.name else "_held_out_loss"
    real = getattr(Trainer, name)
    monkeypatch.setattr(Trainer, name, lambda trainer: losses(real(trainer), trainer._state.steps))
    training = training_of(fitting(tiny_loaded("llama"), tokens=64 * 40))
    assert training.stopped_by == stopped
    assert (training.tokens < 64 * 40) == (stopped == "diverged")
    assert min(losses_of(training)) < losses_of(training)[0]


@pytest.mark.parametrize("error", [HealingError("", code="nothing-to-fold-into"), MemoryError()])
def test_what_can_not_be_folded_is_trained_all_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.heal.healed.folded_values", failing_with(error))
    training = training_of(fitting(tiny_loaded("llama")))
    assert [check.tokens > 0 for check in training.checks[:2]] == [False, True]
    assert training.fitted_loss is None


def failing_with(error: BaseException) -> Any:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


@pytest.mark.parametrize(("scale", "full"), [(1, False), (60, True)])
def test_the_rate_is_lower_where_answers_are_near(scale: float, full: bool) -> None:
    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight *= scale
    training = training_of(fitting(loaded, learning_rate=None))
    begins = min(check.held_out_loss for check in training.checks if not check.tokens)
    assert (begins > 0.2) is full
    wanted = 1e-3 * min(1.0, (begins / 0.2) ** 0.5)
    assert training.learning_rate == pytest.approx(wanted, rel=1e-6)
    # Held-out text takes a small part of the tokens.
    assert sum(check.tokens > 0 for check in training.checks) == 3


def test_a_training_that_gains_nothing_ends_early_but_not_while_the_rate_is_high() -> None:
    training = training_of(fitting(tiny_loaded("llama"), tokens=64 * 400, learning_rate=1e-7))
    assert (training.stopped_by, training.learning_rate) == ("no_gain", 1e-7)
    assert 0.5 <= training.tokens / (64 * 400) < 0.95


def test_the_time_is_kept_with_the_last_check_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def take(seconds: float, name: str) -> None:
        def run(trainer: Trainer) -> Any:
            now[0] += seconds
            return real(trainer)

        real = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, run)

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(f"{TRAINING}._PATIENCE", 100)
    monkeypatch.setattr(f"{TRAINING}.time", clock)
    take(1.0, "_step")
    take(4.0, "_held_out_loss")
    asked = fitting(tiny_loaded("llama"), tokens=10**6, time_s=60.0, learning_rate=1e-3)
    training = training_of(asked)
    assert training.stopped_by == "time"
    assert training.checks[-1].tokens == training.tokens < 10**6
    assert 59.0 <= training.seconds <= 61.0


@pytest.mark.parametrize("how", ["never finite", "too high a rate"])
def test_a_training_that_gains_nothing_is_refused_and_leaves_the_model(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded("llama")
    before = answer(loaded.model)
    if how == "never finite":
        monkeypatch.setattr(Trainer, "_held_out_loss", lambda _: float("nan"))
    result = fitting(loaded, learning_rate=30.0, train="all")
    with raises(HealingError, "healing-gained-nothing"), distilled(result):
        pass
    assert torch.equal(answer(loaded.model), before)


@pytest.mark.parametrize("kind", ["distill", "fold"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to …")])
def test_short_memory_says_what_needs_less(
    error: Exception, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_step", failing_with(error))
    monkeypatch.setattr("exporter.heal.folded.refitted", failing_with(error))
    changed = fitting(tiny_loaded("llama"))
    if kind == "fold":
        changed = replace(changed, options=HealOptions(kind="fold"))
    with raises(HealingError, "out-of-memory", "batch_size"), _made(changed):
        pass
