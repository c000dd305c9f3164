"""What distillation gives back, on texts and tasks that nothing was trained on.

Run it with ``python -m tests.benchmarks.bench_distill --calibrate FILE --calibrate chat``: texts to
train on, alike much of each. ``--judge FILE`` (several) and CPython's documentation topics, the
half that no training reads, are judged on; ``DEPTHCUT_TEXTS``, a folder with ``valid.txt`` and
``test.txt``, serves for both where no file is named. ``--tasks FOLDER`` adds ``--items`` of each
task there. Attentions (``--drop 8``) or blocks (``--drop 7b``) of SmolLM2 go in the order of the
paper's cosine.

Printed for each text: perplexity of the whole, the cut and the healed model, and the excess, which
is the healed model's increase in log-perplexity over the cut one's, with its 95 % interval
over samples. For each task: right answers, and the mean log-probability of the right
answer against the others, and which share of what was lost there is back. Targets: excess at most
0.05 in the domain and 0.30 in others (8 attentions, 250k tokens), 0.30 and 0.60 (8, 40k), 0.08 and
0.22 (15, 250k); 75 % of the log-probability that 15 attentions lose. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.compare.intervals import mean_interval
from tests.benchmarks.bench_healing import default_model
from tests.benchmarks.machine import print_machine

KEPT_BYTES = 3 << 30


def main() -> None:
    """Prints a table for each number of dropped branches."""
    options = _options()
    if not options.calibrate or not options.judge:
        print("Left out: no text files. See tests/benchmarks/bench_distill.py.")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    print_machine("torch", "transformers", "peft")
    for drop in [None] if options.plan else options.drop:
        _table(options, drop)


def _table(options: argparse.Namespace, drop: str | None) -> None:
    from exporter.heal.healed import heal
    from exporter.models.changed_weights import weights_changed
    from exporter.models.loading.model_source import load_model
    from exporter.progress import Quiet

    class Lines(Quiet):
        def say(self, message: str) -> None:
            print("   ", message, flush=True)

    loaded = load_model(options.model or default_model())
    plan = planned(loaded, options.calibrate[0], drop) if drop else _bare(options.plan)
    began = time.perf_counter()
    healed = heal(loaded, plan, _heal_options(options), work=options.keep, progress=Lines())
    minutes = (time.perf_counter() - began) / 60
    print(f"\ndropped {plan.describe()}; healed in {minutes:.1f} min, texts and checks included")
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"peak memory of the process, with its libraries: {peak_gb:.2f} GB")
    meters = measures(loaded, options)
    cut = healed.branch_replacements
    whole, bare = ({name: measure(each) for name, measure in meters.items()} for each in ({}, cut))
    with weights_changed(loaded.model, healed.weights):
        after = {name: measure(cut) for name, measure in meters.items()}
    for name in meters:
        print(_line(name, whole[name], bare[name], after[name]), flush=True)


def planned(loaded: Any, text: str, drop: str) -> PruningPlan:
    """The paper's choice: the lowest cosine scores on the first text."""
    from exporter.score import ScoreOptions, score

    kind = "block" if drop.endswith("b") else "attention"
    report = score(loaded, ScoreOptions(calibration=(text,), samples=20, blocks=kind == "block"))
    scores = sorted((s for s in report.scores if s.kind == kind), key=lambda s: s.score)
    chosen = scores[: int(drop.rstrip("b"))]
    return PruningPlan(deletions=[PlannedDeletion(layer=s.layer, kind=s.kind) for s in chosen])


def _bare(path: Path) -> PruningPlan:
    """A plan's deletions, without what it puts in their place."""
    return PruningPlan(
        deletions=[
            PlannedDeletion(layer=d.layer, kind=d.kind) for d in PruningPlan.read(path).deletions
        ]
    )


def _heal_options(options: argparse.Namespace) -> Any:
    from exporter.heal.options import HealOptions

    asked = {
        "tokens": options.tokens, "time_s": options.time, "train": options.train,
        "rank": options.rank, "learning_rate": options.learning_rate,
        "step_tokens": options.step_tokens, "states_weight": options.states_weight,
        "sequence_length": options.length,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    return HealOptions(
        kind="distill", calibration=tuple(options.calibrate), check_text=options.judge[0], **given
    )


def _by_document(meter: Any, text: Any, cut: Any) -> Any:
    return meter.measure(cut).by_document(text.clusters)


def measures(loaded: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What tells a cut's damage on each text, by its documents, and each task, by its items."""
    from exporter.models.ablation.choices import ChoiceMeter
    from exporter.models.ablation.meter import DamageMeter
    from exporter.models.texts.calibration import calibration_text

    found: dict[str, Any] = {}
    for spec in (*options.judge, "pydoc"):
        text = calibration_text(
            loaded, spec, samples=options.samples, sequence_length=512, part="evaluation"
        )
        meter = DamageMeter(
            loaded.model, text.input_ids, text.mask, positions=2, kept_bytes=KEPT_BYTES
        )
        found[Path(spec).name] = partial(_by_document, meter, text)
    for path in sorted(options.tasks.glob("*.jsonl")) if options.tasks else ():
        items = task_items(loaded, path, options.items)
        found[path.stem] = ChoiceMeter(loaded.model, items).measure
    return found


def task_items(loaded: Any, path: Path, count: int) -> list[Any]:
    """The last items of a task, as token ids."""
    from exporter.compare.tasks.items import read_task
    from exporter.models.ablation.choices import ChoiceItem, ChoiceRow

    def row(context: str, answer: str) -> Any:
        before = loaded.tokenizer(context).input_ids
        ids = loaded.tokenizer(context + answer).input_ids
        return ChoiceRow(tuple(before), tuple(ids[len(before) :]))

    items = read_task(path.parent, path.stem).items[-count:]
    return [ChoiceItem(tuple(row(*pair) for pair in item.pairs), item.gold) for item in items]


def _line(name: str, whole: Any, bare: Any, after: Any) -> str:
    excess = _excess(bare, after)
    told = " ".join(f"{value:.3f}" for value in (excess.value, *excess.ci95))
    if int(after.positions.max()) > 1:
        scored = f"{int(after.positions.sum()):,} tokens scored"
        kinds = f"{whole.perplexity:8.2f} {bare.perplexity:8.2f} {after.perplexity:8.2f}"
        kls = f"{bare.kl:.3f} {after.kl:.3f}"
        return f"{name:<18} {scored}: perplexity {kinds}  excess {told}  KL {kls}"
    means = [-float(each.nll_sums.mean()) for each in (whole, bare, after)]
    back = " ".join(f"{100 * (1 - value):.0f}" for value in (excess.value, *excess.ci95[::-1]))
    gain = mean_interval(bare.nll_sums - after.nll_sums, bare.positions)
    low, high = gain.ci95
    return (
        f"{name:<18} log-probability {means[0]:.3f} {means[1]:.3f} {means[2]:.3f}; back {back} %, "
        f"gain {gain.value:+.3f} [{low:+.3f}, {high:+.3f}]; same answer "
        f"{100 * bare.top1_agreement:.0f} {100 * after.top1_agreement:.0f} %"
    )


def _excess(bare: Any, after: Any) -> Any:
    """What healing leaves of a cut's loss, with its interval; both answer the same samples."""
    whole = bare.baseline_nll_sums
    return mean_interval(after.nll_sums - whole, bare.nll_sums - whole)


def _options() -> argparse.Namespace:
    texts: Mapping[str, Path] = {
        name: Path(os.environ.get("DEPTHCUT_TEXTS", "")) / f"{name}.txt"
        for name in ("valid", "test")
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibrate", action="append", default=[])
    parser.add_argument("--judge", action="append", default=[])
    parser.add_argument("--drop", nargs="+", default=["8"])
    parser.add_argument("--plan", type=Path, help="instead of --drop")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--time", type=float, help="seconds")
    parser.add_argument("--train", choices=("adapters", "all"))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--states-weight", type=float)
    parser.add_argument("--step-tokens", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="where an interrupted training is kept")
    options = parser.parse_args()
    for name, asked in (("valid", options.calibrate), ("test", options.judge)):
        if not asked and texts[name].is_file():
            asked.append(str(texts[name]))
    return options


if __name__ == "__main__":
    main()
