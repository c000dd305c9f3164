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
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exporter.artifacts import PlannedDeletion, PruningPlan, ReplacementsRef, Target
from exporter.artifacts.loaded_plan import Replacements, read_replacements
from exporter.compare.timing.statistics import estimate
from exporter.files import sha256_file, staged_directory
from tests.benchmarks.frame import print_machine

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

            put = "linear" if linear else "none"
            deletions = [
                PlannedDeletion(layer=n, kind="attention", replacement=put)  # type: ignore[arg-type]
                for n in ATTENTIONS[:count]
            ]
            whole = self.whole()
            plan = LoadedPlan.of(deletions, _maps(whole, deletions) if linear else None)
            how = CutOptions(verify="none")
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


def _maps(folder: Path, deletions: list[PlannedDeletion]) -> Replacements:
    """Random maps of the right sizes: what they compute doesn't matter for the time."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng, hidden = np.random.default_rng(0), config["hidden_size"]
    tensors = {}
    for deletion in deletions:
        name = f"attention.{deletion.layer}"
        tensors[f"{name}.weight"] = rng.normal(0, 1e-3, (hidden, hidden)).astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(hidden, np.float32)
    path = folder.parent / "maps.safetensors"
    save_file(tensors, path)
    named = ReplacementsRef(path=path.name, sha256=sha256_file(path))
    plan = PruningPlan(deletions=deletions, replacements=named)
    maps = read_replacements(plan, folder.parent / "plan.json")
    assert maps is not None
    return maps


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
    print_table(arms, measure(arms, options.loads, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())


_SCRIPT = Path(__file__).with_name("forms_peer.py")
# depthcut moves its weights to huge pages by itself; so every library gets them.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_LENGTHS, _STEPS = (512, 2048), 8
_CONTEXT = max(_LENGTHS) + 320
# A prompt's column after its decode column: a session then need not run its prompt twice.
_COLUMNS = {
    f"{word} {n}": command
    for n in _LENGTHS
    for word, command in (("decode", f"decode {n} {_STEPS}"), ("prompt", f"prefill {n}"))
}


@dataclass(frozen=True)
class Arm:
    """A library on a model."""

    library: str
    model: Path
    python: str = sys.executable
    beside: str | None = None


@dataclass
class Times:
    """Milliseconds ``[load][round]`` by arm and column, and each library's versions."""

    taken: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def ratio(self, arm: str, other: str, column: str) -> tuple[float, float, float]:
        """``arm`` over ``other``, and its 95 % interval over loads."""
        pairs = zip(self.taken[arm, column], self.taken[other, column], strict=True)
        logs = np.array([np.log(np.median(ours) / np.median(theirs)) for ours, theirs in pairs])
        if len(logs) == 1:
            return float(np.exp(logs[0])), float("nan"), float("nan")
        ratio = estimate(logs)
        return float(np.exp(ratio.log_ratio)), *ratio.interval()


def measure(arms: Mapping[str, Arm], loads: int, rounds: int) -> Times:
    """Loads all arms, asks them in turns, and does so again."""
    times, rng = Times(), np.random.default_rng()
    for load in range(loads):
        with contextlib.ExitStack() as stack:
            peers = {}
            for name in rng.permutation(sorted(arms)).tolist():
                peer = stack.enter_context(_loaded(name, arms[name]))
                if peer is not None:
                    peers[name] = peer
            _one_load(peers, rounds, times, rng)
        print(f"  load {load + 1} of {loads} done", file=sys.stderr, flush=True)
    return times


def _one_load(
    peers: Mapping[str, Peer], rounds: int, times: Times, rng: np.random.Generator
) -> None:
    for name, peer in peers.items():
        times.versions[name] = ", ".join(f"{key} {value}" for key, value in peer.versions.items())
    for column, command in _COLUMNS.items():
        for name, peer in peers.items():
            times.taken.setdefault((name, column), []).append([])
            peer.ask(command)
        for _ in range(rounds if column.startswith("decode") else max(1, rounds // 3)):
            for name in rng.permutation(sorted(peers)).tolist():
                times.taken[name, column][-1].append(peers[name].ask(command))


@dataclass(frozen=True)
class Peer:
    """A process that has loaded its model."""

    process: subprocess.Popen[str]
    versions: dict[str, str]

    def ask(self, command: str) -> float:
        """Milliseconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def _loaded(name: str, arm: Arm) -> Iterator[Peer | None]:
    from exporter.engines.environment import default_threads

    # Beside the script lie modules that would shadow others.
    words = [arm.library, str(arm.model), str(default_threads()), str(_CONTEXT)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [arm.python, "-P", str(_SCRIPT), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **_HUGE_PAGES},
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            process.wait()
            errors.seek(0)
            reason = "".join(errors.read().strip().splitlines()[-1:]) or "it said nothing"
            print(f"{name}: left out: {reason}", flush=True)
            yield None
            return
        try:
            yield Peer(process, json.loads(line))
        finally:
            process.stdin.close()


def print_table(arms: Mapping[str, Arm], times: Times) -> None:
    """Prints medians, and ratios beside the arms that they are held against."""
    there = [name for name in arms if name in times.versions]
    width = max(map(len, there))
    print(f"{'ms, medians':{width}}  " + "  ".join(f"{column:>13}" for column in _COLUMNS))
    for name in there:
        cells = (np.median(np.concatenate(times.taken[name, column])) for column in _COLUMNS)
        print(f"{name:{width}}  " + "  ".join(f"{cell:13.2f}" for cell in cells))
    print()
    for name in there:
        other = arms[name].beside
        if other in there:
            ratios = {column: times.ratio(name, other, column) for column in _COLUMNS}
            words = (f"{c} {r:.3f} [{low:.3f}, {high:.3f}]" for c, (r, low, high) in ratios.items())
            print(f"{name} / {other}: " + "; ".join(words))
    print()
    for name in there:
        print(f"{name}: {times.versions[name]}")
