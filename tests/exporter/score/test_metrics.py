"""Each metric against plain computations that store every activation, and what has no score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport, Score
from exporter.errors import CalibrationError, OptionError, ScoringError, UnknownArchitectureError
from exporter.models.residual_stream import LayerStates, first_tensor
from exporter.score.metric import changes, cosine, ratio
from exporter.score.options import ScoreOptions
from exporter.score.registry import METRICS
from exporter.score.scoring import score, score_on
from tests.exporter.plain_scores import KINDS, stored
from tests.raising import raises
from tests.tiny_models import hook_count, made_text, random_text, skipped, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@contextmanager
def _kept(*hooks: tuple[Any, Any]) -> Iterator[dict[str, list[Any]]]:
    """What hooks make of a module's arguments and output, by names of theirs, in turn."""
    kept: dict[str, list[Any]] = defaultdict(list)

    def keep(make: Any) -> Any:
        def hook(_module: Any, args: Any, output: Any) -> None:
            for name, value in make(args, first_tensor(output)).items():
                kept[name].append(value)

        return hook

    handles = [module.register_forward_hook(keep(make)) for module, make in hooks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _parallel(model: Any, ids: Any) -> dict[str, list[Any]]:
    """Both branches are compared with what enters."""
    layers = model.gpt_neox.layers
    hooks = [(layer, lambda args, out: {"in": args[0], "out": out}) for layer in layers]
    hooks += [(layer.attention, lambda _, out: {"attention": out}) for layer in layers]
    hooks += [(layer.mlp, lambda _, out: {"mlp": out}) for layer in layers]
    with _kept(*hooks) as seen, torch.no_grad():
        model(torch.from_numpy(ids))
    branches = {kind: zip(seen["in"], seen[kind], strict=True) for kind in KINDS[:2]}
    pairs = {kind: [(x, x + f) for x, f in branch] for kind, branch in branches.items()}
    return pairs | {"block": list(zip(seen["in"], seen["out"], strict=True))}


def _post_norm(model: Any, ids: Any) -> dict[str, list[Any]]:
    """With the sum before the norm."""
    layers = model.encoder.layer
    hooks = [(model.embeddings.LayerNorm, lambda _, out: {"entering": out})]
    hooks += [(layer.attention.output.LayerNorm, lambda args, out: {"sum": args[0], "mid": out})
              for layer in layers]  # fmt: skip
    hooks += [(layer.output.LayerNorm, lambda args, out: {"end": args[0], "entering": out})
              for layer in layers]  # fmt: skip
    with _kept(*hooks) as seen, torch.no_grad():
        model(torch.from_numpy(ids))
    entering = seen["entering"]
    return {
        "attention": list(zip(entering[:3], seen["sum"], strict=True)),
        "mlp": list(zip(seen["mid"], seen["end"], strict=True)),
        "block": list(pairwise(entering)),
    }


def _middle(name: str) -> Any:
    """Layers whose second norm reads the stream between the sublayers."""
    return lambda model, ids: stored(model, ids, name)


def _plain(metric: str, x: Any, y: Any) -> float:
    x, y = x.double(), y.double()
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    at_tokens = {
        "cosine": 1 - cosine,
        "angular": cosine.acos() / torch.pi,
        "angular-last": cosine[:, -1:].acos() / torch.pi,
        "relative-l2": (y - x).norm(dim=-1) / x.norm(dim=-1),
        "relative-magnitude": (y - x).norm(dim=-1) / y.norm(dim=-1),
    }
    return float(at_tokens[metric].mean())


STREAM = ("cosine", "angular", "angular-last", "relative-l2", "relative-magnitude")
ANSWERS = ("kl", "perplexity")
TEXT = (*STREAM, *ANSWERS)
Table = dict[tuple[int, str], float]


def _scores(report: ImportanceReport) -> dict[str, list[Score]]:
    further = report.further
    return {report.metric: report.scores, **further}


def _table(report: ImportanceReport, metric: str) -> Table:
    return {(s.layer, s.kind): s.score for s in _scores(report)[metric]}


@pytest.mark.parametrize(
    ("model_type", "states"),
    [
        *(
            (name, _middle("post_attention_layernorm"))
            for name in ("llama", "qwen3_moe", "granite")
        ),
        ("gemma2", _middle("pre_feedforward_layernorm")),
        ("gpt_neox", _parallel),
        ("bert", _post_norm),
    ],
)
def test_metrics_of_the_stream(model_type: str, states: Any) -> None:
    loaded, text = tiny_loaded(model_type), random_text()
    report = score_on(loaded, text, metrics=STREAM, batch_size=2)
    pairs = states(loaded.model, text.input_ids)
    for metric in STREAM:
        result = _table(report, metric)
        for kind, layer in product(KINDS, range(3)):
            # float32 dot products; no angle here is below a hundredth.
            plain = _plain(metric, *pairs[kind][layer])
            assert result[layer, kind] == pytest.approx(plain, abs=1e-6)
        assert min(result.values()) > 1e-3
    assert hook_count(loaded.model) == 0


def test_a_zero_state_counts_as_moved_by_its_own_length_and_as_turned() -> None:
    lengths, of = torch.tensor([2.0, 3.0, 0.0]).double(), torch.tensor([4.0, 0.0, 0.0]).double()
    assert ratio(lengths, of).tolist() == [0.5, 1.0, 0.0]
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    result = map(cosine, changes(LayerStates(0, zero, one, one, 2 * one, zero, zero)))
    pairs = ((zero, one), (one, 2 * one), (zero, zero))
    for got, (x, y) in zip(result, pairs, strict=True):
        expected = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)
        torch.testing.assert_close(got, expected.double(), atol=1e-6, rtol=0)


def test_bfloat16_is_scored_in_float32() -> None:
    exact, rough, text = tiny_loaded("llama"), tiny_loaded("llama"), random_text(8, 16)
    rough.model.to(torch.bfloat16)
    tables = [_table(score_on(model, text), "cosine") for model in (exact, rough)]
    # bfloat16 has 8 bits; a cosine must not add to their roundings.
    assert tables[1] == pytest.approx(tables[0], abs=5e-3)


@pytest.mark.parametrize("positions", [1, 2])
def test_answers_are_compared_with_each_sublayer_skipped(positions: int) -> None:
    loaded, text = tiny_loaded("llama"), random_text(3, 12)
    report = score_on(
        loaded, text, metrics=ANSWERS, blocks=True, kl_positions=positions, batch_size=2
    )
    ids = torch.from_numpy(text.input_ids)
    targets = ids[:, 1:][:, ::positions, None]

    def log_p() -> Any:
        with torch.no_grad():
            logits = loaded.model(ids).logits[:, :-1:positions]
        return logits.double().log_softmax(-1)

    whole = log_p()
    for name in _table(report, "kl"):
        with skipped(loaded.model, [name]):
            cut = log_p()
        kl = (whole.exp() * (whole - cut)).sum(-1).mean()
        increase = (whole - cut).gather(-1, targets).mean()
        # float32 logits.
        assert _table(report, "kl")[name] == pytest.approx(float(kl), abs=1e-6)
        assert _table(report, "perplexity")[name] == pytest.approx(float(increase), abs=1e-6)


def test_blocks_are_skipped_only_when_asked_for() -> None:
    loaded, text = tiny_loaded("llama"), random_text()
    plain = score_on(loaded, text, metrics=ANSWERS)
    assert {kind for _, kind in _table(plain, "kl")} == {"attention", "mlp"}
    result = _table(score_on(loaded, text, metrics=ANSWERS, blocks=True), "kl")
    assert result.items() > _table(plain, "kl").items()


def test_all_at_once_are_what_each_is_alone() -> None:
    loaded, text = tiny_loaded("llama"), random_text()
    together = _scores(score_on(loaded, text, metrics=list(METRICS), seed=3))
    assert list(together) == list(METRICS)
    for metric, scores in together.items():
        alone = score_on(loaded, text, metrics=[metric], seed=3)
        assert alone.further == {}
        assert alone.scores == scores


def test_padding_does_not_count() -> None:
    """A padded batch scores as its samples do alone, weighted by what they count."""
    loaded = tiny_loaded("llama")
    long, short = random_text(1, 12).input_ids, random_text(1, 7, seed=1).input_ids
    padded = np.concatenate([long, np.pad(short, ((0, 0), (0, 5)))])
    mask = np.arange(12)[None] < np.array([[12], [7]])
    together, unmasked, *alone = (
        score_on(loaded, text, metrics=TEXT, kl_positions=1)
        for text in (made_text(padded, mask), made_text(padded), made_text(long), made_text(short))
    )
    own = {"angular-last": [1, 1], "kl": [11, 6], "perplexity": [11, 6]}
    for metric in TEXT:
        tables, whole = [_table(report, metric) for report in alone], _table(unmasked, metric)
        for name, value in _table(together, metric).items():
            values = [table[name] for table in tables]
            expected = np.average(values, weights=own.get(metric, [12, 7]))
            # Another attention kernel runs where there is padding.
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert max(abs(whole[name] - v) for name, v in _table(together, metric).items()) > 1e-4


def test_depth_drops_the_deepest_first() -> None:
    table = _table(score_on(tiny_loaded("llama"), random_text(), metrics=["depth"]), "depth")
    assert table == {(layer, kind): 2.0 - layer for layer in range(3) for kind in KINDS}


def test_random_is_seeded() -> None:
    loaded, text = tiny_loaded("llama"), random_text()
    one, same, other = (score_on(loaded, text, metrics=["random"], seed=seed) for seed in (1, 1, 2))
    assert one.scores == same.scores
    assert one.scores != other.scores
    assert len({item.score for item in one.scores}) == 9
    assert all(item.std_error is None for item in one.scores)


def test_what_reads_no_text_needs_none() -> None:
    # This model has neither a tokenizer nor a head that could sample text.
    report = score(tiny_loaded("bert"), ScoreOptions(("depth", "random")))
    assert (report.metric, report.calibration.tokens) == ("depth", 0)
    with raises(CalibrationError, "no-tokenizer", "bert"):
        score(tiny_loaded("bert"), ScoreOptions(("depth", "cosine")))


def test_large_activations_that_cancel_stay_exact() -> None:
    """The last layer takes back what the first put there, 20,000 times the rest."""
    loaded, text = tiny_loaded("llama"), random_text()
    with torch.no_grad():
        first, last = loaded.model.model.layers[0].mlp, loaded.model.model.layers[2].mlp
        last.down_proj.weight.zero_()
        bias = torch.zeros(32)
        bias[3] = 2e4
        for down, sign in ((first.down_proj, 1.0), (last.down_proj, -1.0)):
            down.bias = torch.nn.Parameter(sign * bias, requires_grad=False)
    result = _table(score_on(loaded, text), "cosine")
    pairs = stored(loaded.model, text.input_ids, "post_attention_layernorm")
    plain = {(n, kind): _plain("cosine", *pairs[kind][n]) for n, kind in result}
    assert plain[2, "mlp"] > 0.5
    assert result == pytest.approx(plain, abs=1e-6)


def test_the_standard_error_is_that_of_the_mean_over_samples() -> None:
    loaded, text = tiny_loaded("llama"), random_text(6)
    reports = [score_on(loaded, made_text(row[None])) for row in text.input_ids]
    single = [_table(report, "cosine") for report in reports]
    for item in score_on(loaded, text).scores:
        values = [table[item.layer, item.kind] for table in single]
        assert item.std_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(6), rel=1e-3)
    assert all(s.std_error is None for s in reports[0].scores)


def _with(model: Any, change: str) -> None:
    """Spoils a tiny Llama."""
    if change == "nan":
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")


def _text(change: str) -> Any:
    """Spoils a text."""
    text = random_text(3)
    mask = np.ones(text.input_ids.shape, dtype=bool)
    if change == "padding":
        mask[1] = False
    elif change in ("64", "-1"):
        text.input_ids[2, 5] = int(change)
    elif change == "single":
        return made_text(text.input_ids[:, :1])
    return made_text(text.input_ids, mask)


@pytest.mark.parametrize(
    ("family", "change", "metric", "error", "code", "fields"),
    [
        ("llama", "", "cosin", OptionError, "option-value", ["metrics", "'cosin'"]),
        *(("bert", "", metric, ScoringError, "no-next-token", ["BertModel"]) for metric in ANSWERS),
        *(("llama", "single", metric, ScoringError, "no-tokens", []) for metric in ANSWERS),
        ("bloom", "", "cosine", UnknownArchitectureError, "unknown-family", ["BloomForCausalLM"]),
        ("llama", "nan", "kl", ScoringError, "not-finite", [0]),
        ("llama", "padding", "cosine", CalibrationError, "padding-only", [1]),
        *(
            ("llama", token, "cosine", CalibrationError, "token-out-of-range", [token, 2, 64])
            for token in ("64", "-1")
        ),
    ],
)
def test_what_can_not_be_scored_is_refused_with_where_and_what(
    family: str, change: str, metric: str, error: Any, code: str, fields: list[object]
) -> None:
    more = {"apply_residual_connection_post_layernorm": True} if family == "bloom" else {}
    loaded = tiny_loaded(family, **more)
    _with(loaded.model, change)
    with raises(error, code, *fields):
        score_on(loaded, _text(change), metrics=[metric])
    assert hook_count(loaded.model) == 0
