"""How far engines are from ONNX Runtime: ``python -m tests.stand_in.rounding MODELS``.

Right ones compute in another order and round elsewhere, wrong ones have a fault; see
:mod:`tests.stand_in.faults`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.engines.build.engine_set import EngineSet, find_engines
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.decoding.verify import Difference, verify_engines
from exporter.engines.tensors import TOLERANCE
from tests.llama_shaped import LlamaShape, write_llama
from tests.stand_in.engine_files import altered, write_engine
from tests.stand_in.faults import FAULTS, Fault
from tests.stand_in.installed import stand_in

RANGES = Ranges(batch=Span(1, 1, 2), prompt=Span(1, 4, 12))
DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
SIZES = (16, 64, 128)


def llama(folder: Path, precision: str, size: int, *, layers: int = 2, kv_heads: int = 2) -> Path:
    """A small Llama of a head size, its weights as spread as a model's at its begin."""
    heads = 4 if size < 64 else 2
    shape = LlamaShape(
        layers=layers, hidden=heads * size, heads=heads, kv_heads=kv_heads, intermediate=64,
        vocabulary=97, positions=True, fused_attention=True, dtype=DTYPES[precision],
    )  # fmt: skip
    return write_llama(folder / "model.onnx", shape, noise=0.45 / shape.hidden**0.5, room=16)


def checked(
    onnx: Path, fault: Fault = "", *, folder: Path | None = None
) -> tuple[EngineSet, list[Difference]]:
    """An engine for both phases on the stand-in, and how far it is off."""
    engine = onnx.with_name("m.engine")
    if not engine.exists():
        write_engine(onnx, engine, ["prefill", "decode"], RANGES, kernels=1)
    altered(engine, fault=fault)
    with stand_in() as machine:
        result = verify_engines(find_engines(engine), onnx, folder=folder, threads=1)
        assert machine.left_over == {}
    return result


def furthest(onnx: Path, fault: Fault) -> float:
    """The largest error of all runs."""
    return max(item.error for item in checked(onnx, fault)[1])


def random_right(folder: Path, seed: int) -> tuple[str, float]:
    """A small Llama of random sizes and weights: its type, and how far a right engine is off."""
    rng = np.random.default_rng(seed)
    precision = list(DTYPES)[seed % len(DTYPES)]
    size, layers, kv_heads = (int(rng.choice(s)) for s in (SIZES[:2], (1, 2, 4), (1, 2)))
    onnx = llama(folder / str(seed), precision, size, layers=layers, kv_heads=kv_heads)
    data = onnx.with_name("model.onnx.data")
    weights = np.fromfile(data, DTYPES[precision].numpy())
    weights = rng.permutation(weights) * np.asarray(rng.uniform(0.5, 1.5), weights.dtype)
    weights.astype(DTYPES[precision].numpy()).tofile(data)
    return precision, furthest(onnx, "rounds")


def main(models: int) -> None:
    """Prints a row for each type."""
    with tempfile.TemporaryDirectory() as name:
        right: dict[str, list[float]] = {precision: [] for precision in DTYPES}
        for seed in range(models):
            precision, error = random_right(Path(name), seed)
            right[precision].append(error)
        print("| | right engines | furthest off | allowed |", *FAULTS, "", sep=" | ")
        for precision, allowed in TOLERANCE.items():
            places = [llama(Path(name) / f"{precision}{n}", precision, n) for n in SIZES]
            least = (min(furthest(onnx, fault) for onnx in places) for fault in FAULTS)
            off = [f"{max(right[precision]):.1e}", f"{allowed:g}", *(f"{n:.2g}" for n in least)]
            print("", precision, len(right[precision]), *off, "", sep=" | ", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
