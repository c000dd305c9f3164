"""A healing for which memory may not suffice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_families import tiny_loaded

from exporter.errors import HealingError
from exporter.heal.options import HealOptions
from tests.heard import Heard
from tests.raising import raises, tells

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from distill_cases import DROPPED, fitting  # noqa: E402

from exporter.heal import memory as module  # noqa: E402
from exporter.heal.distill.student import Student, trained_numbers  # noqa: E402
from exporter.heal.healed import _made  # noqa: E402
from exporter.heal.memory import needed_bytes, warn_of_memory  # noqa: E402
from exporter.models.ablation.branch_replacements import NOTHING  # noqa: E402

DISTILL = HealOptions(kind="distill", step_tokens=64, sequence_length=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "train"),
    [("llama", "adapters"), ("llama", "all"), ("gpt2", "adapters"), ("mixtral", "adapters"),
     ("bert", "all")],
)  # fmt: skip
def test_as_many_numbers_are_trained_as_is_said(family: str, train: Any, dtype: str) -> None:
    if (train, dtype) == ("all", "bfloat16"):
        pytest.skip("weights of 16 bits are not trained themselves")
    model = tiny_loaded(family).model.to(getattr(torch, dtype))
    rank = 4 if train == "adapters" else None
    said = trained_numbers(model, DROPPED, train, rank)
    assert said <= trained_numbers(model, [], train, rank)
    student = Student(model, dict.fromkeys(DROPPED, NOTHING), train, rank)
    assert said == sum(each.numel() for each in student.trained.values())
    student.close()


def test_what_is_needed_grows_with_what_it_hangs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda _: False)
    model = tiny_loaded("llama").model
    usual = needed_bytes(model, DISTILL, 10**6)
    assert needed_bytes(model, DISTILL, 2 * 10**6) - usual == 20 * 10**6
    assert needed_bytes(model, replace(DISTILL, step_tokens=128), 10**6) > usual
    fold = needed_bytes(model, HealOptions(kind="fold"), 0)
    assert 0 < fold < usual
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda _: True)
    assert needed_bytes(model, DISTILL, 10**6) < usual


@pytest.mark.parametrize("options", [HealOptions(kind="fold"), DISTILL])
@pytest.mark.parametrize(("free", "is_warned"), [(1, True), (1 << 50, False), (None, False)])
def test_little_memory_is_one_warning(
    options: HealOptions, free: int | None, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: free)
    heard = Heard()
    warn_of_memory(tiny_loaded("llama").model, options, 100, heard)
    assert [tells(line, "batch_size 2") for line in heard.lines] == [True] * is_warned
    assert all(("step_tokens" in line) == options.trains for line in heard.lines)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory.")])
def test_a_fold_for_which_memory_runs_out_says_what_needs_less(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refitted(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("exporter.heal.folded.refitted", refitted)
    asked = fitting(tiny_loaded("llama"))
    fold = replace(asked, options=HealOptions(kind="fold"))
    with raises(HealingError, "out-of-memory", "batch_size"), _made(fold):
        pass
