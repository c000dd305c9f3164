"""How a training goes on and ends: its rate, its time, its loss, and what it has gained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_families import tiny_loaded

from exporter.errors import HealingError
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from distill_cases import answer, fitting  # noqa: E402

from exporter.heal.distill.distilled import distilled  # noqa: E402
from exporter.heal.distill.training import Trainer  # noqa: E402


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


def test_a_loss_that_is_never_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_held_out_loss", lambda _: float("nan"))
    asked = fitting(tiny_loaded("llama"))
    with raises(HealingError, "distillation-gained-nothing"), distilled(asked):
        pass


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


def test_a_training_that_gains_nothing_is_refused_and_leaves_the_model() -> None:
    loaded = tiny_loaded("llama")
    before = answer(loaded.model)
    with (
        raises(HealingError, "distillation-gained-nothing"),
        distilled(fitting(loaded, learning_rate=30.0, train="all")),
    ):
        pass
    assert torch.equal(answer(loaded.model), before)
