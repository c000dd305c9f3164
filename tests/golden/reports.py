"""Writes the golden reports anew: ``python -m tests.golden.reports``. Read the diff.

What comparisons and costs say of tiny models on a clock that only their runs move.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
from pydantic import BaseModel

from exporter.artifacts import PlannedDeletion, Speedup
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.options import Option, PlanCandidate
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.costs.measuring import CostSettings, Effort, measure_costs
from exporter.choose.costs.table import CostTable, RequestShape
from exporter.compare import latency
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.compare.session import compare
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.engines.runners import onnxruntime
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.registry import RUNNERS, Backend
from exporter.engines.runners.tensorrt import OnEngines
from exporter.errors import OUT_OF_MEMORY, BackendError
from graph_passes.types import SublayerRef
from tests.compared import encoder, four_models, quick
from tests.text_graphs import write_tiny_lm, write_tokenizer
from tests.tiny_graphs import TinySpec, tiny_model
from tests.tiny_models import made_loaded, write_source
from tests.virtual_time import VirtualTime

FOLDER = Path(__file__).parent / "reports"
OPTIONS = quick(
    prefill_lengths=(4, 8), decode_past_lengths=(4,), rounds=6, eval_tokens=64,
    timing=TimingOptions(generate=((4, 3),)),
)  # fmt: skip
AT = RequestShape(1, 4, 2)


class TimedSession:
    """A session of ONNX Runtime whose runs take virtual time, by its file's name."""

    def __init__(self, session: Any, file: Path, time: VirtualTime) -> None:
        self._session, self._time = session, time
        name = f"{file.parent.name.rpartition('.')[0] or file.parent.name}/{file.name}"
        self._ns = 10_000_000 + 100_000 * (zlib.crc32(name.encode()) % 50)
        self._ns += 1_000_000 * len(session.get_inputs())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        self._time.now_ns += self._ns
        self._session.run_with_iobinding(binding)


class SmallCard(OnEngines, OnnxRuntimeRunner):
    """An engine of a card that holds one of them."""

    backend = "small card"
    loaded: ClassVar[set[int]] = set()

    def __init__(self, model: Path, **how: Any) -> None:
        OnnxRuntimeRunner.__init__(self, model, **how)
        self.turns = None

    def load(self) -> None:
        if SmallCard.loaded - {id(self)}:
            raise BackendError("Full.", code=OUT_OF_MEMORY)
        OnnxRuntimeRunner.__enter__(self)
        SmallCard.loaded.add(id(self))

    def unload(self) -> None:
        OnnxRuntimeRunner.__exit__(self)
        SmallCard.loaded.discard(id(self))


@contextmanager
def virtual_sessions() -> Iterator[VirtualTime]:
    """All runs of ONNX Runtime, and all that is timed, go by one virtual clock."""
    time, opened = VirtualTime(), onnxruntime.new_session

    def new_session(file: Path, **how: Any) -> Any:
        return TimedSession(opened(file, **how), file, time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "new_session", new_session)
        patch.setitem(measure_rows.__kwdefaults__, "clock", time)
        patch.setattr(latency, "TimingBudget", TimingBudget)  # tests warm up briefly elsewhere
        patch.setitem(RUNNERS, "small card", Backend(__name__, SmallCard.__name__))
        yield time


def decoders(root: Path) -> dict[str, Path]:
    """The whole and the cut model, in float and as if they were quantised, and another cut."""
    plan = [{"layer": 1, "kind": "attention", "replacement": "none"}]
    further = write_tiny_lm(root / "further", layers=(0,), noise=0.4, plan=plan)
    write_tokenizer(further)
    (root / "text.txt").write_text("b c a a c b d a b b " * 200)
    return {**four_models(root), "further": further}


def on_text(root: Path) -> CompareOptions:
    """The usual options, with a text that no version of Python changes."""
    return replace(OPTIONS, eval_text=str(root / "text.txt"))


def _pair(root: Path, _: VirtualTime) -> BaseModel:
    made = decoders(root)
    return compare(made["whole"], made["cut"], on_text(root))


def _references(root: Path, _: VirtualTime) -> BaseModel:
    made = decoders(root)
    others = [made["whole-q"], f"small card:{made['cut']}"]
    return compare(made["whole"], made["cut"], on_text(root), references=others)


def _grid(root: Path, _: VirtualTime) -> BaseModel:
    made = decoders(root)
    floats = made["whole"], made["cut"]
    return compare(
        made["whole-q"], made["cut-q"], on_text(root), floats=floats, also=[made["further"]]
    )


def _in_turns(root: Path, _: VirtualTime) -> BaseModel:
    made = decoders(root)
    options = replace(on_text(root), timing=TimingOptions())
    return compare(*(f"small card:{made[name]}" for name in ("whole", "cut")), options)


def _encoders(root: Path, _: VirtualTime) -> BaseModel:
    made = encoder(root / "whole"), encoder(root / "cut", noise=0.3)
    return compare(*made, CompareOptions(threads=1, prefill_lengths=(4,), rounds=6))


def _stacks(root: Path, _: VirtualTime) -> BaseModel:
    from exporter.cut.surgery import prune_stacks
    from exporter.export.forms.portable import write_stacks

    write_stacks(made_loaded("bart"), write_source(root / "whole", "bart"))
    beside = shutil.ignore_patterns("*.onnx*", "*.safetensors")
    shutil.copytree(root / "whole", root / "cut", ignore=beside)
    plan = [PlannedDeletion(layer=0, kind="mlp"), PlannedDeletion(layer=3, kind="attention")]
    prune_stacks(root / "whole", root / "cut", plan, Stacks(2, 2))
    words = (" ".join(f"w{n + k}" for k in range(20)) for n in range(9))
    (root / "sources.txt").write_text("\n\n".join(words))
    options = CompareOptions(
        eval_text=str(root / "sources.txt"), threads=1, rounds=6, prefill_lengths=(8, 512),
        decode_past_lengths=(16,), timing=TimingOptions(generate=((7, 4),)),
    )  # fmt: skip
    return compare(root / "whole", root / "cut", options)


def _graph(root: Path) -> Path:
    (root / "graph").mkdir()
    ir.save(
        tiny_model(TinySpec(layers=4)), root / "graph" / "model.onnx",
        external_data="model.onnx.data",
    )  # fmt: skip
    return root / "graph" / "model.onnx"


def _costs(root: Path, time: VirtualTime) -> BaseModel:
    effort = Effort(rounds=6, clock=time, seed=0)
    settings = CostSettings(AT, threads=1, variants=effort, clock=time)
    return measure_costs(_graph(root), settings, folder=root / "work")


class Found(BaseModel):
    """Costs of all groups, a candidate's speedup, and what is left of the work."""

    table: CostTable
    speedup: Speedup
    left: list[str]


def _candidate(root: Path, time: VirtualTime) -> BaseModel:
    effort = Effort(rounds=6, clock=time, seed=0)
    watch = Stopwatch(
        _graph(root), AT, root / "work", threads=1, candidates=effort,
    )  # fmt: skip
    cut = PlanCandidate(tuple(Option((SublayerRef(n, "mlp"),)) for n in (1, 2)))
    table = watch.costs()
    speedup, left = watch.speedup(cut), [*(root / "work" / "scratch").iterdir()]
    return Found(table=table, speedup=speedup, left=list(map(str, left)))


CASES: dict[str, Callable[[Path, VirtualTime], BaseModel]] = {
    "pair": _pair, "references": _references, "grid": _grid, "in_turns": _in_turns,
    "encoders": _encoders, "encoder_decoder": _stacks, "costs": _costs,
    "candidate": _candidate,
}  # fmt: skip
WITH_TORCH = ("encoder_decoder",)
_LEFT_OUT = {
    "environment", "made_from", "versions", "created", "sha256", "text_sha256", "depthcut",
    "file_bytes", "schema_version", "notes", "version", "command", "answers", "p95_ms", "p99_ms",
    "form", "nodes",
}  # fmt: skip
"""What depends on the machine, or on how libraries write files."""
_WIDTH = 140


def plain(value: Any) -> Any:
    """What doesn't depend on the machine; of many numbers how many they are, and their sum."""
    if isinstance(value, dict):
        shown = {key: plain(item) for key, item in value.items() if key not in _LEFT_OUT}
        return {key: item for key, item in shown.items() if item not in (None, [], {})}
    if isinstance(value, list) and len(value) > 2 and all(isinstance(n, float) for n in value):
        return f"{len(value)} numbers, in all {sum(value):.5g}"
    if isinstance(value, list):
        return [plain(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def lines_of(value: Any, where: str = "") -> Iterator[str]:
    """As lines of JSON: a record's single values in one, and its parts that are long apart."""
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    long = {key: item for key, item in parts.items() if len(json.dumps(item)) > _WIDTH}
    if short := {key: item for key, item in parts.items() if key not in long}:
        yield f"{where}: {json.dumps(short)}"
    for key, item in long.items():
        yield from lines_of(item, f"{where}.{key}")


def golden_report(name: str) -> str:
    """What a case should hold."""
    with tempfile.TemporaryDirectory() as place, virtual_sessions() as time:
        lines = lines_of(plain(CASES[name](Path(place), time).model_dump(mode="json")))
        return "\n".join(lines).replace(place, "") + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        (FOLDER / f"{case}.txt").write_text(golden_report(case), encoding="utf-8")
        print(f"wrote {case}")
