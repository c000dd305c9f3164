"""How the folders of `depthcut export` are used, for its report and for a file in each of them."""

from __future__ import annotations

from exporter.artifacts.uses import FolderUses
from exporter.checkpoint.facts import CheckpointFacts
from exporter.checkpoint.model_card import checkpoint_uses
from exporter.engines.usage import UsedModel, engine_uses, graph_uses
from exporter.pipeline.run import CHECKPOINT, ENGINES, QUANTIZED, Run

_ARMS = ("candidate", "baseline")


def folder_uses(run: Run) -> list[FolderUses]:
    """For each folder that this run has written, the pruned model's before the whole one's."""
    names = [QUANTIZED[arm] for arm in _ARMS] if run.request.quantize is not None else []
    found = [
        graph_uses(run.ledger.path(name) / "model.onnx", folder=name) for name in (*names, *_ARMS)
    ]
    if run.request.engines is not None:
        found = [arm_engine_uses(run, arm, folder=f"{ENGINES}/{arm}") for arm in _ARMS] + found
    if run.request.checkpoint:
        facts = CheckpointFacts.model_validate(run.ledger.notes(CHECKPOINT))
        found.append(checkpoint_uses(facts, folder=f"candidate/{CHECKPOINT}"))
    return found


def arm_engine_uses(run: Run, arm: str, *, folder: str = ".") -> FolderUses:
    """Those of one model's engines, whose tokenizer lies with the graph that they are made from."""
    source = run.built_from()[arm]
    model = UsedModel.read(source / "model.onnx", [source])
    speaks = model.generates and model.has_tokenizer
    return engine_uses(f"../../{source.name}" if speaks else None, folder=folder)
