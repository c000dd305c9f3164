"""What a cut costs: tokens, choices, classes and embeddings, held against plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.figures import FIGURES
from exporter.artifacts.figures import LIMITED as GATED
from exporter.artifacts.plan_figures import LIMITED
from exporter.choose.budgets.budget import Floors
from exporter.compare import answers
from exporter.compare.accuracy import answers_of, measure_accuracy
from exporter.compare.arms import Comparison
from exporter.compare.kinds import torch_arm
from exporter.errors import PlanError, ScoringError
from exporter.gate.gate import check as check_report
from exporter.gate.limits import Limits
from exporter.heal.distill.student import Student
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.ablation.damage import (
    SIMILARITY,
    EmbeddingDamage,
    RatioSums,
    Reference,
    damage_of_numbers,
    ratio,
    ratio_std_error,
)
from exporter.models.architectures import sublayers
from exporter.models.families import FAMILIES
from exporter.models.residual_stream import first_tensor
from exporter.models.tasks import (
    MULTI_LABEL,
    Classes,
    EmbeddingReference,
    Embeddings,
    Tokens,
    task_of,
)
from exporter.models.texts.images import read_images
from exporter.models.texts.samples import batches_of
from exporter.models.texts.sources import read_texts
from tests.compared import quick
from tests.made_reports import gate_report
from tests.present import present
from tests.raising import raises
from tests.tiny_models import as_loaded, hook_count, tiny_model, write_sentence_files

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.engines.runners.pytorch import TorchRunner  # noqa: E402  it imports PyTorch

_HIDDEN = 32
_IDS = np.random.default_rng(0).integers(3, 60, (5, 12))
_MASK = np.arange(12) < np.array([12, 7, 12, 3, 9])[:, None]
_ALL = np.ones_like(_IDS, dtype=np.bool_)
_CUT: Any = {(0, "attention"): NOTHING}


def _branch_replacements() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(_HIDDEN, generator=generator) * 0.1
    weight = torch.randn(_HIDDEN, _HIDDEN, generator=generator) * 0.1
    return {
        "none": NOTHING,
        "bias": BranchReplacement(bias),
        "linear": BranchReplacement(bias, weight),
    }


def _enter(model: Any, cut: Any) -> None:
    with branches_replaced(model, cut):
        pass


def _kl(model: Any, cut: Any) -> float:
    """The whole model's and the cut one's distributions, with no part of them reused."""
    ids = torch.tensor(_IDS)
    with torch.no_grad():
        whole = model(ids).logits.log_softmax(-1)
        with branches_replaced(model, cut):
            other = model(ids).logits.log_softmax(-1)
    return float((whole.exp() * (whole - other)).sum(-1)[:, :-1].mean())


def _generating() -> list[str]:
    own_heads = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
    others = ("deberta-v2", "distilbert", "esm", "mpnet", "modernbert", "eurobert")
    pictures = ("vit", "deit", "dinov2")
    return [name for name in sorted(FAMILIES) if name not in own_heads + others + pictures]


@pytest.mark.parametrize("model_type", _generating())
def test_from_the_changed_layer_on_as_from_the_first(model_type: str) -> None:
    model, kinds = tiny_model(model_type), _branch_replacements()
    meter = Tokens(model).meter(_IDS, _ALL, batch_size=2)
    first: Any = {(0, "attention"): kinds["bias"]}
    extensions: list[Any] = [
        {(1, "attention"): kinds["none"]},
        {(1, "mlp"): kinds["none"]},
        {(2, "mlp"): kinds["bias"], (0, "mlp"): kinds["none"]},
        {(1, "attention"): kinds["linear"], (2, "mlp"): kinds["none"]},
    ]
    cuts = [{**first, **extension} for extension in extensions]
    many = meter.measure_many(first, cuts)
    for damage, cut in zip(many, [first, *cuts], strict=True):
        expected = _kl(model, cut)
        # float32 sums over the vocabulary, in another order.
        assert damage.kl == pytest.approx(expected, abs=1e-5 * max(1, expected))
        assert damage.kl > 1e-4
    assert hook_count(model) == 0


def test_only_what_is_cut_costs() -> None:
    model, none = tiny_model("llama"), {(1, "mlp"): NOTHING}
    meter = Tokens(model).meter(_IDS, _ALL)
    whole = meter.measure({})
    assert whole.kl == pytest.approx(0, abs=1e-6)  # float32 rounding
    assert whole.log_perplexity_increase == pytest.approx(0, abs=1e-6)
    assert whole.top1_agreement == 1.0
    assert whole.positions.tolist() == [11] * 5
    # A sublayer that comes back counts as changed.
    assert meter.measure_many(_CUT | none, [none])[1].kl == pytest.approx(
        _kl(model, none), abs=1e-6
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "bloom", "opt", "gpt_neox"])
def test_the_branches_own_map_changes_nothing(model_type: str) -> None:
    """A branch that is a linear map of what it reads is replaced by itself, multiplier and all."""
    model = tiny_model(model_type)
    part = sublayers(model)[3]
    seen: list[Any] = []
    first = part.reads.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    second = part.contribution.register_forward_hook(
        lambda _m, _i, output: seen.append(first_tensor(output))
    )
    with torch.no_grad():
        model(torch.tensor(_IDS))
    first.remove()
    second.remove()
    read, gave = (tensor.reshape(-1, _HIDDEN).double() for tensor in seen)
    # Fewer tokens than a norm leaves dimensions: there is a map that gives their outputs exactly.
    few = _HIDDEN - 8
    weight = torch.linalg.lstsq(read[:few], gave[:few] * part.multiplier).solution
    name: Any = (part.layer, part.kind)
    cut = {name: BranchReplacement(None, weight.T.float())}
    with branches_replaced(model, cut), torch.no_grad():
        other: list[Any] = []
        hook = part.contribution.register_forward_hook(
            lambda _m, _i, output: other.append(first_tensor(output))
        )
        model(torch.tensor(_IDS))
        hook.remove()
    fitted = other[0].reshape(-1, _HIDDEN).double()
    # The system's condition times float32's rounding.
    assert (fitted - gave)[:few].abs().max() <= 1e-3 * gave.abs().max()
    assert (fitted - gave)[few:].abs().max() >= 1e-2 * gave.abs().max()


def test_padding_is_left_out() -> None:
    model = tiny_model("llama")
    cut = {(1, "attention"): NOTHING}
    damage = Tokens(model).meter(_IDS, _MASK).measure(cut)
    assert damage.positions.tolist() == [11, 6, 11, 2, 8]
    alone = Tokens(model).meter(_IDS[1:2, :7], _ALL[:1, :7]).measure(cut)
    assert damage.kl_sums[1] == pytest.approx(alone.kl_sums[0], rel=1e-4)  # other attention kernel


def _nan(size: int) -> BranchReplacement:
    return BranchReplacement(torch.full((size,), float("nan")))


def _broken() -> Any:
    model = tiny_model("llama")
    model.model.norm.weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("measure", "kind", "code", "named"),
    [
        (lambda: _enter(tiny_model("llama"), {(9, "mlp"): NOTHING}), PlanError, "layer-missing",
         (9,)),
        (lambda: Tokens(tiny_model("llama")).meter(_IDS, _ALL).measure({(1, "mlp"): _nan(_HIDDEN)}),
         ScoringError, "not-finite", (0, "mlp 1")),
        # Not blamed on the cut.
        (lambda: Tokens(_broken()).meter(_IDS, _ALL).measure(_CUT), ScoringError, "not-finite",
         (0,)),
        (lambda: Tokens(tiny_model("llama")).meter(_IDS[:, :1], _ALL[:, :1]), ScoringError,
         "no-tokens", ()),
        (lambda: Tokens.of(tiny_model("vit")), ScoringError, "no-next-token", ()),
        (lambda: Tokens.of(tiny_model("bert")), ScoringError, "no-next-token", ()),
    ],
)  # fmt: skip
def test_what_has_no_damage_is_refused(
    measure: Any, kind: Any, code: str, named: tuple[object, ...]
) -> None:
    with raises(kind, code, *named):
        measure()


def test_tokens_that_a_model_rules_out_cost_nothing() -> None:
    cut = {(1, "mlp"): NOTHING}
    model = tiny_model("llama")
    shorter = Tokens(_without_last_token(model, drop=True)).meter(_IDS, _ALL).measure(cut)
    model = tiny_model("llama")
    masked = Tokens(_without_last_token(model, drop=False)).meter(_IDS, _ALL).measure(cut)
    assert masked.kl == pytest.approx(shorter.kl, rel=1e-4)  # float32 sums in another order
    assert masked.log_perplexity_increase == pytest.approx(
        shorter.log_perplexity_increase, rel=1e-4
    )


def _without_last_token(model: Any, *, drop: bool) -> Any:
    """Its head says nothing of the last token, or that it never comes."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        kept, last = output[..., :-1], output[..., -1:]
        return kept if drop else torch.cat([kept, torch.full_like(last, -torch.inf)], dim=-1)

    model.get_output_embeddings().register_forward_hook(hook)
    return model


def test_a_token_that_only_the_cut_model_rules_out_is_refused() -> None:
    logits = torch.zeros(1, 2, 4)
    ruled_out = logits.clone()
    ruled_out[..., 3] = -torch.inf
    mask = torch.ones(1, 2, dtype=torch.bool)
    targets = torch.zeros(1, 2, dtype=torch.int64)
    reference = Reference(logits, targets, mask)
    assert not np.isfinite(reference.damage(ruled_out).kl_sums).any()
    nan = torch.full_like(logits, torch.nan)
    assert np.isnan(reference.damage(nan).kl_sums).all()
    assert np.isnan(Reference(nan, targets, mask).damage(logits).kl_sums).all()


def _logits(model: Any) -> list[Any]:
    """Of each text by itself, without padding: ``[classes]`` or ``[tokens, classes]``."""
    with torch.no_grad():
        return [
            model(torch.tensor(ids[mask])[None]).logits[0].double()
            for ids, mask in zip(_IDS, _MASK, strict=True)
        ]


def _rows(logits: list[Any], head: str, kind: str | None) -> list[Any]:
    """Of each text what is compared: ``[positions, classes]``."""
    if head == "TokenClassification":
        return logits
    if kind == MULTI_LABEL:
        return [torch.stack([0 * logit, logit], -1) for logit in logits]
    if len(logits[0]) > 1:
        return [logit[None] for logit in logits]
    pairs = [logits[0] - logits[1], logits[2] - logits[3], logits[4]]  # in batches of two
    rows = [torch.cat([0 * pair, pair])[None] for pair in pairs]
    return [rows[0], rows[0][:0], rows[1], rows[1][:0], rows[2]]


def _expected(model: Any, cut: Any, value: Any) -> tuple[list[float], list[float]]:
    """KL divergence and agreement, summed over each text's rows."""
    whole = _rows(_logits(model), *value)
    with branches_replaced(model, cut):
        other = _rows(_logits(model), *value)
    pairs = [
        (one.log_softmax(-1), item.log_softmax(-1)) for one, item in zip(whole, other, strict=True)
    ]
    kls = [float((p.exp() * (p - q)).sum()) for p, q in pairs]
    return kls, [float((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in pairs]


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "bert"},
        {"model_type": "roberta"},
        {"model_type": "distilbert"},
        {"model_type": "modernbert"},
        {"model_type": "llama", "pad_token_id": 2},  # answers at a text's last token
        {"model_type": "llama", "pad_token_id": None},
        {"model_type": "qwen3", "pad_token_id": -1},
    ],
)
@pytest.mark.parametrize(
    ("head", "classes", "kind"),
    [
        ("SequenceClassification", 3, None),
        ("SequenceClassification", 3, MULTI_LABEL),
        ("SequenceClassification", 1, None),
        ("TokenClassification", 4, None),
    ],
)
def test_the_divergences_are_those_of_texts_alone(
    family: dict[str, Any], head: str, classes: int, kind: str | None
) -> None:
    model = tiny_model(**family, head=head, num_labels=classes, problem_type=kind)
    padding = model.config.pad_token_id
    meter = task_of(model).meter(_IDS, _MASK, batch_size=2)
    others: list[Any] = [{**_CUT, (1, "mlp"): NOTHING}, {(2, "mlp"): NOTHING}]
    for damage, cut in zip(meter.measure_many(_CUT, others), [_CUT, *others], strict=True):
        kls, same = _expected(model, cut, (head, kind))
        assert damage.kl_sums.tolist() == pytest.approx(kls, abs=1e-5)  # float32, padded in batches
        assert damage.agreements.tolist() == same
        assert damage.distance == damage.kl > 1e-5
    rows = [len(row) for row in _rows(_logits(model), head, kind)]
    assert damage.positions.tolist() == rows
    assert model.config.pad_token_id == padding


@pytest.mark.parametrize("padding", [2, None])
def test_a_student_answers_padded_texts_as_texts_alone(padding: int | None) -> None:
    model = tiny_model("llama", head="SequenceClassification", pad_token_id=padding)
    student = Student(model, {}, "all", None)
    (batch,) = batches_of(_IDS, _MASK, 5)
    with torch.no_grad():
        alone = [
            model(torch.tensor(ids[mask])[None]).logits[0]
            for ids, mask in zip(_IDS, _MASK, strict=True)
        ]
    assert torch.allclose(student.teach(batch.inputs()).given, torch.stack(alone), atol=1e-5)


def test_an_order_that_changes_is_seen_beside_a_large_bias() -> None:
    model = tiny_model("bert", head="SequenceClassification", num_labels=1)
    cut: Any = {(n, kind): NOTHING for n in range(3) for kind in ("attention", "mlp")}
    before = task_of(model).meter(_IDS[:4], _MASK[:4]).measure(cut)
    model.classifier.bias -= 50
    damage = task_of(model).meter(_IDS[:4], _MASK[:4]).measure(cut)
    assert damage.kl == pytest.approx(before.kl, rel=1e-3)  # type: ignore[attr-defined]
    assert damage.kl > 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_texts_that_a_reranker_orders_are_in_one_batch_of_any_size(
    batch_size: int, told: bool
) -> None:
    model = tiny_model("bert", head="SequenceClassification", num_labels=1)
    texts = (_IDS[:4], _MASK[:4])
    types = np.zeros_like(_IDS[:4]) if told else None
    whole, result = (
        task_of(model).meter(*texts, batch_size=size, types=types).measure(_CUT)
        for size in (4, batch_size)
    )
    assert vars(result)["positions"].tolist() == [1, 0, 1, 0]
    assert result.distance == pytest.approx(whole.distance, rel=1e-5)


KINDS: list[tuple[str, str, type[Any]]] = [
    ("bert", "", Embeddings),
    ("bert", "SequenceClassification", Classes),
    ("bert", "TokenClassification", Classes),
    ("llama", "", Tokens),
]


@pytest.mark.parametrize(("family", "head", "task"), KINDS)
def test_each_kind_of_answers_keeps_the_contract_of_a_task(
    family: str, head: str, task: type[Any]
) -> None:
    keeps_the_contract(tiny_model(family, head=head), task)


def keeps_the_contract(model: Any, task: type[Any]) -> None:
    """What every task does, of whatever kind."""
    own, kind = task_of(model), task.damage
    assert type(own) is task
    whole, cut = own.meter(_IDS, _MASK).measure_many({}, [_CUT])
    assert type(whole) is type(cut) is kind
    again = damage_of_numbers({name: var.tolist() for name, var in vars(cut).items()})
    assert type(again) is kind
    assert again.distance == cut.distance
    for objective in own.objectives:
        assert abs(whole.objective(objective)) < 1e-6
        assert abs(cut.objective(objective)) > 1e-4
    figures, worse = whole.figures(), cut.figures()
    keys = {figure.key for figure in kind.kind.figures}
    assert {*cut.sums()} == keys <= {*figures} == {*worse}
    assert worse != figures
    assert cut.words != whole.words
    assert {figure.key: figure.unchanged for figure in kind.kind.figures} == pytest.approx(
        {key: figures[key] for key in keys}, abs=1e-6
    )
    every, able = (
        [figure.limit.name for figure in one if figure.limit]
        for one in (LIMITED.values(), kind.kind.limited)
    )
    limits = Floors(**dict.fromkeys(able, 0.5))
    assert limits.of_task(own) == limits == Floors(**dict.fromkeys(every, 0.5)).of_task(own)
    assert {*kind.kind.usual} <= {*able}
    with raises(PlanError, "other-limits", *(figure.flag for figure in kind.kind.limited)):
        Floors(**dict.fromkeys({*every} - {*able}, 0.5)).of_task(own)
    inputs = {"input_ids": torch.from_numpy(_IDS), "attention_mask": torch.from_numpy(_MASK * 1)}
    mask, teacher = torch.from_numpy(_MASK), own.given(inputs).detach()
    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    assert float(own.loss(teacher, teacher, mask)) == pytest.approx(0, abs=1e-6)
    loss = own.loss(student, teacher, mask)
    loss.backward()
    distance = loss.item()
    assert distance > 1e-3
    assert student.grad.abs().sum() > 0
    assert own.loss_words(distance) != own.loss_words(0.0)
    assert own.weight(_MASK) in (len(_MASK), _MASK.sum())


_PLAIN = {"kl_divergence", "top1_agreement"}
COMPARED: list[tuple[str, str, type[Any], set[str]]] = [
    ("bert", "", answers.Embeddings, {"embedding_cosine", "lowest_cosine", "rank_agreement"}),
    ("bert", "SequenceClassification", answers.Classes, _PLAIN),
    ("bert", "TokenClassification", answers.Classes, _PLAIN),
    ("bert", "MaskedLM", answers.Tokens, _PLAIN),
    ("llama", "", answers.Tokens, _PLAIN),
    ("vit", "ImageClassification", answers.Pictures, _PLAIN),
]


@pytest.mark.parametrize(("family", "head", "kind", "keys"), COMPARED)
def test_each_kind_of_answers_keeps_the_contract_of_a_comparison(
    family: str, head: str, kind: type[Any], keys: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_JUDGED", 24)
    monkeypatch.setattr(answers, "_EMBEDDED_TEXTS", 12)
    whole, cut = (tiny_model(family, head=head) for _ in range(2))
    for weight in cut.parameters():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    read: Any = read_images if kind is answers.Pictures else read_texts
    texts = read("pydoc", part="evaluation")
    for other in (whole, cut):
        arms = {}
        for name, model in (("baseline", whole), ("candidate", other), ("third", cut)):
            runner = TorchRunner(model, compiled=False, threads=1)
            arms[name] = torch_arm(as_loaded(model, name), Path(name), runner, "torch:")
        comparison = Comparison(arms, options=quick(eval_tokens=64))
        with comparison.running():
            assert type(answers_of(comparison, texts)) is kind
            result = measure_accuracy(comparison, texts)
        accuracy = present(result.accuracy)
        assert result.grid.keys() == arms.keys()
        readings = {f.key: (f, one) for f in FIGURES for one in f.readings(accuracy)}
        assert readings.keys() == keys
        for figure, one in readings.values():
            assert (one.value == pytest.approx(figure.unchanged, abs=1e-9)) is (other is whole)
            if one.interval is not None:
                low, high = one.interval.ci95
                assert low <= one.value <= high
    report = gate_report(accuracy=accuracy)
    for key, figure in GATED.items():
        if figure.stands_in != "arm" and figure.places and key not in keys:
            (check,) = check_report(report, Limits(**{figure.limit.name: 0.5})).checks
            assert check.verdict == "inconclusive"
            assert figure.needs
            assert check.reason.endswith(figure.needs)


# deberta-v2's relative positions and esm's dropout of tokens are not of interest here.
_ENCODERS = ("bert", "roberta", "electra", "mpnet", "distilbert", "modernbert", "llama", "gpt2")


def _cosines(model: Any, cut: Any, pool: Any = lambda states: states.mean(0)) -> list[float]:
    """Text by text, without padding and with nothing reused."""
    values = []
    for ids, mask in zip(_IDS, _MASK, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            whole = pool(model.base_model(given).last_hidden_state[0].double())
            with branches_replaced(model, cut):
                other = pool(model.base_model(given).last_hidden_state[0].double())
        values.append(float(torch.cosine_similarity(whole, other, dim=0)))
    return values


@pytest.mark.parametrize("model_type", _ENCODERS)
def test_the_cosines_are_those_of_texts_alone(model_type: str) -> None:
    model = tiny_model(model_type)
    bias = BranchReplacement(torch.full((_HIDDEN,), 0.2))
    meter = Embeddings(model).meter(_IDS, _MASK, batch_size=2)
    others: list[Any] = [
        {**_CUT, (1, "mlp"): NOTHING}, {**_CUT, (2, "attention"): bias}, {(2, "mlp"): NOTHING}
    ]  # fmt: skip
    many = meter.measure_many(_CUT, others)
    for damage, cut in zip(many, [_CUT, *others], strict=True):
        # float32, padded in batches against alone
        assert damage.cosines.tolist() == pytest.approx(_cosines(model, cut), abs=1e-5)
        assert damage.cosine < 0.9999
    assert hook_count(model) == 0


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (13, 1, 1, 1)])
def test_texts_of_one_document_keep_the_means_and_widen_their_errors(sizes: Any) -> None:
    rng, documents = np.random.default_rng(0), np.repeat(np.arange(4), sizes)
    cosines = 0.9 + 0.02 * rng.normal(size=4)[documents] + 0.002 * rng.normal(size=16)
    alone = EmbeddingDamage(cosines, rng.uniform(1, 2, (16, 6)), np.ones(16))
    result = alone.by_document(np.repeat(documents, 2))  # two inputs a text
    assert len(result.cosines) == 4
    assert result.cosine == pytest.approx(alone.cosine)
    assert result.correlation == pytest.approx(alone.correlation)
    expected = ratio_std_error(cosines, np.ones(16), documents)
    assert result.std_error("cosine") == pytest.approx(expected)
    expected = ratio_std_error(alone.correlations, np.ones(16), documents)
    assert result.std_error(SIMILARITY) == pytest.approx(expected)


def _states(model: Any, cut: Any) -> Any:
    """Each text's embedding of length 1, ``[texts, hidden]``."""
    result = []
    for ids, mask in zip(_IDS, _MASK, strict=True):
        with torch.no_grad(), branches_replaced(model, cut):
            mean = model(torch.tensor(ids[mask])[None]).last_hidden_state[0].double().mean(0)
        result.append((mean / mean.norm()).numpy())
    return np.stack(result)


def test_the_correlation_is_that_of_all_pairs_similarities() -> None:
    model, cut = tiny_model("bert"), {(1, "mlp"): NOTHING}
    damage = Embeddings(model).meter(_IDS, _MASK, batch_size=2).measure(cut)  # all in one batch
    above = np.triu_indices(5, 1)
    both = [(item @ item.T)[above] for item in (_states(model, {}), _states(model, cut))]
    assert damage.correlation == pytest.approx(np.corrcoef(*both)[0, 1], abs=1e-5)  # float32
    assert damage.correlation < 0.9999
    assert Embeddings(model).meter(_IDS, _MASK).measure({}).correlation == pytest.approx(
        1, abs=1e-6
    )
    again = damage_of_numbers({name: var.tolist() for name, var in vars(damage).items()})
    assert isinstance(again, EmbeddingDamage)
    assert again.correlation == damage.correlation
    alone = Embeddings(model).meter(_IDS[:1], _MASK[:1]).measure(cut)
    assert np.isnan(alone.correlation)
    assert alone.finite.all()


def test_the_spread_of_the_correlation_is_that_of_a_jackknife() -> None:
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(rng.standard_normal((60, 8)))
    cut = whole + 0.5 * torch.from_numpy(rng.standard_normal((60, 8)))

    def measured(texts: Any) -> EmbeddingDamage:
        return EmbeddingReference(whole[texts]).damage(cut[texts])

    every = np.arange(60)
    damage, left = measured(every), [measured(every[every != n]).correlation for n in every]
    jackknife = float(np.sqrt(59 / 60 * ((np.array(left) - np.mean(left)) ** 2).sum()))
    assert damage.correlations.mean() == pytest.approx(damage.correlation)
    assert damage.std_error(SIMILARITY) == pytest.approx(jackknife, rel=0.1)


def test_states_are_pooled_as_the_model_s_folder_says(tmp_path: Path) -> None:
    model, cut = tiny_model("bert"), {(1, "mlp"): NOTHING}
    by_mean = Embeddings(model).meter(_IDS, _MASK).measure(cut)
    write_sentence_files(tmp_path, pooling={"pooling_mode": "lasttoken"})
    model.config.name_or_path = str(tmp_path)
    by_last = Embeddings(model).meter(_IDS, _MASK).measure(cut)
    assert by_last.cosines == pytest.approx(
        _cosines(model, cut, lambda states: states[-1]), abs=1e-5
    )
    assert by_last.cosines != pytest.approx(by_mean.cosines, abs=1e-3)


SUMS = np.array([3.0, 8.0, 0.0, 2.0])


@pytest.mark.parametrize(
    "weights", [[2.0, 4.0, 0.0, 1.0], [2.0, 4.0, 3.0, 1.0], [2.0, 0.0, 0.0, 0.0]]
)
def test_running_sums_have_the_standard_errors_of_all_samples_at_once(weights: list[float]) -> None:
    counts = np.array(weights)
    sums = np.where(counts > 0, SUMS, 0.0)
    running = RatioSums((1,))
    for part in (slice(0, 1), slice(1, 4)):
        running.add(sums[None, part], counts[part])
    wanted, result = ratio_std_error(sums, counts), running.std_errors
    assert running.means[0] == ratio(sums, counts)
    assert (None if result is None else pytest.approx(float(result[0]))) == wanted
