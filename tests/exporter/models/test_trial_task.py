"""A trial: a kind of answers that the code doesn't know, in one file, from scores to a verdict.

Tags of words (token classification). The code counts every token; here a token counts where the
whole model tags it as something, that is, not with class 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

import exporter as depthcut
from exporter.artifacts.figures import FIGURES
from exporter.artifacts.plan_figures import LIMITED, PLAN_KINDS, PlanFigure, PlanKind
from exporter.choose.budgets.budget import Budget, SearchOptions
from exporter.choose.budgets.settings import PlanSettings
from exporter.compare import accuracy
from exporter.compare.agreement import class_rows
from exporter.compare.answers import Distributed, Pair
from exporter.compare.arms import Comparison
from exporter.compare.evaluation import EvaluationTokens, tokenize_passages
from exporter.models import tasks
from exporter.models.ablation import damage
from exporter.models.ablation.damage import DistributionDamage, Sums
from exporter.models.residual_stream import class_logits
from exporter.models.tasks import Task
from exporter.models.texts.sources import TextSource, read_texts
from tests.compared import quick
from tests.exporter.models.test_damage import keeps_the_contract
from tests.present import present
from tests.tiny_models import skipped, tiny_model, tiny_tokenizer, write_words

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.models.ablation.losses import answer_loss  # noqa: E402  it imports PyTorch

# What plans say.

TAGS = PlanKind(
    (
        PlanFigure(
            "tag_kl", "KL divergence of the tags", "KL of tags, nats", "{:.3f} nats".format,
            "{:.3f}".format, "{:+.4f} nats".format,
        ),
        LIMITED["top1_agreement"],
    ),
    "divergence", 4,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TagDamage(DistributionDamage):
    kind = TAGS

    def sums(self) -> dict[str, Sums]:
        kl, same = super().sums().values()
        return {"tag_kl": kl, "top1_agreement": same}

    @property
    def distance(self) -> float:
        return self.value("tag_kl")


# In PyTorch: scores, searches and healing.


class TagReference:
    """The whole model's tags of a batch, ``[batch, tokens, classes]``, and which of them count."""

    def __init__(self, logits: Any, mask: Any) -> None:
        self._log_p = logits.double().log_softmax(-1)
        self._counts = mask & (self._log_p.argmax(-1) != 0)
        self.nbytes = self._log_p.numel() * self._log_p.element_size()
        self.is_finite = bool(self._log_p[mask].isfinite().all())

    def damage(self, logits: Any) -> TagDamage:
        log_q = logits.double().log_softmax(-1)
        kl = (self._log_p.exp() * (self._log_p - log_q)).sum(-1)
        same = log_q.argmax(-1) == self._log_p.argmax(-1)
        values = (torch.ones_like(kl), kl, same.double())
        kept = (torch.where(self._counts, value, 0.0).sum(-1).numpy() for value in values)
        return TagDamage(*kept)


class Tags(Task[TagDamage]):
    learns, runs, objectives = "classes", "all", ("kl",)
    damage = TagDamage

    @staticmethod
    def fits(model: Any) -> bool:
        return type(model).__name__.endswith("ForTokenClassification")

    def reference(self, answers: Any, batch: Any, positions: int) -> TagReference:
        return TagReference(answers, batch.mask_on(answers.device))

    def given(self, inputs: Any) -> Any:
        return class_logits(self.model, inputs)

    def loss(self, student: Any, teacher: Any, mask: Any) -> Any:
        return answer_loss(student, teacher, mask)

    def weight(self, mask: Any) -> float:
        return float(mask.sum())


# Of any arms: comparisons, reports and gates.


class TaggedWords(Distributed):
    def __init__(self, drawn: EvaluationTokens) -> None:
        super().__init__("tags of", drawn.source, drawn.sha256, len(drawn.ids), drawn.documents)
        self._drawn = drawn

    @classmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        classes = comparison.whole.folder.config.get("architectures", [""])
        if not classes[0].endswith("ForTokenClassification") or comparison.tokenizer is None:
            return None
        return cls(tokenize_passages(texts, comparison.tokenizer, most=64, longest=32))

    def answer(self, name: str, runner: Any, sample: int) -> Any:
        return class_rows(runner, self._drawn.ids[sample], f"The {name}'s logits")

    def take(self, sample: int, answers: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
        counts = answers[pairs[0][0]].argmax(axis=1) != 0
        super().take(sample, {name: rows[counts] for name, rows in answers.items()}, pairs)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the kind into the tables, before what takes its models otherwise."""
    monkeypatch.setitem(PLAN_KINDS, "tags", TAGS)
    monkeypatch.setattr(damage, "DAMAGES", [TagDamage])
    monkeypatch.setattr(tasks, "TASKS", [Tags, *tasks.TASKS])
    monkeypatch.setattr(accuracy, "KINDS", [TaggedWords, *accuracy.KINDS])


@pytest.mark.usefixtures("known")
def test_it_keeps_the_contract_of_all_kinds() -> None:
    keeps_the_contract(tiny_model("bert", head="TokenClassification"), Tags)


def _tags(model: Any, texts: Sequence[Any], dropped: Any) -> tuple[Any, Any]:
    """Both models' log-probabilities, text by text, where the whole one says something."""
    whole, cut = [], []
    for ids in texts:
        given = torch.tensor(np.asarray(ids))[None]
        with torch.no_grad():
            rows = model(given).logits[0].double().log_softmax(-1)
            with skipped(model, dropped):
                others = model(given).logits[0].double().log_softmax(-1)
        says = rows.argmax(-1) != 0
        whole.append(rows[says])
        cut.append(others[says])
    return torch.cat(whole), torch.cat(cut)


@pytest.mark.usefixtures("known", "exports_once")
def test_from_scores_to_a_verdict(tmp_path: Path) -> None:
    folder, text = tmp_path / "model", write_words(tmp_path / "a.txt", 880, seed=0, each=(14, 30))
    tiny_model("bert", head="TokenClassification", num_labels=3).save_pretrained(folder)
    tiny_tokenizer(special_ends=True).save_pretrained(folder)
    model = depthcut.load_model(str(folder))
    how = depthcut.ScoreOptions(calibration=(text,), samples=20, sequence_length=40)
    depthcut.score_model(model, how).write(tmp_path / "importance.json")
    plan = depthcut.make_plan(
        depthcut.PlanRequest(
            importance=tmp_path / "importance.json", output=tmp_path / "plan.json",
            budget=Budget(joint=1), settings=PlanSettings(search=SearchOptions(search="greedy")),
        )
    )  # fmt: skip
    assert {"tag_kl", "top1_agreement"} <= {*plan.predicted}
    depthcut.write_onnx(model, tmp_path / "whole")
    depthcut.prune_file(tmp_path / "whole" / "model.onnx", tmp_path / "cut" / "model.onnx", plan)
    other = write_words(tmp_path / "b.txt", 400, seed=1, each=(14, 30))
    report = depthcut.compare_models(tmp_path / "whole", tmp_path / "cut", quick(eval_text=other))
    read, tokenizer = read_texts(other, part="evaluation"), folder / "tokenizer.json"
    words = tokenize_passages(read, tokenizer, most=64, longest=32).ids
    whole, cut = _tags(model.model, words, plan.deletions)
    judged = present(report.accuracy)
    assert judged.tokens == len(whole) < sum(map(len, words))
    kl = float((whole.exp() * (whole - cut)).sum(-1).mean())
    assert judged.kl_divergence == pytest.approx(kl, rel=1e-3)  # float32 of two runtimes
    same = float((whole.argmax(-1) == cut.argmax(-1)).double().mean())
    assert judged.top1_agreement == pytest.approx(same)
    there = {figure.key for figure in FIGURES if any(figure.readings(judged))}
    assert {"kl_divergence", "top1_agreement"} <= there
    depthcut.write_reports(report, tmp_path / "report")
    assert "same top-1" in (tmp_path / "report" / "report.md").read_text()
    for limits, verdict in (
        ({"min_top1_agreement": 0.01}, "within_limit"),
        ({"max_kl": 1e-9}, "regressed"),
        ({"max_perplexity_increase": 0.1}, "inconclusive"),
    ):
        assert depthcut.check_report(report, depthcut.Limits(**limits)).verdict == verdict
