"""Fuzzes for as long as you like: ``python -m tests.fuzz --minutes 10 [model.onnx ...]``.

Each try mutates a graph of the corpus, or one of the files that are named, a few times, and checks
that it is refused or cut right. A failure prints the seed that makes it again (``--seed N``) and
keeps the file. Ends with 1 if there was one.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import onnx

from tests.fuzz import corpus
from tests.fuzz.judge import check_file, random_cut
from tests.fuzz.mutations import MUTATIONS, spoil_bytes, spoil_locations

_TOLD = 3  # failures at the same place
_BYTES, _LOCATIONS = 0.1, 0.05  # how often a file is spoilt below the graph


def attempt(seed: int, files: list[Path], folder: Path, done: list[str]) -> str:
    """One try; gives its outcome, and notes what it does in ``done``."""
    rng = random.Random(seed)
    source = rng.choice(files) if files else rng.choice(corpus.NAMES)
    named = isinstance(source, Path)
    model = onnx.load(source, load_external_data=False) if named else corpus.graph(source)
    done.append(str(source))
    kind = rng.random()
    for name in rng.choices(sorted(MUTATIONS), k=rng.choice((1, 1, 2, 3, 5))):
        if kind > _BYTES / 2 and model.graph.node and model.graph.output and model.graph.input:
            MUTATIONS[name](model, rng)
            done.append(name)
    path = folder / "model.onnx"
    if _BYTES < kind < _BYTES + _LOCATIONS:
        onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
        model = onnx.load(path, load_external_data=False)
        spoil_locations(model, rng)
    data = model.SerializeToString()
    if kind < _BYTES:
        data = spoil_bytes(data, rng)
        done.append("spoil_bytes")
    path.write_bytes(data)
    return check_file(path, random_cut(rng), run=kind > _BYTES + _LOCATIONS and not named)


def main() -> int:
    """Runs until the time is up."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # it tells of every broken graph
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    end = time.monotonic() + 60 * options.minutes
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    while options.seed is None or not outcomes:
        with tempfile.TemporaryDirectory() as folder:
            done: list[str] = []
            try:
                outcomes[attempt(seed, options.files, Path(folder), done)] += 1
            except Exception as error:
                if options.seed is not None:
                    raise
                outcomes["FAILED"] += 1
                failure = Failure(seed, error, done)
                failures[failure.where] += 1
                if failures[failure.where] <= _TOLD:
                    failure.report(Path(folder), options.keep)
        seed += 1
        if time.monotonic() > end:
            break
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    return 1 if failures else 0


class Failure:
    """A try that failed."""

    def __init__(self, seed: int, error: Exception, done: list[str]) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        self.where = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
        self._told = f"--seed {seed}: {self.where}: {str(error)[:300]}\n  {', '.join(done)}"
        self._name = f"{seed}.onnx"

    def report(self, folder: Path, keep: Path) -> None:
        """Prints it and keeps its file."""
        print(self._told, flush=True)
        keep.mkdir(parents=True, exist_ok=True)
        if (folder / "model.onnx").is_file():
            shutil.copy(folder / "model.onnx", keep / self._name)


if __name__ == "__main__":
    sys.exit(main())
