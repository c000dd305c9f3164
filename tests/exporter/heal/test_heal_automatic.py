"""Which way of healing is taken, where the machine or the command decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from exporter.cli.export import export
from exporter.heal.options import HealOptions
from tests.tiny_models import tiny_loaded

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from exporter.heal.automatic import USUAL_TIME_S, in_turn, settled  # noqa: E402


@pytest.mark.parametrize(
    ("free_bytes", "rate", "kind"),
    [(1 << 40, 1e12, "distill"), (1 << 10, 1e12, "fold"), (1 << 40, 1.0, "fold")],
)
def test_what_a_machine_can_not_afford_is_not_trained(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, rate: float, kind: str
) -> None:
    monkeypatch.setattr("exporter.heal.memory.available_bytes", lambda: free_bytes)
    monkeypatch.setattr("exporter.heal.automatic._RATES", {"cpu": rate, "cuda": rate})
    heal_options = HealOptions(kind="auto", tokens=1000)
    result = settled(heal_options, tiny_loaded("llama"))
    assert result.kind == kind
    assert result.time_s == (USUAL_TIME_S if kind == "distill" else None)
    assert result.tokens == (1000 if kind == "distill" else HealOptions().tokens)


@pytest.mark.parametrize(("family", "tokens"), [("llama", 200_000), ("bert", 600_000)])
@pytest.mark.parametrize("kind", ["auto", "distill"])
def test_a_training_has_the_tokens_of_its_models_kind(
    monkeypatch: pytest.MonkeyPatch, family: str, tokens: int, kind: Any
) -> None:
    monkeypatch.setattr("exporter.heal.memory.available_bytes", lambda: 1 << 40)
    monkeypatch.setattr("exporter.heal.automatic._RATES", {"cpu": 1e14, "cuda": 1e14})
    loaded = tiny_loaded(family)
    assert settled(HealOptions(kind=kind), loaded).tokens == tokens
    assert settled(HealOptions(kind=kind, tokens=5), loaded).tokens == 5
    assert in_turn(HealOptions(kind=kind), loaded)[0].tokens == tokens


def test_what_auto_takes_next_is_asked_for_with_options_that_it_has() -> None:
    heal_options = HealOptions(kind="auto", tokens=1000, replacements="linear", rank=4)
    loaded = tiny_loaded("llama")
    assert [item.kind for item in in_turn(replace(heal_options, kind="distill"), loaded)] == [
        "distill"
    ]
    _, folded, best = in_turn(heal_options, loaded)
    assert (folded.kind, folded.replacements, folded.rank) == ("fold", "linear", 16)
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
