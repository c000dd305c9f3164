"""depthcut beside published ways of cutting depth: one model, one text, the same sublayers to go.

Run it with ``make rivals``, or ``python -m tests.benchmarks.bench_rivals --calibrate FILE --test
FILE``: text files of one domain that share nothing, such as WikiText-2's valid and test.
``DEPTHCUT_TEXTS``, a folder with ``valid.txt`` and ``test.txt``, serves instead. All methods choose
and fit on the first file; the second domain is the evaluation half of CPython's documentation.

Methods and rows are in tests/benchmarks/rivals/methods.py. Each row is kept in ``--keep FOLDER``
when it is finished, and not made again; searches and trainings go on where they were interrupted.
``--only TEXT`` makes the row of that name, or the rows whose name has the text; ``--minutes``
begins no further row after so long. ``--write PAGE`` writes the table of all rows that are
finished, after each. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import DepthcutError
from exporter.files import write_text
from exporter.progress import Quiet
from tests.benchmarks.frame import KeptRows, default_model, machine_line, print_machine, wanted
from tests.benchmarks.rivals.measuring import POSITIONS, DomainMeter, speedup, structure
from tests.benchmarks.rivals.methods import Row, rows
from tests.benchmarks.rivals.table import render
from tests.benchmarks.rivals.work import BATCH, Workplace

LENGTH, FEW = 512, 8
_COUNTS = {
    "samples": 40, "search_samples": 2, "test_samples": 8, "second_samples": 8, "rounds": 6,
    "distill_tokens": 40_000,
}  # fmt: skip
"""Options that change the page: samples to choose and fit on, those of them for searches."""


class Printed(Quiet):
    """Prints what a training or a search says."""

    def say(self, message: str) -> None:
        print(f"  {message}", flush=True)


class Bench:
    """The model, its texts, and the rows that are finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        from exporter.models.loading.model_source import load_model
        from exporter.models.texts.calibration import calibration_text

        def text(spec: Any, samples: int, part: Any = "calibration") -> Any:
            return calibration_text(
                self._loaded, str(spec), samples=samples, sequence_length=LENGTH, part=part
            )

        self._options = options
        self._loaded = load_model(options.model or default_model())
        self._fitting = text(options.calibrate, options.samples)
        self._texts = {
            "test": text(options.test, options.test_samples),
            "docs": text("pydoc", options.second_samples, "evaluation"),
        }
        texts = [item.ids_sha256 for item in (self._fitting, *self._texts.values())]
        about = ["by document", self._loaded.ref.sha256, *texts, 0, options.search_samples]
        self.kept = KeptRows(options.keep, about)

    @cached_property
    def _work(self) -> Workplace:
        from exporter.choose.budgets.limits import searched_meter

        folder = self._options.keep / f"work-{self.kept.key}"
        folder.mkdir(parents=True, exist_ok=True)
        searched = self._fitting.rows(slice(0, self._options.search_samples))
        meter = searched_meter(self._loaded, searched, BATCH, kept=folder / "searched.jsonl")
        return Workplace(
            self._loaded, str(self._options.calibrate), self._fitting,
            self._fitting.rows(slice(0, FEW)), meter, len(searched.input_ids), folder,
            self._options.distill_tokens, Printed(),
        )  # fmt: skip

    @cached_property
    def _meters(self) -> dict[str, DomainMeter]:
        return {name: DomainMeter(self._loaded.model, text) for name, text in self._texts.items()}

    def run(self, row: Row) -> None:
        """Makes, measures and keeps a row."""
        began = time.perf_counter()
        candidate = row.make(self._work)
        made_s = time.perf_counter() - began
        cut = ", ".join(f"{kind} {layer}" for layer, kind in sorted(candidate.cut))
        print(f"  made in {made_s:.0f} s: without {cut}", flush=True)
        rounds = self._options.rounds
        name = f"speed without {structure(candidate)}, {rounds} rounds"
        speed = self.kept.find(name) or self.kept.keep(
            name, speedup(self._loaded.model, candidate, rounds).model_dump(mode="json")
        )
        damages = {name: meter.measure(candidate) for name, meter in self._meters.items()}
        self.kept.keep(
            row.name,
            {
                "name": row.name, "dropped": sorted(candidate.cut), "read": candidate.read,
                "made_s": made_s, "machine": machine_line(), "domains": damages, "speed": speed,
            },
        )  # fmt: skip

    def page(self, table: Sequence[Row]) -> str:
        """All finished rows as Markdown; paths of this machine are no part of it."""
        done = {row.name: kept for row in table if (kept := self.kept.find(row.name)) is not None}
        texts = (
            f"{name}: {text.ref.source}, {len(text.input_ids)} samples of {LENGTH} tokens"
            for name, text in (("calibration", self._fitting), *self._texts.items())
        )
        lines = [
            f"model: {Path(self._loaded.ref.source).name}, float32",
            *(" ".join(word.rsplit("/", 1)[-1] for word in text.split(" ")) for text in texts),
            f"of the calibration, maps are fitted on all samples, means over tokens on the first "
            f"{FEW}, searches on the first {self._options.search_samples}",
            f"perplexity and KL are measured at every {POSITIONS}nd position",
            *sorted({f"machine: {row['machine']}" for row in done.values()}),
        ]
        return render(
            table, done, self._loaded.ref.num_layers,
            calibration=self._options.calibrate.name, command=_command(self._options),
            setting="\n".join(f"- {line}" for line in lines),
        )  # fmt: skip


def _command(options: argparse.Namespace) -> str:
    """The call that makes the same page: what differs from the defaults of a call without any."""
    changed = [
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name, usual in _COUNTS.items()
        if getattr(options, name) != usual
    ]
    call = f"DEPTHCUT_TEXTS={options.calibrate.parent.name} make rivals"
    return call + (f" RIVALS='{' '.join(changed)}'" if changed else "")


def main() -> None:
    """Makes the rows that are wanted, and writes the page."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    options = _parser().parse_args()
    if not (options.calibrate.is_file() and options.test.is_file()):
        print("Left out: no text files. See tests/benchmarks/bench_rivals.py.")
        return
    print_machine("torch", "transformers")
    table = list(rows(options.distill_tokens))
    bench, began = Bench(options), time.perf_counter()
    names = wanted([row.name for row in table], options.only)
    left = [row for row in table if row.name in names and bench.kept.find(row.name) is None]
    for number, row in enumerate(left, 1):
        minutes = (time.perf_counter() - began) / 60
        if options.minutes is not None and minutes >= options.minutes:
            print(f"{len(left) - number + 1} rows are left: run it again to go on.")
            break
        print(f"{row.name}: {number} of {len(left)}, {minutes:.0f} minutes gone", flush=True)
        try:
            bench.run(row)
        except DepthcutError as error:
            print(f"  can't be made: {error}", flush=True)
            continue
        if options.write:
            write_text(options.write, bench.page(table))
    if not options.write:
        print(bench.page(table))
    elif not left:
        write_text(options.write, bench.page(table))


def _parser() -> argparse.ArgumentParser:
    texts = Path(os.environ.get("DEPTHCUT_TEXTS", ""))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibrate", type=Path, default=texts / "valid.txt")
    parser.add_argument("--test", type=Path, default=texts / "test.txt")
    for name, usual in _COUNTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=usual)
    parser.add_argument("--minutes", type=float, help="begin no row after so long")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--keep", type=Path, default=Path("out/bench/rivals"))
    parser.add_argument("--write", type=Path, metavar="PAGE")
    return parser


if __name__ == "__main__":
    main()
