"""Each metric against a plain computation of its formula, alone and beside all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport, Score
from exporter.errors import CalibrationError
from exporter.models.architectures import sublayers
from exporter.models.residual_stream import first_tensor, tapped
from exporter.score import METRICS, ScoreOptions, score, score_on
from tests.raising import raises
from tests.tiny_models import hook_count, made_text, random_text, skipped, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

KINDS = ("attention", "mlp", "block")
STREAM = ("cosine", "angular", "angular-last", "relative-l2", "relative-magnitude")
ANSWERS = ("kl", "perplexity")
TEXT = (*STREAM, *ANSWERS, "taylor")
Table = dict[tuple[int, str], float]


def _scores(report: ImportanceReport) -> dict[str, list[Score]]:
    further = {metric.metric: metric.scores for metric in report.further}
    return {report.metric: report.scores, **further}


def _table(report: ImportanceReport, metric: str) -> Table:
    return {(s.layer, s.kind): s.score for s in _scores(report)[metric]}


def _states(model: Any, ids: Any) -> dict[tuple[int, str], tuple[Any, Any]]:
    """X and Y of every sublayer and block, stored, in float64."""
    from exporter.models.architectures import layer_modules

    stored: dict[tuple[int, str], tuple[Any, Any]] = {}

    def keep(states: Any) -> None:
        pairs = (
            (states.entering, states.attended),
            (states.mlp_in, states.mlp_out),
            (states.entering, states.leaving),
        )
        for kind, (x, y) in zip(KINDS, pairs, strict=True):
            stored[states.number, kind] = (x.clone().double(), y.clone().double())

    with tapped(layer_modules(model), keep), torch.no_grad():
        model(torch.as_tensor(ids))
    return stored


def _plain(metric: str, x: Any, y: Any) -> float:
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    at_tokens = {
        "cosine": 1 - cosine,
        "angular": cosine.acos() / torch.pi,
        "angular-last": cosine[:, -1:].acos() / torch.pi,
        "relative-l2": (y - x).norm(dim=-1) / x.norm(dim=-1),
        "relative-magnitude": (y - x).norm(dim=-1) / y.norm(dim=-1),
    }
    return float(at_tokens[metric].mean())


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "bert"])
def test_metrics_of_the_stream(model_type: str) -> None:
    loaded, text = tiny_loaded(model_type), random_text()
    report = score_on(loaded, text, metrics=STREAM, batch_size=2)
    stored = _states(loaded.model, text.input_ids)
    for metric in STREAM:
        result = _table(report, metric)
        for name, (x, y) in stored.items():
            # float32 dot products; no angle here is below a hundredth.
            assert result[name] == pytest.approx(_plain(metric, x, y), abs=1e-6)
        assert min(result.values()) > 1e-3


@contextmanager
def _gated(model: Any, tokens: int) -> Iterator[dict[tuple[int, str], Any]]:
    """Multiplies every contribution with a one of its own at each token."""
    from exporter.models.architectures import layer_modules

    gates: dict[tuple[int, str], Any] = {}
    handles = []

    def gate(name: tuple[int, str]) -> Any:
        gates[name] = torch.ones(tokens, 1, requires_grad=True)
        return gates[name]

    def branch(name: tuple[int, str]) -> Callable[..., Any]:
        own = gate(name)

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            new = (first_tensor(output).reshape(1, tokens, -1) * own).reshape(
                first_tensor(output).shape
            )
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def block(number: int) -> Callable[..., Any]:
        own = gate((number, "block"))

        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            new = x + (first_tensor(output) - x) * own
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    for part in sublayers(model):
        name = (part.layer, part.kind)
        handles.append(part.contribution.register_forward_hook(branch(name)))
    for modules in layer_modules(model):
        handles.append(modules.layer.register_forward_hook(block(modules.number), with_kwargs=True))
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "opt", "bloom", "mixtral"])
def test_taylor_is_the_derivative_by_a_gate_at_each_token(model_type: str) -> None:
    loaded, text = tiny_loaded(model_type), random_text(3, 10)
    result = _table(score_on(loaded, text, metrics=["taylor"]), "taylor")
    totals = dict.fromkeys(result, 0.0)
    for row in text.input_ids:
        ids = torch.from_numpy(row[None])
        with _gated(loaded.model, 10) as gates:
            logits = loaded.model(ids).logits[0, :-1].log_softmax(-1)
            loss = -logits.gather(-1, ids[0, 1:, None]).sum()
            loss.backward()
        for name, own in gates.items():
            totals[name] += float(own.grad.abs().sum()) / text.input_ids.size
    for name, expected in totals.items():
        # float32 gradients, in another order.
        assert result[name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert min(result.values()) > 1e-4
    assert hook_count(loaded.model) == 0
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


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
        assert alone.further == []
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


def test_the_last_real_token_is_the_last() -> None:
    loaded, ids = tiny_loaded("gpt_neox"), random_text(1, 7).input_ids
    right = made_text(np.pad(ids, ((0, 0), (0, 5))), np.arange(12)[None] < 7)
    alone = _table(score_on(loaded, made_text(ids), metrics=["angular-last"]), "angular-last")
    result = _table(score_on(loaded, right, metrics=["angular-last"]), "angular-last")
    assert result == pytest.approx(alone, abs=1e-6)  # float32 rounding
    unmasked = _table(
        score_on(loaded, made_text(right.input_ids), metrics=["angular-last"]), "angular-last"
    )
    assert unmasked != pytest.approx(alone, abs=1e-3)
    all_tokens = _table(score_on(loaded, right, metrics=["angular"]), "angular")
    assert all_tokens != pytest.approx(alone, abs=1e-3)


def test_a_zero_state_counts_as_moved_by_its_own_length() -> None:
    from exporter.score.metric import ratio

    lengths, of = torch.tensor([2.0, 3.0, 0.0]).double(), torch.tensor([4.0, 0.0, 0.0]).double()
    assert ratio(lengths, of).tolist() == [0.5, 1.0, 0.0]


def test_a_branch_that_adds_nothing_is_redundant_by_all_that_look() -> None:
    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.model.layers[1].self_attn.o_proj.weight.zero_()
    report = score_on(loaded, random_text(), metrics=TEXT)
    for metric in TEXT:
        table = _table(report, metric)
        # float32 rounding; a cosine of 1 minus that is an angle of its root.
        assert table[1, "attention"] == pytest.approx(0, abs=2e-6 if metric in ANSWERS else 1e-9)
        assert min(abs(table[0, "attention"]), abs(table[2, "attention"])) > 1e-3


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


def test_taylor_of_bfloat16_sums_in_float32() -> None:
    from exporter.score.metric import taylor

    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(1, 3, 500, generator=generator).bfloat16() for _ in range(2)]
    expected = (pair[0].double() * pair[1].double()).sum(-1).abs()
    # float32's rounding of 500 products; in bfloat16 itself the sums are off by a hundredth.
    torch.testing.assert_close(taylor(*pair), expected, rtol=1e-4, atol=1e-4)
    exact, rough, text = tiny_loaded("llama"), tiny_loaded("llama"), random_text()
    rough.model.to(torch.bfloat16)
    tables = [_table(score_on(m, text, metrics=["taylor"]), "taylor") for m in (exact, rough)]
    # bfloat16 has 8 bits, and gradients pass many roundings.
    assert tables[1] == pytest.approx(tables[0], rel=0.1)


def test_the_command_scores_by_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import exporter.cli as command_line

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, out = tmp_path / "model", tmp_path / "importance.json"
    tiny_loaded("llama").model.save_pretrained(model)
    call = ["score", str(model), "-o", str(out), "--samples", "2", "--sequence-length", "16", "-q"]
    metrics = ["--metric", "kl", "--metric", "cosine", "--blocks"]
    assert command_line.run([*call, *metrics]) == 0
    report = ImportanceReport.read(out)
    assert list(report.tables) == ["kl", "cosine"]
    assert {item.kind for item in report.scores} == set(KINDS)
    assert command_line.run([*call, "--metric", "gone"]) == 2
    assert ImportanceReport.read(out) == report


def test_taylor_leaves_no_gradients_in_weights_that_want_some() -> None:
    loaded, text = tiny_loaded("llama"), random_text(2)
    expected = _table(score_on(loaded, text, metrics=["taylor"]), "taylor")
    loaded.model.requires_grad_(True)
    result = _table(score_on(loaded, text, metrics=["taylor"]), "taylor")
    # The same sums in the same order.
    assert result == pytest.approx(expected, rel=1e-6)
    assert all(weight.grad is None for weight in loaded.model.parameters())
