"""Scores by a plain computation that stores every activation."""

from __future__ import annotations

from typing import Any

from exporter.artifacts import ImportanceReport

KINDS = ("attention", "mlp", "block")


def table(report: ImportanceReport) -> dict[str, list[float]]:
    return {kind: [s.score for s in report.scores if s.kind == kind] for kind in KINDS}


def plain_scores(states: dict[str, list[Any]]) -> dict[str, list[float]]:
    """``1 - mean cos`` of pairs of stored activations, in float64."""
    import torch

    return {
        kind: [
            1 - float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())
            for x, y in pairs
        ]
        for kind, pairs in states.items()
    }


def stored(model: Any, ids: Any, middle: str) -> dict[str, list[Any]]:
    """The stream before, between and after the sublayers, by hooks on layers and middle norms."""
    import torch

    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    layers = model.base_model.layers
    handles = []
    for number, layer in enumerate(layers):
        norm = getattr(layer, middle)
        handles.append(layer.register_forward_pre_hook(keep(f"in{number}"), with_kwargs=True))
        handles.append(norm.register_forward_pre_hook(keep(f"mid{number}"), with_kwargs=True))
    handles.append(model.base_model.norm.register_forward_pre_hook(
        keep(f"in{len(layers)}"), with_kwargs=True
    ))  # fmt: skip
    with torch.no_grad():
        model(torch.from_numpy(ids))
    for handle in handles:
        handle.remove()
    numbers = range(len(layers))
    return {
        "attention": [(seen[f"in{n}"], seen[f"mid{n}"]) for n in numbers],
        "mlp": [(seen[f"mid{n}"], seen[f"in{n + 1}"]) for n in numbers],
        "block": [(seen[f"in{n}"], seen[f"in{n + 1}"]) for n in numbers],
    }


def largest_difference(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    return max(abs(a - b) for kind in KINDS for a, b in zip(ours[kind], theirs[kind], strict=True))
