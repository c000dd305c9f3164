"""Costs of a PyTorch model's branches."""

from __future__ import annotations

import pytest

from exporter.choose.costs.measuring import CostSettings, Effort, measure_on, torch_runner
from exporter.choose.costs.table import RequestShape
from exporter.choose.costs.weighing import module_sizes
from exporter.errors import UsageError
from tests.raising import raises
from tests.tiny_models import family_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_costs_are_foretold_by_runs_of_the_loaded_model(family: str) -> None:
    runner = torch_runner(family_loaded(family))
    table = measure_on(runner, CostSettings(RequestShape(1, 4, 1), threads=1, seconds=0.1))
    assert table.backend == "pytorch"
    assert table.names == sorted(runner.sizes.sublayers)
    assert all(0 <= table.saved_ms(name) < table.baseline_ms for name in table.names)
    attention = runner.sizes[0, "attention"]
    assert attention.kv_bytes(8) == 8 * attention.kv_bytes(1) > 0
    assert runner.sizes.rest.parameters > 0  # what makes the answers


def test_of_experts_those_count_that_a_token_takes() -> None:
    experts, router = 4 * (256 * 96 + 96 * 128), 4 * 96  # 2 of 4 are taken
    own = module_sizes(family_loaded("mixtral"))[1, "mlp"]
    assert own.used(1) == (experts / 2 + router, 4 * (experts / 2 + router))
    assert own.used(2) == (experts / 2 + router, 4 * (experts + router))


def test_variants_of_a_loaded_model_are_refused() -> None:
    settings = CostSettings(RequestShape(1, 4, 1), threads=1, seconds=0.1, variants=Effort(0.1))
    with raises(UsageError, "no-variants"):
        measure_on(torch_runner(family_loaded("llama")), settings)
