"""The scores against a plain computation that stores every activation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport
from exporter.errors import UnknownArchitectureError
from exporter.progress import Quiet
from exporter.score import ScoreOptions, score, score_on
from tests.exporter.plain_scores import largest_difference, plain_scores, stored, table
from tests.raising import raises
from tests.tiny_models import hook_count, made_text, random_text, tiny_loaded


@pytest.mark.torch
@pytest.mark.parametrize(
    ("model_type", "middle"),
    [
        ("llama", "post_attention_layernorm"),
        ("qwen3_moe", "post_attention_layernorm"),
        ("gemma2", "pre_feedforward_layernorm"),
        ("granite", "post_attention_layernorm"),
    ],
)
def test_scores_equal_the_plain_computation(model_type: str, middle: str) -> None:
    loaded, text = tiny_loaded(model_type), random_text()
    report = score_on(loaded, text, batch_size=2)
    expected = plain_scores(stored(loaded.model, text.input_ids, middle))
    assert largest_difference(table(report), expected) <= 1e-6
    assert min(expected["attention"]) > 1e-3
    assert hook_count(loaded.model) == 0


@pytest.mark.torch
def test_a_parallel_layer_compares_both_with_what_enters() -> None:
    import torch

    loaded, text = tiny_loaded("gpt_neox"), random_text()
    seen: dict[str, list[Any]] = {"in": [], "attention": [], "mlp": [], "out": []}
    handles = []
    for layer in loaded.model.gpt_neox.layers:
        hooks = [
            layer.register_forward_pre_hook(lambda _m, args: seen["in"].append(args[0])),
            layer.attention.register_forward_hook(
                lambda _m, _i, output: seen["attention"].append(output[0])
            ),
            layer.mlp.register_forward_hook(lambda _m, _i, output: seen["mlp"].append(output)),
            layer.register_forward_hook(
                lambda _m, _i, out: seen["out"].append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
        handles += hooks
    with torch.no_grad():
        loaded.model(torch.from_numpy(text.input_ids))
    for handle in handles:
        handle.remove()
    branches = {kind: zip(seen["in"], seen[kind], strict=True) for kind in ("attention", "mlp")}
    pairs = {kind: [(x, x + f) for x, f in branch] for kind, branch in branches.items()}
    pairs["block"] = list(zip(seen["in"], seen["out"], strict=True))
    assert largest_difference(table(score_on(loaded, text)), plain_scores(pairs)) <= 1e-6


@pytest.mark.torch
def test_a_post_norm_layer_compares_with_the_sum_before_the_norm() -> None:
    import torch

    loaded, text = tiny_loaded("bert"), random_text()
    layers = loaded.model.encoder.layer
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _m, args, output: seen.update({f"{name}_in": args[0], f"{name}_out": output})

    handles = [loaded.model.embeddings.LayerNorm.register_forward_hook(keep("embeddings"))]
    for number, layer in enumerate(layers):
        norms = {"a": layer.attention.output.LayerNorm, "m": layer.output.LayerNorm}
        handles += [m.register_forward_hook(keep(f"{n}{number}")) for n, m in norms.items()]
    with torch.no_grad():
        loaded.model(torch.from_numpy(text.input_ids))
    for handle in handles:
        handle.remove()
    entering = [seen["embeddings_out"], *(seen[f"m{n}_out"] for n in range(3))]
    pairs = {
        "attention": [(entering[n], seen[f"a{n}_in"]) for n in range(3)],
        "mlp": [(seen[f"a{n}_out"], seen[f"m{n}_in"]) for n in range(3)],
        "block": [(entering[n], entering[n + 1]) for n in range(3)],
    }
    assert largest_difference(table(score_on(loaded, text)), plain_scores(pairs)) <= 1e-6


@pytest.mark.torch
def test_large_activations_that_cancel_stay_exact() -> None:
    """The last layer takes back what the first put there, 20,000 times the rest."""
    import torch

    loaded, text = tiny_loaded("llama"), random_text()
    with torch.no_grad():
        first, last = loaded.model.model.layers[0].mlp, loaded.model.model.layers[2].mlp
        last.down_proj.weight.zero_()
        bias = torch.zeros(32)
        bias[3] = 2e4
        for down, sign in ((first.down_proj, 1.0), (last.down_proj, -1.0)):
            down.bias = torch.nn.Parameter(sign * bias, requires_grad=False)
    report = score_on(loaded, text)
    expected = plain_scores(stored(loaded.model, text.input_ids, "post_attention_layernorm"))
    assert expected["mlp"][2] > 0.5
    assert largest_difference(table(report), expected) <= 1e-6


@pytest.mark.torch
def test_the_standard_error_is_that_of_the_mean_over_samples() -> None:
    loaded, text = tiny_loaded("llama"), random_text(6)
    report = score_on(loaded, text)
    single = [table(score_on(loaded, made_text(row[None]))) for row in text.input_ids]
    for item in report.scores:
        values = [table[item.kind][item.layer] for table in single]
        assert item.std_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(6), rel=1e-3)
    assert all(s.std_error is None for s in score_on(loaded, random_text(1)).scores)


@pytest.mark.torch
def test_a_layout_that_does_not_add_up_is_refused() -> None:
    loaded = tiny_loaded("bloom", apply_residual_connection_post_layernorm=True)
    with raises(UnknownArchitectureError, "not-additive", "BloomForCausalLM"):
        score_on(loaded, random_text())


@pytest.mark.torch
def test_ctrl_c_leaves_no_hook() -> None:
    loaded = tiny_loaded("llama")

    class Interrupting(Quiet):
        def task(self, description: str, total: int | None = None, unit: str = "") -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_on(loaded, random_text(), progress=Interrupting())
    assert hook_count(loaded.model) == 0


@pytest.mark.torch
def test_bfloat16_is_scored_in_float32() -> None:
    import torch

    exact, text = tiny_loaded("llama"), random_text(8, 16)
    rough = tiny_loaded("llama")
    rough.model.to(torch.bfloat16)
    tables = [table(score_on(loaded, text)) for loaded in (exact, rough)]
    # bfloat16 keeps 8 bits; the cosine itself must not add to that.
    assert largest_difference(*tables) <= 5e-3


@pytest.mark.torch
def test_the_report_says_what_it_was_made_from(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama")
    report = score(loaded, ScoreOptions(samples=3, sequence_length=16), cache_dir=tmp_path)
    assert report.metric == "cosine"
    assert report.model == loaded.ref
    assert report.calibration.source.startswith("self")
    assert (report.calibration.samples, report.calibration.tokens) == (3, 48)
    assert [(s.layer, s.kind) for s in report.scores[:4]] == [
        (0, "attention"), (0, "mlp"), (0, "block"), (1, "attention"),
    ]  # fmt: skip
    assert len(report.scores) == 9
    path = report.write(tmp_path / "importance.json")
    assert ImportanceReport.read(path) == report


@pytest.mark.torch
def test_a_zero_state_has_cosine_zero_as_in_pytorch() -> None:
    import torch
    from torch.nn.functional import cosine_similarity

    from exporter.models.residual_stream import LayerStates
    from exporter.score.metric import changes, cosine

    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    result = map(cosine, changes(LayerStates(0, zero, one, one, 2 * one, zero, zero)))
    pairs = ((zero, one), (one, 2 * one), (zero, zero))
    for got, (x, y) in zip(result, pairs, strict=True):
        expected = 1 - cosine_similarity(x, y, dim=-1)
        torch.testing.assert_close(got, expected.double(), atol=1e-6, rtol=0)
