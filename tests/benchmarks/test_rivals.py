"""Each rival's formula on a model of a few thousand weights, against what its paper promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.choose.budgets.limits import searched_meter
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET
from tests.benchmarks.rivals.methods import METHODS
from tests.benchmarks.rivals.patching import (
    Moments,
    _estimators,
    bound,
    linear_patch,
    nbl,
    prune_and_comp,
    replace_me,
    rotation_of,
)
from tests.benchmarks.rivals.work import (
    WHOLE,
    Candidate,
    Workplace,
    between_layers,
    layer_states,
    span_distances,
)
from tests.tiny_models import tiny_loaded

pytestmark = pytest.mark.torch

LAYERS, LENGTH = 5, 24


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return _workplace(tiny_loaded("llama", num_hidden_layers=LAYERS), tmp_path_factory.mktemp("w"))


def _workplace(loaded: Any, folder: Path) -> Workplace:
    ids = np.random.default_rng(0).integers(4, 64, (8, LENGTH))
    text = CalibrationText.unpadded(ids, "random", "0" * 64)
    meter = searched_meter(loaded, text.rows(slice(0, 2)))
    return Workplace(loaded, "random", text, text, meter, 2, folder, 1000, QUIET)


def _blocks(candidate: Any) -> list[int]:
    layers = {layer for layer, _ in candidate.cut}
    assert set(candidate.cut) == {(n, kind) for n in layers for kind in ("attention", "mlp")}
    return sorted(layers)


def _output(work: Workplace, candidate: Any) -> Any:
    """What the last layer gives, ``[samples, tokens, hidden]``."""
    import torch

    result = layer_states(work.model, work.text, candidate)
    return torch.cat([states[-1].output for states in result])


def test_block_influence_is_that_of_the_models_own_hidden_states(work: Workplace) -> None:
    import torch

    ids = torch.from_numpy(work.text.input_ids)
    with torch.inference_mode():
        states = work.model(ids, output_hidden_states=True).hidden_states
    for span in (1, 3):
        array = span_distances(work.model, work.text, span)
        assert len(array) == LAYERS - span + 1
        for first in range(LAYERS - span):  # the last of these states is behind the model's norm
            pair = states[first].double(), states[first + span].double()
            expected = 1 - torch.cosine_similarity(*pair, dim=-1).mean()
            assert array[first] == pytest.approx(float(expected), rel=1e-5)


def test_sleb_takes_each_time_the_block_of_the_lowest_perplexity(work: Workplace) -> None:
    def without(layers: list[int]) -> float:
        cut = {(n, kind): NOTHING for n in layers for kind in ("attention", "mlp")}
        return work.meter.measure_many(cut, [])[0].perplexity  # type: ignore[arg-type]

    first = min(range(LAYERS), key=lambda n: without([n]))
    second = min(set(range(LAYERS)) - {first}, key=lambda n: without([first, n]))
    assert _blocks(METHODS["blocks", "SLEB"](work, 2)) == sorted([first, second])


def test_the_factor_at_the_gap_is_that_of_all_weights_before_it(work: Workplace) -> None:
    """Prune&Comp folds it into the embedding and the products that write to the stream."""
    import torch

    candidate = prune_and_comp(work, 1)
    (layer,) = _blocks(candidate)
    factor = candidate.patches[layer].factor
    assert float(factor) != pytest.approx(1.0, abs=1e-3)
    parameters = dict(work.model.named_parameters())
    written = ["model.embed_tokens.weight"]
    for n in range(layer):
        written += [f"model.layers.{n}.{p}.weight" for p in ("self_attn.o_proj", "mlp.down_proj")]
    weights = {name: parameters[name].data * factor.float() for name in written}
    folded = Candidate(candidate.cut, weights=weights)
    torch.testing.assert_close(
        _output(work, folded), _output(work, candidate), rtol=2e-3, atol=2e-3
    )
    bare = _output(work, Candidate(candidate.cut))
    assert float((bare - _output(work, candidate)).abs().max()) > 0.05


def test_the_patch_brings_rotated_channels_to_their_size(work: Workplace) -> None:
    import torch

    candidate = linear_patch(work, 2)
    first, last = _blocks(candidate)
    assert last == first + 1
    assert first > 0
    (patch,) = candidate.patches.values()
    assert list(candidate.patches) == [last]
    assert patch.is_matrix
    torch.testing.assert_close(patch.factor, patch.factor.T)
    rotation = torch.from_numpy(rotation_of(32)).float()
    scales = rotation.T @ patch.factor @ rotation
    torch.testing.assert_close(scales, torch.diag(scales.diag()), rtol=0, atol=1e-5)
    ratios = []
    for states in layer_states(work.model, work.text):
        stream = [tensor @ rotation for tensor in between_layers(states)]
        ratios.append(stream[last + 1].abs().mean(1) / stream[first].abs().mean(1))
    torch.testing.assert_close(scales.diag(), torch.cat(ratios).mean(0), rtol=1e-4, atol=1e-5)


def test_the_folded_map_is_the_least_squares_one(work: Workplace) -> None:
    import torch

    result = replace_me(work, 2)
    first, last = _blocks(result)
    (name,) = result.weights
    assert name == f"model.layers.{first - 1}.mlp.down_proj.weight"
    assert last == first + 1

    def error(candidate: Candidate) -> float:
        """How far the stream behind the gap is from the whole model's, in the mean of squares."""

        pairs = zip(
            layer_states(work.model, work.text, candidate),
            layer_states(work.model, work.text, WHOLE),
            strict=True,
        )
        gaps = [
            (between_layers(a)[last + 1] - between_layers(b)[last + 1]).square().mean()
            for a, b in pairs
        ]
        return float(torch.stack(gaps).mean())

    best = error(result)
    assert best < 0.9 * error(Candidate(result.cut))
    noise = torch.randn(result.weights[name].shape, generator=torch.Generator().manual_seed(0))
    for step in (1e-2, -1e-2):
        other = {name: result.weights[name] + step * noise}
        assert error(Candidate(result.cut, weights=other)) > best


def test_the_bound_is_none_for_a_linear_branch_and_all_of_it_for_a_random_one() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(4000, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    linear, random, half = Moments(6), Moments(6), Moments(6)
    linear.add(x, x @ torch.randn(6, 6, generator=generator, dtype=torch.float64))
    random.add(x, other)
    half.add(x, x + other)  # noise of the same size: each correlation squared is 1/2
    assert bound(*linear.covariances()) == pytest.approx(0.0, abs=1e-4)
    assert bound(*random.covariances()) == pytest.approx(6.0, abs=0.1)
    assert bound(*half.covariances()) == pytest.approx(3.0, abs=0.15)


def test_nbl_replaces_the_attentions_of_the_lowest_bound_by_maps(work: Workplace) -> None:
    import torch

    candidate = nbl(work, 2)
    bounds = [estimator.bound for estimator in _estimators(work)]
    layers = sorted(np.argsort(bounds)[:2].tolist())
    assert sorted(candidate.cut) == [(layer, "attention") for layer in layers]
    assert sorted(candidate.patches) == layers
    # The error of least squares is orthogonal to what the map reads, and has no mean.
    patch = candidate.patches[layers[0]]
    states = [state[layers[0]] for state in layer_states(work.model, work.text)]
    x = torch.cat([state.entering for state in states]).flatten(0, 1)
    error = torch.cat([state.attended for state in states]).flatten(0, 1) - patch(x)
    assert float((error.T @ x).abs().max()) < 1e-3 * float((x.T @ x).abs().max())
    assert float(error.mean(0).abs().max()) < 1e-4
