"""The forms of SmolLM2, whole and cut, in float and quantised, beside other libraries.

Run it with ``python -m tests.benchmarks.bench_forms GGUF WORK --table fp32`` (``int4``).
WORK takes the models, which are made once. Every arm is a process of its own with the same number
of threads and the same tokens; arms take turns in an order that is drawn, and all are loaded anew
several times, since where weights lie in memory alone makes some percent. All get huge pages from
malloc, as depthcut's runner asks for them itself. Logits are of the last position alone where the
library can do that.

Aims: at most 1.02 of onnxruntime-genai's time; ahead of optimum and PyTorch; 15 of 30 attentions
cut: decode at 2048 at least 1.25 times as fast in fp32, 1.6 in int4, the prompt of 2048 in fp32
1.45. It prints figures and asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import Target
from exporter.compare.timing.statistics import estimate
from exporter.files import staged_directory
from tests.benchmarks.frame import in_turns, keep_samples, print_head, print_machine, print_row
from tests.tiny_models import planned, random_replacements

OURS, GENAI = "depthcut", "onnxruntime-genai"
ATTENTIONS = (25, 26, 7, 28, 6, 5, 4, 14, 9, 29, 27, 3, 22, 10, 17)
"""The lowest cosine scores of SmolLM2, lowest first."""
QUANTIZED: dict[str, dict[str, Any]] = {
    "int4 plain": {"scheme": "int4", "method": "rtn", "symmetric": True},
    "int4 kept": {"scheme": "int4", "method": "gguf"},
    "int8": {"scheme": "int8", "method": "rtn"},
}
"""Forms by what the tables call them."""


class Models:
    """Makes what isn't there yet, by depthcut's own library."""

    def __init__(self, source: Path, work: Path) -> None:
        self.source, self._work = source, work

    def checkpoint(self) -> Path:
        """For PyTorch."""

        def write(folder: Path) -> None:
            from exporter.models.loading.model_files import save_checkpoint
            from exporter.models.loading.model_source import load_model

            save_checkpoint(load_model(str(self.source)), folder)

        return self._made("checkpoint", write)

    def whole(self, target: Target = "onnxruntime-cpu") -> Path:
        """In a target's form."""

        def write(folder: Path) -> None:
            from exporter.export.forms.targets import write_form
            from exporter.models.loading.model_files import save_pretrained_files
            from exporter.models.loading.model_source import load_model

            loaded = load_model(str(self.source))
            write_form(loaded, folder, target=target)
            save_pretrained_files(loaded, folder)

        return self._made(target, write)

    def cut(self, count: int, *, linear: bool = False) -> Path:
        """Without so many attentions; with a linear map of random numbers in each one's place."""

        def write(folder: Path) -> None:
            from exporter.artifacts.loaded_plan import LoadedPlan
            from exporter.cut.options import CutOptions
            from exporter.cut.surgery import prune_file

            put, whole = "linear" if linear else "none", self.whole()
            deletions = planned(*(("attention", n, put) for n in ATTENTIONS[:count]))
            # What maps compute doesn't matter for the time.
            maps = random_replacements(_HIDDEN, deletions) if linear else None
            plan, how = LoadedPlan.of(deletions, maps), CutOptions(verify="none")
            prune_file(whole / "model.onnx", folder / "model.onnx", plan, how)
            _copy_beside(whole, folder)

        return self._made(f"{count}-cut{'-linear' if linear else ''}", write)

    def quantized(self, name: str, count: int = 0) -> Path:
        """On ONNX Runtime, whole or cut; ``name`` is one of :data:`QUANTIZED`."""
        source = self.cut(count) if count else self.whole()
        settings = {**QUANTIZED[name]}
        if settings.get("method") == "gguf":
            settings["gguf"] = self.source

        def write(folder: Path) -> None:
            from exporter.quantize.quantize import quantize_file
            from exporter.quantize.settings import QuantizeSettings

            how = QuantizeSettings(**settings)
            quantize_file(source / "model.onnx", folder / "model.onnx", how)
            _copy_beside(source, folder)

        return self._made(f"{source.name}-{name.replace(' ', '-')}", write)

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        folder = self._work / name
        if not folder.is_dir():
            print(f"making {folder.name} ...", flush=True)
            with staged_directory(folder) as stage:
                write(stage)
        return folder


def _copy_beside(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if not file.name.startswith("model.onnx") and file.is_file():
            shutil.copy2(file, folder)


@dataclass(frozen=True)
class Arm:
    """A library on a model."""

    library: str
    model: Path
    python: str = sys.executable
    beside: str | None = None


def fp32(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """The whole model in every library, and ours without 8 and 15 attentions."""
    whole, portable = models.whole(), models.whole("portable")
    return {
        "depthcut": Arm(OURS, whole, beside="onnxruntime-genai"),
        "depthcut, 8 cut": Arm(OURS, models.cut(8), beside="depthcut"),
        "depthcut, 15 cut": Arm(OURS, models.cut(15), beside="depthcut"),
        "depthcut, 15 linear": Arm(OURS, models.cut(15, linear=True), beside="depthcut"),
        "portable": Arm(OURS, portable, beside="depthcut"),
        "onnxruntime-genai": Arm(GENAI, whole, options.genai_python),
        "optimum, portable file": Arm("optimum", portable, options.optimum_python, "depthcut"),
        "PyTorch eager": Arm("torch", models.checkpoint(), beside="depthcut"),
    }


def int4(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """Quantised forms, whole and cut."""
    return {
        "fp32": Arm(OURS, models.whole()),
        "int8": Arm(OURS, models.quantized("int8"), beside="fp32"),
        "int4 plain": Arm(OURS, models.quantized("int4 plain"), beside="in genai"),
        "int4 kept": Arm(OURS, models.quantized("int4 kept"), beside="int4 plain"),
        "int4 kept, 15 cut": Arm(OURS, models.quantized("int4 kept", 15), beside="int4 kept"),
        "in genai": Arm(GENAI, models.quantized("int4 plain"), options.genai_python),
        "llama.cpp": Arm("llama.cpp", models.source, options.llama_python, "int4 kept"),
    }


TABLES = {"fp32": fp32, "int4": int4}


_SCRIPT = Path(__file__).with_name("peers.py")
# depthcut moves its weights to huge pages by itself; so every library gets them.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_HIDDEN, _LENGTHS, _STEPS = 576, (512, 2048), 8
_CONTEXT = max(_LENGTHS) + 320
# A prompt's column after its decode column: a session then need not run its prompt twice.
_COLUMNS = {
    f"{word} {n}": command
    for n in _LENGTHS
    for word, command in (("decode", f"decode {n} {_STEPS}"), ("prompt", f"prefill {n}"))
}
Times = dict[str, dict[str, list[list[float]]]]
"""Milliseconds by column and arm, ``[load][round]``."""


def measure(arms: Mapping[str, Arm], loads: int, rounds: int) -> tuple[Times, dict[str, str]]:
    """Loads all arms, asks them in turns, and does so again; the times, and versions by arm."""
    times: Times = {column: {} for column in _COLUMNS}
    versions: dict[str, str] = {}
    for load in range(loads):
        with contextlib.ExitStack() as stack:
            peers = {}
            for name in random.sample(sorted(arms), len(arms)):
                if (peer := stack.enter_context(_loaded(name, arms[name], versions))) is not None:
                    peers[name] = peer
            for column, command in _COLUMNS.items():
                asked = {name: partial(ask, command) for name, ask in peers.items()}
                in_turns(asked, 1)
                most = rounds if column.startswith("decode") else max(1, rounds // 3)
                for name, taken in in_turns(asked, most).items():
                    times[column].setdefault(name, []).append(taken)
        print(f"  load {load + 1} of {loads} done", file=sys.stderr, flush=True)
    return times, versions


@contextlib.contextmanager
def _loaded(
    name: str, arm: Arm, versions: dict[str, str]
) -> Iterator[Callable[[str], float] | None]:
    """A process that has loaded its model, to be asked; None where it can't."""
    from exporter.engines.environment import default_threads

    # Beside the script lie modules that would shadow others.
    words = ["serve", arm.library, str(arm.model), str(default_threads()), str(_CONTEXT)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [arm.python, "-P", str(_SCRIPT), *words], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **_HUGE_PAGES},
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        given, answers = process.stdin, process.stdout

        def ask(command: str) -> float:
            given.write(command + "\n")
            given.flush()
            return float(json.loads(answers.readline()))

        line = answers.readline()
        if line.startswith("{"):
            versions[name] = ", ".join(f"{key} {value}" for key, value in json.loads(line).items())
        else:
            process.wait()
            errors.seek(0)
            reason = "".join(errors.read().strip().splitlines()[-1:]) or "it said nothing"
            print(f"{name}: left out: {reason}", flush=True)
        yield ask if name in versions else None
        given.close()


def print_table(arms: Mapping[str, Arm], times: Times, versions: Mapping[str, str]) -> None:
    """Prints medians, and ratios beside the arms that they are held against."""
    print_head("ms, medians", *_COLUMNS, "of")
    for name in (name for name in arms if name in versions):
        cells = (np.median(np.concatenate(times[column][name])) for column in _COLUMNS)
        print_row(name, *(f"{cell:.2f}" for cell in cells), versions[name])
    print_head("ratio, 95 % interval over loads", *_COLUMNS)
    for name, other in ((name, arm.beside) for name, arm in arms.items()):
        if name in versions and other in versions:
            print_row(
                f"{name} / {other}", *(_ratio(item[name], item[other]) for item in times.values())
            )


def _ratio(ours: list[list[float]], theirs: list[list[float]]) -> str:
    pairs = zip(ours, theirs, strict=True)
    logs = np.array([np.log(np.median(a) / np.median(b)) for a, b in pairs])
    if len(logs) == 1:
        return f"{np.exp(logs[0]):.3f}"
    ratio = estimate(logs)
    return "{:.3f} [{:.3f}, {:.3f}]".format(np.exp(ratio.log_ratio), *ratio.interval())


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="SmolLM2 as GGUF")
    parser.add_argument("work", type=Path, help="where the models are, or go")
    parser.add_argument("--table", choices=TABLES, default="fp32")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    for library in ("genai", "optimum", "llama"):
        parser.add_argument(f"--{library}-python", default=sys.executable)
    parser.add_argument("--only", action="append", help="this arm alone, and others so named")
    options = parser.parse_args()
    print_machine()
    arms = TABLES[options.table](Models(options.source, options.work), options)
    if options.only:
        arms = {name: arm for name, arm in arms.items() if name in options.only}
    times, versions = measure(arms, options.loads, options.rounds)
    keep_samples(f"forms-{options.table}", times)
    print_table(arms, times, versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
