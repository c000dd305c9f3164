"""Engines of the stand-in that decode wrongly, as engines on cards did or might."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from exporter.engines.runners.base import Array, Runner

Fault = Literal["", "room", "more", "less", "stale", "heads", "mask"]
FAULTS: dict[Fault, str] = {
    "room": "a step attends all of the room",
    "more": "it attends one position more than is filled",
    "less": "it misses the last one that was filled",
    "stale": "it leaves the caches as they were",
    "heads": "it reads the heads of the caches in another order",
    "mask": "a prompt or an encoder takes padding for text",
}


def computed(graph: Runner, fault: Fault, noise: float, feed: Mapping[str, Any]) -> dict[str, Any]:
    """What such an engine gives: a graph's outputs with a fault, and with noise like rounding."""
    if fault == "mask" and feed["input_ids"].shape[1] > 1:
        feed = {**feed, "attention_mask": _without_padding(feed)}
    outputs = graph.run(feed)
    if (
        fault not in ("", "mask")
        and feed["input_ids"].shape[1] == 1
        and feed["attention_mask"].sum() > len(feed["input_ids"])
    ):
        outputs = _wrong(graph, fault, feed, outputs)
    rng = np.random.default_rng(7)
    for name, array in outputs.items() if noise else ():
        size = np.sqrt(np.square(array.astype(np.float32)).mean(axis=-1, keepdims=True))
        off = noise * size * rng.standard_normal(array.shape)
        if name != "logits":  # what is old is a copy
            off[:, :, : -feed["input_ids"].shape[1]] = 0
        outputs[name] = (array + off).astype(array.dtype)
    return outputs


def _without_padding(feed: Mapping[str, Any]) -> Array:
    """A mask that is full up to a text's end, or up to its own where there is no cache."""
    mask: Array = feed["attention_mask"]
    ends = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    if not any(name.startswith("past") for name in feed):
        ends[:] = mask.shape[1]
    return (np.arange(mask.shape[1]) < ends[:, None]).astype(mask.dtype)


def _wrong(
    graph: Runner, fault: Fault, feed: Mapping[str, Any], right: dict[str, Array]
) -> dict[str, Array]:
    if fault == "stale":
        return {name: array for name, array in right.items() if not name.startswith("present")}
    mask = feed["attention_mask"]
    fill, room = int(mask[0].sum()) - 1, mask.shape[1]
    seen = {"room": room - 1, "more": min(fill + 1, room - 1), "less": fill - 1}.get(fault, fill)
    other = {
        **feed,
        "attention_mask": np.broadcast_to(np.arange(room) <= seen, mask.shape).astype(mask.dtype),
    }
    if fault == "heads":
        other |= {name: array[:, ::-1] for name, array in feed.items() if name.startswith("past")}
    wrong = graph.run(other)
    for name, array in right.items():
        if name.startswith("present"):  # what is new lies where it should
            array[:, :, fill] = wrong[name][:, :, seen]
    return {**right, "logits": wrong["logits"]}
