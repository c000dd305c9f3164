"""How much memory a healing is said to take, part by part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_families import tiny_loaded

from exporter.errors import HealingError
from exporter.heal.options import HealOptions
from graph_passes.types import SublayerRef
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from distill_cases import DROPPED, fitting, text  # noqa: E402

from exporter.heal import memory as module  # noqa: E402
from exporter.heal.distill.distilled import distilled  # noqa: E402
from exporter.heal.distill.student import Student, trained_numbers  # noqa: E402
from exporter.heal.fold import memory as folding  # noqa: E402
from exporter.heal.fold.folded import folded_values  # noqa: E402
from exporter.heal.memory import KEPT_BYTES, healing_memory, that_fits  # noqa: E402
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


@pytest.mark.parametrize(
    ("family", "tied", "expected"),
    [
        ("llama", True, 2 * 48 * 32),  # a product for each branch that is dropped
        ("llama", False, 2 * 32 * 32 + 2 * 48 * 32 + 64 * 32),  # all kept ones, and the embedding
        ("gpt2", True, None),
        ("gpt2", False, None),
    ],
)
def test_folded_weights_take_no_more_than_is_said(
    family: str, tied: bool, expected: int | None
) -> None:
    loaded = tiny_loaded(family, tie_word_embeddings=tied)
    asked = fitting(loaded)
    said = healing_memory(loaded.model, asked.options, 0, DROPPED)
    values = folded_values(asked, text(40))
    found = sum(each.other.numel() * each.other.element_size() for each in values)
    assert 0 < found <= said.folded
    assert expected is None or said.folded == 4 * expected


def test_what_behind_norms_is_not_folded_takes_nothing() -> None:
    model = tiny_loaded("bert").model
    said = healing_memory(model, DISTILL, 100, DROPPED)
    assert (said.folded, said.folding) == (0, 0)
    assert said.measuring == 4 * model.num_parameters(exclude_embeddings=True)
    assert said.total == said.weights + max(said.training, said.measuring)


def test_only_trainings_that_begin_with_folded_weights_fold() -> None:
    model = tiny_loaded("llama").model
    for changed in ({"train": "all"}, {"replacements": "bias"}):
        said = healing_memory(model, replace(DISTILL, **changed), 100, DROPPED)
        assert (said.folded, said.folding) == (0, 0)
    assert healing_memory(model, DISTILL, 100, DROPPED).folding > 0
    fold = healing_memory(model, HealOptions(kind="fold"), 0, DROPPED)
    assert fold.folding > 0
    assert fold.training == 0


def test_each_part_grows_with_what_it_hangs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda _: False)
    model = tiny_loaded("llama").model
    vocabulary = model.config.vocab_size

    def said(trained: int = 100, held_out: int = 0, options: Any = DISTILL, again: int = 0) -> Any:
        return healing_memory(model, options, trained, DROPPED, held_out=held_out, read_again=again)

    usual = said()
    assert usual.weights == 4 * model.num_parameters()
    assert usual.total == usual.weights + usual.folded + max(
        usual.folding, usual.training, usual.measuring
    )
    assert said(trained=200).training - usual.training == 20 * 100
    assert said(held_out=50).training - usual.training == 50 * vocabulary * 4
    assert said(again=50).training == said(held_out=50).training
    assert said(held_out=10**12).training - usual.training == KEPT_BYTES
    longer = said(options=replace(DISTILL, step_tokens=128))
    assert longer.training - usual.training == usual.training - 20 * 100
    more = said(options=replace(DISTILL, batch_size=8))
    merged = 4 * model.num_parameters(exclude_embeddings=True)
    assert more.measuring - merged == 2 * (usual.measuring - merged)
    assert more.folding > usual.folding
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda _: True)
    assert 2 * (said().training - 20 * 100) == usual.training - 20 * 100


@pytest.mark.parametrize("more", [0, -1])
def test_a_fold_that_needs_more_than_is_free_is_refused(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fitting(tiny_loaded("llama"))
    said = healing_memory(asked.loaded.model, asked.options, 0, DROPPED, held_out=0)
    free = said.folded + said.folding + more
    monkeypatch.setattr(folding, "available_bytes", lambda: free)
    if more < 0:
        with raises(HealingError, "out-of-memory", "--sequence-length"):
            folded_values(asked, text(40))
        with distilled(asked) as made:
            assert made.training is not None
            assert made.training.fitted_loss is None
    else:
        assert folded_values(asked, text(40))


@pytest.mark.parametrize(
    ("free", "expected"), [(10**9, (512, 512, 4, 16)), (300, (256, 256, 2, 8)), (10, None)]
)
def test_what_would_fit_is_half_as_much_or_less(free: int, expected: Any) -> None:
    asked = HealOptions(kind="distill")
    found = that_fits(asked, lambda options: options.step_tokens, free)
    assert (found is None) == (expected is None)
    if found is not None:
        sizes = found.step_tokens, found.sequence_length, found.batch_size, found.used_rank
        assert sizes == expected


def test_what_is_not_known_of_the_cut_is_taken_at_its_most() -> None:
    model = tiny_loaded("llama", tie_word_embeddings=True).model
    one = healing_memory(model, DISTILL, 100, [SublayerRef(1, "attention")])
    assert healing_memory(model, DISTILL, 100).folded > one.folded


SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M, float32": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B, bfloat16": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B, bfloat16": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*SHAPES])
def test_the_page_has_the_estimates_for_models_of_three_sizes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models have no weights, so their products are found by their names."""
    import transformers

    def by_name(model: Any, parts: Any) -> Any:
        last = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
        paths = {p.ref: f"model.layers.{p.layer}.{last[p.kind]}" for p in parts}
        return {ref: (path, model.get_submodule(path)) for ref, path in paths.items()}

    monkeypatch.setattr(folding, "products_of", by_name)
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda _: True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[name]))
    model.to(getattr(torch, name.split(", ")[1]))
    options, cut = HealOptions(kind="distill"), [SublayerRef(n, "attention") for n in range(2, 10)]
    trained = trained_numbers(model, cut, "adapters", 16)
    said = healing_memory(model, options, trained, cut)
    parts = (
        said.weights, said.folded, said.folding, said.training, said.measuring, said.total,
    )  # fmt: skip
    page = Path(__file__).parents[3] / "exporter/docs/healing.md"
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| {name} |")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [f"{n / 1e9:.1f}" for n in parts]


def test_a_healing_of_one_phase_is_told_to_its_end() -> None:
    alone = module.HealingMemory(1 << 30, 0, 0, 0, 0)
    assert alone.told().endswith("changes")
    assert not replace(alone, training=1 << 30).told().endswith("changes")
