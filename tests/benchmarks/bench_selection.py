"""How much better than one-shot cosine the searches choose, on text that none of them has seen.

Run it with ``python -m tests.benchmarks.bench_selection --calibrate FILE --test FILE``: text files
of one domain that share nothing, such as WikiText-2's valid and test. ``DEPTHCUT_TEXTS``, a folder
with ``valid.txt`` and ``test.txt``, serves instead. The second domain is the evaluation half of
CPython's documentation topics. Printed is, for each
way of choosing and each number of attentions, the excess log-perplexity (the log of the cut model's
perplexity over the whole one's), and its ratio to one-shot cosine's with a 95 % interval over
samples of 512 tokens. The target is a ratio of at most 0.75 on the test file.

It takes hours of one core. What is finished lies in ``--keep FOLDER``: run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.inputs import Workplace
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.selection.search_options import SearchOptions
from exporter.compare.intervals import mean_interval
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.damage import Damage, joined
from exporter.models.ablation.meter import DamageMeter
from exporter.models.texts.calibration import CalibrationText
from tests.benchmarks.small_model import default_model

WAYS: dict[str, dict[str, Any]] = {
    "one-shot cosine": {"search": "one-shot"},
    "greedy kl": {"search": "greedy", "objective": "kl"},
    "greedy perplexity": {"search": "greedy", "objective": "perplexity"},
}
BASE = "one-shot cosine"
LENGTH, CHUNK, BATCH = 512, 4, 4


class Told:
    """Prints what a search decides."""

    def __init__(self) -> None:
        from exporter.progress import Quiet

        self.task = Quiet().task

    def say(self, message: str) -> None:
        print(message, flush=True)

    detail = say


class Bench:
    """The model, and the folder that keeps what is finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        from exporter.models.loading.model_source import load_model

        self.options, self.keep = options, options.keep
        self.keep.mkdir(parents=True, exist_ok=True)
        self.loaded = load_model(options.model or default_model())
        self.report = self._report()

    def _report(self) -> ImportanceReport:
        from exporter.score import ScoreOptions, score

        path = self.keep / "importance.json"
        if not path.exists():
            score(self.loaded, ScoreOptions(calibration=(str(self.options.calibrate),))).write(path)
        return ImportanceReport.read(path)

    def plan(self, way: str, number: int, most: int) -> PruningPlan:
        """One row's choice; where choices only grow, the first of the longest one's."""
        plan = self._searched(way, most)
        return plan.model_copy(update={"deletions": plan.deletions[:number]})

    def _searched(self, way: str, number: int) -> PruningPlan:
        o = self.options
        path = self.keep / f"{way} {number} {o.tokens} {o.shortlist}.json".replace(" ", "-")
        if not path.exists():
            print(f"{way}, {number} attentions", flush=True)
            search = SearchOptions(**WAYS[way], tokens=o.tokens, shortlist=o.shortlist)
            planner = Planner(
                self.report,
                lambda: self.loaded,
                Budget(attention=number),
                PlanSettings(search),
                work=Workplace(self.keep / f"searched-{o.tokens}"),
                progress=Told(),
            )
            planner.plan().plan.write(path)
        return PruningPlan.read(path)

    def damages(self, domain: str, spec: str, cuts: dict[str, Any]) -> dict[str, Damage]:
        """Of each cut, by a text's documents; a few samples at a time, each kept."""
        path = self.keep / f"damage-{domain}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = {(told["chunk"], told["cut"]): told["damage"] for told in map(json.loads, lines)}
        ids, documents = self._samples(spec)
        clusters = CalibrationText.unpadded(ids, spec, "", documents).clusters
        for chunk, start in enumerate(range(0, len(ids), CHUNK)):
            missing = {key: cut for key, cut in cuts.items() if (chunk, key) not in kept}
            if not missing:
                continue
            samples = ids[start : start + CHUNK]
            meter = DamageMeter(
                self.loaded.model, samples, np.ones_like(samples, dtype=bool), batch_size=BATCH
            )
            _, *found = meter.measure_many({}, list(missing.values()))
            with path.open("a") as out:
                for key, damage in zip(missing, found, strict=True):
                    kept[chunk, key] = {
                        f.name: getattr(damage, f.name).tolist() for f in fields(Damage)
                    }
                    out.write(json.dumps(
                        {"chunk": chunk, "cut": key, "damage": kept[chunk, key]}
                    ) + "\n")  # fmt: skip
            print(f"{domain}: {start + len(samples)} of {len(ids)} samples", flush=True)
        chunks = range(-(-len(ids) // CHUNK))
        parts = {key: [_damage(kept[chunk, key]) for chunk in chunks] for key in cuts}
        return {key: joined(each).by_document(clusters) for key, each in parts.items()}

    def _samples(self, spec: str) -> Any:
        """Token ids, and of which document each sample is."""
        from exporter.models.texts.passages import pack_tokens
        from exporter.models.texts.sources import read_texts

        def encode(text: str) -> list[int]:
            ids: list[int] = self.loaded.tokenizer(text, add_special_tokens=False).input_ids
            return ids

        return pack_tokens(
            encode,
            read_texts(spec, part="evaluation").units(LENGTH),
            sequence_length=LENGTH,
            max_samples=self.options.test_tokens // LENGTH,
            separator_id=self.loaded.tokenizer.eos_token_id,
            by_size=True,
        )


def _damage(numbers: dict[str, list[float]]) -> Damage:
    return Damage(**{name: np.asarray(values) for name, values in numbers.items()})


def _excess(damage: Damage) -> Any:
    return damage.nll_sums - damage.baseline_nll_sums


def table(number: int, found: dict[str, Damage]) -> Iterator[str]:
    """A line for each way."""
    base = found[BASE]
    for way, damage in found.items():
        excess, error = damage.log_perplexity_increase, damage.log_perplexity_increase_std_error
        ratio = mean_interval(_excess(damage), _excess(base))
        assert ratio is not None
        yield (
            f"{number:>3} {way:<22} perplexity {damage.perplexity:8.1f}  excess {excess:.3f} "
            f"± {error or 0.0:.3f}  KL {damage.kl:.3f}  ratio "
            f"{ratio.value:.2f} [{ratio.ci95[0]:.2f}, {ratio.ci95[1]:.2f}]"
        )


def main() -> None:
    """Prints the tables of both domains."""
    texts = Path(os.environ.get("DEPTHCUT_TEXTS", ""))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibrate", type=Path, default=texts / "valid.txt")
    parser.add_argument("--test", type=Path, default=texts / "test.txt")
    parser.add_argument("--second", default="pydoc")
    parser.add_argument("--keep", type=Path, default=Path("out/bench/selection"))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--dropped", type=int, nargs="+", default=[8, 15])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shortlist", type=int, default=12)
    parser.add_argument("--test-tokens", type=int, default=20_480)
    options = parser.parse_args()
    if not (options.calibrate.is_file() and options.test.is_file()):
        print(f"Left out: no {options.calibrate} or {options.test}. See {Path(__file__).name}.")
        return
    bench = Bench(options)
    ways = list(dict.fromkeys([BASE, *options.ways.split(",")]))
    numbers = options.dropped
    plans = {(n, way): bench.plan(way, n, max(numbers)) for n in numbers for way in ways}
    cuts = {pair: _cut(plan) for pair, plan in plans.items()}
    for domain, spec in (("test", str(options.test)), ("second", options.second)):
        damages = bench.damages(domain, spec, {_key(cut): cut for cut in cuts.values()})
        whole = next(iter(damages.values())).baseline_perplexity
        print(f"\n{domain}: {spec}, unpruned perplexity {whole:.1f}")
        for number in numbers:
            found = {way: damages[_key(cuts[number, way])] for way in ways}
            print("\n".join(table(number, found)), flush=True)
    for (number, way), plan in plans.items():
        print(f"{number:>3} {way:<22} {plan.describe()}")


def _cut(plan: PruningPlan) -> dict[Any, Any]:
    return {(d.layer, d.kind): NOTHING for d in plan.deletions}


def _key(cut: dict[Any, Any]) -> str:
    return " ".join(f"{kind}:{layer}" for layer, kind in sorted(cut))


if __name__ == "__main__":
    main()
