"""depthcut beside published ways of cutting depth: one model, one text, the same sublayers to go.

Run it with ``make rivals``, or ``python -m tests.benchmarks.bench_rivals --calibrate FILE --test
FILE``: text files of one domain that share nothing, such as WikiText-2's valid and test.
``DEPTHCUT_TEXTS``, a folder with ``valid.txt`` and ``test.txt``, serves instead. All methods choose
and fit on the first file; the second domain is the evaluation half of CPython's documentation.
With ``--tasks FOLDER`` (or ``DEPTHCUT_DATA``; files as in exporter/compare/tasks/items.py) all
models answer ``--items`` of each task, too.

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
from tests.benchmarks.rivals.measuring import POSITIONS, Asked, DomainMeter, speedup, structure
from tests.benchmarks.rivals.methods import Row, rows
from tests.benchmarks.rivals.table import Setting, render
from tests.benchmarks.rivals.work import BATCH, WHOLE, Candidate, Workplace

LENGTH, FEW = 512, 8
WHOLE_ROW = "whole"


class Told(Quiet):
    """Prints what a training or a search says."""

    def say(self, message: str) -> None:
        print(f"  {message}", flush=True)


class Bench:
    """The model, its texts, and the rows that are finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        from exporter.models.loading.model_source import load_model

        self._options = options
        self._loaded = load_model(options.model or default_model())
        self._fitting = self._text(str(options.calibrate), options.samples)
        self._texts = {
            "test": self._text(str(options.test), options.test_samples),
            "docs": self._text(options.second, options.second_samples, "evaluation"),
        }
        self.kept = KeptRows(options.keep, self._about())

    def _text(self, spec: str, samples: int, part: Any = "calibration") -> Any:
        from exporter.models.texts.calibration import calibration_text

        return calibration_text(
            self._loaded, spec, samples=samples, sequence_length=LENGTH, part=part
        )

    def _about(self) -> list[object]:
        texts = [text.ids_sha256 for text in (self._fitting, *self._texts.values())]
        items = self._options.items if self._options.tasks else 0
        return ["by document", self._loaded.ref.sha256, *texts, items, self._options.search_samples]

    @cached_property
    def _work(self) -> Workplace:
        from exporter.choose.selection.meters import searched_meter

        folder = self._options.keep / f"work-{self.kept.key}"
        folder.mkdir(parents=True, exist_ok=True)
        searched = self._fitting.rows(slice(0, self._options.search_samples))
        meter = searched_meter(self._loaded, searched, BATCH, kept=folder / "searched.jsonl")
        return Workplace(
            self._loaded, str(self._options.calibrate), self._fitting,
            self._fitting.rows(slice(0, FEW)), meter, len(searched.input_ids), folder,
            self._options.distill_tokens, Told(),
        )  # fmt: skip

    @cached_property
    def _meters(self) -> dict[str, DomainMeter]:
        return {name: DomainMeter(self._loaded.model, text) for name, text in self._texts.items()}

    @cached_property
    def _asked(self) -> Asked | None:
        if not self._options.tasks:
            return None
        return Asked(self._loaded, self._options.tasks, self._options.items)

    def whole(self) -> dict[str, Any]:
        """The whole model's answers."""
        results = self.kept.find(WHOLE_ROW)
        if results is None:
            results = {"answers": self._answers(WHOLE), "layers": self._loaded.ref.num_layers}
            self.kept.keep(WHOLE_ROW, results)
        return results

    def run(self, row: Row) -> None:
        """Makes, measures and keeps a row."""
        began = time.perf_counter()
        candidate = row.make(self._work)
        made_s = time.perf_counter() - began
        print(f"  made in {made_s:.0f} s: without {_told(candidate)}", flush=True)
        self.kept.keep(
            row.name,
            {
                "name": row.name,
                "dropped": sorted(candidate.cut),
                "read": candidate.read,
                "made_s": made_s,
                "machine": machine_line(),
                "domains": {name: m.measure(candidate) for name, m in self._meters.items()},
                "answers": self._answers(candidate),
                "speed": self._speed(candidate),
            },
        )

    def _answers(self, candidate: Candidate) -> dict[str, Any]:
        if self._asked is None:
            return {}
        with candidate.within(self._loaded.model):
            answers = self._asked.answers(candidate.cut)
        return {
            task: {"right": answer.right.tolist(), "log_p": answer.log_p.tolist()}
            for task, answer in answers.items()
        }

    def _speed(self, candidate: Candidate) -> dict[str, Any]:
        name = f"speed without {structure(candidate)}, {self._options.rounds} rounds"
        results = self.kept.find(name)
        if results is None:
            measured = speedup(self._loaded.model, candidate, self._options.rounds)
            results = measured.model_dump(mode="json")
            self.kept.keep(name, results)
        return results

    def page(self, table: Sequence[Row]) -> str:
        """All finished rows as Markdown."""
        result = {row.name: self.kept.find(row.name) for row in table}
        done = {name: row for name, row in result.items() if row is not None}
        return render(table, done, self.whole(), self._setting(done))

    def _setting(self, done: dict[str, Any]) -> Setting:
        texts = [
            f"{name}: {text.ref.source}, {len(text.input_ids)} samples of {LENGTH} tokens"
            for name, text in (("calibration", self._fitting), *self._texts.items())
        ]
        tasks = f"tasks: the first {self._options.items} items of each"
        machines = {row["machine"] for row in done.values()}
        searched = (
            f"of the calibration, maps are fitted on all samples, means over tokens on the first "
            f"{FEW}, searches on the first {self._options.search_samples}"
        )
        damage = f"perplexity and KL are measured at every {POSITIONS}nd position"
        return Setting(
            Path(self._options.calibrate).name,
            _command(self._options),
            [
                f"model: {Path(self._loaded.ref.source).name}, float32",
                *(_without_folders(text) for text in texts),
                searched,
                damage,
                *([tasks] if self._options.tasks else []),
                *(f"machine: {machine}" for machine in sorted(machines)),
            ],
        )


def _told(candidate: Candidate) -> str:
    return ", ".join(f"{kind} {layer}" for layer, kind in sorted(candidate.cut))


def _command(options: argparse.Namespace) -> str:
    """The call that makes the same page: what differs from the defaults of a call without any."""
    names = (
        "samples", "search_samples", "test_samples", "second_samples", "second", "items", "rounds",
        "distill_tokens",
    )  # fmt: skip
    usual = _parser().parse_args([])
    changed = [
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name in names
        if getattr(options, name) != getattr(usual, name)
    ]
    places = f"DEPTHCUT_TEXTS={options.calibrate.parent.name}"
    if options.tasks:
        places += f" DEPTHCUT_DATA={options.tasks.name}"
    return f"{places} make rivals" + (f" RIVALS='{' '.join(changed)}'" if changed else "")


def _without_folders(text: str) -> str:
    """Paths of this machine are no part of a page."""
    return " ".join(word.rsplit("/", 1)[-1] for word in text.split(" "))


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
    bench.whole()
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
    page = bench.page(table)
    if options.write:
        write_text(options.write, page)
    else:
        print(page)


def _parser() -> argparse.ArgumentParser:
    texts = Path(os.environ.get("DEPTHCUT_TEXTS", ""))
    data = os.environ.get("DEPTHCUT_DATA")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibrate", type=Path, default=texts / "valid.txt")
    parser.add_argument("--test", type=Path, default=texts / "test.txt")
    parser.add_argument("--second", default="pydoc")
    parser.add_argument("--samples", type=int, default=40, help="to choose and fit on")
    parser.add_argument("--search-samples", type=int, default=2, help="of these, for searches")
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--second-samples", type=int, default=8)
    parser.add_argument("--tasks", type=Path, default=Path(data) if data else None)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6, help="of timing")
    parser.add_argument("--distill-tokens", type=int, default=40_000)
    parser.add_argument("--minutes", type=float, help="begin no row after so long")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--keep", type=Path, default=Path("out/bench/rivals"))
    parser.add_argument("--write", type=Path, metavar="PAGE")
    return parser


if __name__ == "__main__":
    main()
