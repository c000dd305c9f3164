"""What engines reach on a GPU: ``make bench-gpu``, or ``python -m tests.benchmarks.bench_gpu``.

A Llama-3-8B shape with random weights in bf16: a decode step against the card's memory, the pruned
model's largest batch against the whole one's, the same step by torch.compile, and whether
TensorRT-RTX serves the card. It takes 60 GB of disk and an hour or so; ``--small`` runs all of it
at a small shape. Without a GPU nothing is measured and the exit code is 1; with ``--small`` what
needs no GPU runs all the same: making the models, cutting them, building engines. Figures and all
samples also go into out/bench/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.engines.build.driver import Driver, ask_driver

PARTS = ("decode", "pruned", "compile", "probe")
RESULT = Path("out/bench/gpu.json")
_VERSIONS = ("tensorrt", "tensorrt-rtx", "cuda-bindings", "torch", "transformers")
Rows = list[dict[str, Any]]


def main(arguments: list[str]) -> int:
    """Runs the parts; gives the exit code."""
    options = _options(arguments)
    driver = ask_driver()
    if driver.problem and (options.ask_driver or not options.small):
        print(f"{driver.problem}: nothing was measured")
        return 1
    if options.ask_driver:
        return 0
    rows, failed = _run(options, driver)
    if driver.problem:
        print(f"{driver.problem}: nothing was measured")
        return 1
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    cards = [vars(device) for device in driver.devices]
    content = {"cards": cards, "cuda": driver.cuda_version, "rows": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{RESULT} has every sample")
    return 1 if failed else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="a small shape; also without a GPU")
    parser.add_argument("--ask-driver", action="store_true", help="only say whether there is one")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def _run(options: argparse.Namespace, driver: Driver) -> tuple[Rows, list[str]]:
    from exporter.errors import DepthcutError
    from tests.benchmarks.machine import print_machine

    print_machine(*_VERSIONS)
    for card in driver.devices:
        print(f"{card.name}, {card.compute_capability}, {card.memory_bytes / 1e9:.0f} GB, "
              f"driver for CUDA {driver.cuda_version}")  # fmt: skip
    rows: Rows = []
    failed = []
    place = Path("out/bench").resolve()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for name, part in _parts(options, driver, Path(folder)):
            print(f"{name}:", flush=True)
            try:
                rows += part()
            except DepthcutError as error:
                print(f"  failed: {error}", flush=True)
                failed.append(name)
    return rows, failed


def _parts(
    options: argparse.Namespace, driver: Driver, folder: Path
) -> list[tuple[str, Callable[[], Rows]]]:
    from tests.benchmarks.gpu_decode import bandwidth, decode_step, largest_batches
    from tests.benchmarks.gpu_models import LARGE_CASE, SMALL_CASE, backends, make_models
    from tests.benchmarks.gpu_probe import probe

    case = SMALL_CASE if options.small else LARGE_CASE
    wanted = options.parts or PARTS
    speeds = {} if driver.problem else bandwidth()
    for name, speed in speeds.items():
        print(f"memory, {name}: {speed / 1e12:.2f} TB/s")
    parts: list[tuple[str, Callable[[], Rows]]] = []
    if {"decode", "pruned"} & set(wanted):
        models = make_models(folder / "models", case)
        engines = folder / "engines"
        for backend in backends(driver):
            if "decode" in wanted:
                parts.append((f"decode, {backend}", lambda backend=backend: decode_step(
                    models[0], engines, backend, driver, case, speeds)))  # fmt: skip
            if "pruned" in wanted:
                parts.append((f"largest batch, {backend}", lambda backend=backend: largest_batches(
                    models, engines, backend, driver, case)))  # fmt: skip
    if "compile" in wanted:
        parts.append(("torch.compile", lambda: _compiled(case, driver)))
    if "probe" in wanted:
        parts.append(("what TensorRT-RTX says of this card", lambda: probe(folder / "probe")))
    return parts


def _compiled(case: Any, driver: Driver) -> Rows:
    from tests.benchmarks.gpu_torch import compiled_step

    return compiled_step(case, device="cpu" if driver.problem else "cuda")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
