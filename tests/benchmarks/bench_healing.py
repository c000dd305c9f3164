"""What healing without training gives back, on text that nothing was fitted on.

Run it with ``python -m tests.benchmarks.bench_healing --calibrate FILE --test FILE``: text files of
one domain that share nothing, such as WikiText-2's valid and test. ``DEPTHCUT_TEXTS``, a folder
with ``valid.txt`` and ``test.txt``, serves instead. The second domain is CPython's documentation
topics, of which calibration and evaluation have a half each. With ``--tasks FOLDER`` (task files,
as in exporter/compare/tasks/items.py) the whole model and some rows answer ``--items`` of each
task, too.

Attentions of SmolLM2 are dropped in the order of the paper's cosine, scored on the calibration
file, or as a greedy search, by KL or by perplexity, chooses them with what takes their place
already there; blocks, as many as ``--blocks`` says, in the order of their cosine. Printed for each
row: the perplexity in the file's domain; the excess, which is the log of its ratio to the whole
model's over the same for cosine without replacement; its 95 % interval over samples; and the same
in the second domain. Targets: in the domain bias at most 0.45 and linear 0.20; by the
model's own samples only, linear at most 0.65 at 8 and 0.45 at 15 attentions; 7 blocks folded at
most 0.5.

Finished rows are kept in ``--keep FOLDER`` and not run again; ``--only TEXT`` runs the row of that
name, or the rows whose name has the text. Figures are printed, nothing is asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporter.compare.intervals import mean_interval
from tests.benchmarks.answers import Asked
from tests.benchmarks.healing_choice import BATCH, Choices
from tests.benchmarks.healing_rows import Row, block_rows, rows
from tests.benchmarks.kept_rows import KeptRows, short_sha256, wanted
from tests.benchmarks.machine import print_machine
from tests.benchmarks.small_model import default_model

LENGTH, AT_ONCE = 512, 4


class Bench:
    """The model, its texts, and what is computed once for several rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        from exporter.models.ablation.meter import DamageMeter
        from exporter.models.loading.model_source import load_model

        self._options = options
        self._loaded = load_model(options.model or default_model())
        self._text = cache(self._text)  # type: ignore[method-assign]
        self._order = cache(self._order)  # type: ignore[method-assign]
        self._fits = cache(self._fits)  # type: ignore[method-assign]
        domains = {"test": self._text(str(options.test), options.test_samples)}
        if options.second_samples:
            second = self._text(options.second, options.second_samples, "evaluation")
            domains["second"] = second
        self._domains = domains
        self._meters = {
            name: DamageMeter(self._loaded.model, text.input_ids, text.mask, batch_size=BATCH)
            for name, text in domains.items()
        }
        # Kept rows hold as long as these are the same.
        texts = [self._text(str(options.calibrate), 20), *domains.values()]
        about = ["by document", self._loaded.ref.sha256, *(text.ref.sha256 for text in texts)]
        self._kept = KeptRows(options.keep, about)
        self._asked = Asked(self._loaded, options.tasks, options.items) if options.tasks else None

    @cached_property
    def _choices(self) -> Choices:
        return Choices(
            self._loaded.model,
            self._order("attention"),
            lambda row: self._text(self._spec(row.sources[0]), row.samples),
            lambda row: self._fits(row.sources, row.samples, None),
            self._options.keep / self._kept.key,
        )

    def results(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What the rows' damage is in each domain, by document; from disk where it is there."""
        for row in rows:
            if row.fitted == "fold" and not self._is_kept(row):
                self._kept.keep(row.name, self._folded(row))
        new = [row for row in rows if not self._is_kept(row)]
        found: list[dict[str, Any]] = []
        cuts: list[Any] = []
        for row in new:
            began = time.perf_counter()
            cuts.append(self._cut(row))
            layers = sorted({layer for layer, _ in cuts[-1]})
            taken = time.perf_counter() - began
            found.append({"name": row.name, "dropped": layers, "fit_s": taken})
        for name, meter in self._meters.items() if new else ():
            for result, damage in zip(found, meter.measure_many({}, cuts)[1:], strict=True):
                result[name] = _numbers(damage, self._domains[name])
        for row, result, cut in zip(new, found, cuts, strict=True):
            if row.tasks and self._asked is not None:
                answers = self._asked.answers(cut)
                result["tasks"] = {task: each.right.mean() for task, each in answers.items()}
            self._kept.keep(row.name, result)
        kept = [self._kept.find(row.name) for row in rows]
        return [row for row in kept if row is not None]

    def _folded(self, row: Row) -> dict[str, Any]:
        """The same of a row that changes weights, and so shares no run with others."""
        from exporter.heal.fold_places import places_of, writers_of
        from exporter.heal.refit import refitted
        from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacements
        from exporter.models.ablation.meter import DamageMeter
        from exporter.models.architectures import layer_modules
        from exporter.models.changed_weights import swapped

        began, model, names = time.perf_counter(), self._loaded.model, self._names(row)
        layers = layer_modules(model)
        cut: BranchReplacements = dict.fromkeys(names, NOTHING)
        places, _ = places_of(model, layers, names)
        values = refitted(
            model, self._mixture(row), layers, cut, places,
            writers=writers_of(model, layers, names, places), batch_size=BATCH,
        )  # fmt: skip
        dropped = sorted({name.layer for name in names})
        taken = time.perf_counter() - began
        found: dict[str, Any] = {"name": row.name, "dropped": dropped, "fit_s": taken}
        for name, text in self._domains.items():
            meter = DamageMeter(
                model, text.input_ids, text.mask, batch_size=BATCH, within=lambda: swapped(values)
            )
            found[name] = _numbers(meter.measure(cut), text)
        return found

    def _is_kept(self, row: Row) -> bool:
        kept = self._kept.find(row.name)
        return kept is not None and ("tasks" in kept or not (row.tasks and self._options.tasks))

    def _cut(self, row: Row) -> dict[Any, Any]:
        from exporter.heal.fitting import fit_sequential
        from exporter.models.ablation.branch_replacements import NOTHING

        names = self._names(row)
        if row.fitted == "none":
            return dict.fromkeys(names, NOTHING)
        if row.compensation is not None:
            return dict(
                fit_sequential(
                    self._loaded, self._mixture(row), dict.fromkeys(names, row.fitted),
                    rank=row.rank, batch_size=BATCH, compensation=row.compensation,
                )
            )  # fmt: skip
        fits = self._fits(row.sources, row.samples, row.rank, row.kind)
        return {name: getattr(fits[name], row.fitted) for name in names}

    def _names(self, row: Row) -> list[Any]:
        """The sublayers that a row drops."""
        from exporter.models.architectures import named_sublayers

        if row.kind == "block":
            blocks = [(layer, "block") for layer in self._order("block")[: row.dropped]]
            return named_sublayers(blocks, self._loaded.ref.num_layers)
        return named_sublayers(self._choices.of(row), self._loaded.ref.num_layers)

    def _order(self, kind: str) -> list[int]:
        from exporter.score.scoring import score_on

        text = self._text(str(self._options.calibrate), 20)
        scores = score_on(self._loaded, text, batch_size=BATCH).scores
        kept = sorted((s for s in scores if s.kind == kind), key=lambda s: s.score)
        return [score.layer for score in kept]

    def _fits(
        self, sources: tuple[str, ...], samples: int, rank: int | None, kind: str = "attention"
    ) -> dict[Any, Any]:
        from exporter.heal.fit import fit_branches
        from exporter.models.architectures import named_sublayers

        layers = self._loaded.ref.num_layers
        names = named_sublayers([(layer, kind) for layer in range(layers)], layers)
        text = self._mixture(Row(0, "linear", sources, samples))
        return dict(fit_branches(self._loaded, text, names, rank=rank, batch_size=BATCH))

    def _mixture(self, row: Row) -> Any:
        from exporter.models.texts.calibration import CalibrationText

        parts = [self._text(self._spec(source), row.samples) for source in row.sources]
        # In turns, so that every source has samples among those that are held out.
        order = np.argsort(
            np.concatenate([np.arange(len(p.input_ids)) for p in parts]), kind="stable"
        )
        ids, mask = (
            np.concatenate([getattr(part, name) for part in parts])[order]
            for name in ("input_ids", "mask")
        )
        return CalibrationText(parts[0].ref, ids, mask)

    def _spec(self, source: str) -> str:
        return str(self._options.calibrate) if source == "file" else source

    def _text(self, spec: str, samples: int, part: str = "calibration") -> Any:
        from exporter.models.texts.calibration import CalibrationText, calibration_text
        from exporter.models.texts.passages import pack_tokens
        from exporter.models.texts.sources import read_texts

        if part == "calibration":
            return calibration_text(
                self._loaded, spec, samples=samples, sequence_length=LENGTH,
                cache_dir=self._options.cache,
            )  # fmt: skip
        tokenizer: Any = self._loaded.tokenizer
        ids, documents = pack_tokens(
            lambda text: tokenizer(text, add_special_tokens=False).input_ids,
            read_texts(spec, part="evaluation").units(LENGTH), sequence_length=LENGTH,
            max_samples=samples, separator_id=tokenizer.eos_token_id, by_size=True,
        )  # fmt: skip
        return CalibrationText.unpadded(ids, "pydoc", short_sha256(ids.tolist()), documents)


def _numbers(damage: Any, text: Any) -> dict[str, Any]:
    """By document of a text."""
    damage = damage.by_document(text.clusters)
    return {f.name: getattr(damage, f.name).tolist() for f in dataclasses.fields(damage)}


def told(result: dict[str, Any], base: dict[str, Any]) -> str:
    """A row's line."""
    parts = [f"{result['name']:<46}"]
    for name in (name for name in ("test", "second") if name in result):
        excess, damage = excess_of(result[name], base[name]), result[name]
        perplexity = np.exp(np.sum(damage["nll_sums"]) / np.sum(damage["positions"]))
        low, high = excess.ci95
        parts.append(f"{perplexity:7.2f} {excess.value:6.3f} [{low:.3f}, {high:.3f}]")
    parts.append(f"fitted in {result['fit_s']:.0f} s")
    tasks = result.get("tasks", {})
    return "  ".join([*parts, *(f"{name} {100 * value:.1f} %" for name, value in tasks.items())])


def excess_of(row: dict[str, Any], base: dict[str, Any]) -> Any:
    """A row's rise of the log-perplexity over that of cosine without replacement."""
    whole = np.array(row["baseline_nll_sums"])
    return mean_interval(*(np.array(each["nll_sums"]) - whole for each in (row, base)))


def main() -> None:
    """Prints the table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    options = _options()
    if not (options.calibrate.is_file() and options.test.is_file()):
        print("Left out: no text files. See tests/benchmarks/bench_healing.py.")
        return
    print_machine("torch", "transformers")
    bench = Bench(options)
    print(
        "each row: perplexity, excess and its interval on the test file, then in the second domain"
    )
    (whole,) = bench.results([Row(0, "none", tasks=True)])
    tables = [rows(dropped) for dropped in options.dropped]
    for table in [*tables, *(block_rows(dropped) for dropped in options.blocks)]:
        base, *others = table
        chosen = wanted(others, options.only)
        (none,) = bench.results([base])
        print(told(whole, none), told(none, none), sep="\n", flush=True)
        for start in range(0, len(chosen), AT_ONCE):
            for result in bench.results(chosen[start : start + AT_ONCE]):
                print(told(result, none), flush=True)


def _options() -> argparse.Namespace:
    texts = Path(os.environ.get("DEPTHCUT_TEXTS", ""))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibrate", type=Path, default=texts / "valid.txt")
    parser.add_argument("--test", type=Path, default=texts / "test.txt")
    parser.add_argument("--second", default="pydoc")
    parser.add_argument("--test-samples", type=int, default=20)
    parser.add_argument("--second-samples", type=int, default=10)
    parser.add_argument("--dropped", type=int, nargs="*", default=[8, 15])
    parser.add_argument("--blocks", type=int, nargs="*", default=[])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--keep", type=Path, default=Path("out/bench/healing"))
    parser.add_argument("--cache", type=Path, help="where sampled text is kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
