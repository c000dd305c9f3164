"""The runtimes that a plan may be meant for, and which cuts each of them can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from exporter.artifacts.stages import PlannedDeletion
from exporter.errors import PlanError
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerKind, SublayerRef

Server = Literal[
    "llama.cpp", "vllm", "sglang", "tensorrt-llm", "mlx", "onnxruntime", "openvino", "tensorrt"
]  # fmt: skip

_KINDS_OF_ROW: tuple[tuple[int, SublayerKind], ...] = (
    (1, "attention"),
    (1, "mlp"),
    (0, "attention"),
)
_WORDS: Mapping[Replacement, str] = {"none": "drop", "bias": "bias", "linear": "map"}
STAYS = "has to stay"
_ANY: tuple[Replacement, ...] = ("none", "bias", "linear")


@dataclass(frozen=True)
class Held:
    """What a runtime can hold of a cut: what may take the places of sublayers."""

    attention: tuple[Replacement, ...] = ("none",)
    mlp: tuple[Replacement, ...] = ("none",)
    first: tuple[Replacement, ...] = ()  # of layer 0's attention
    intercept: bool = False  # whether a linear map may have one
    llama_only: bool = True  # so for models alone that compute as Llama does
    form: Literal["GGUF", "DeciLM", "ONNX"] = "DeciLM"

    def places(self, ref: SublayerRef) -> tuple[Replacement, ...]:
        """What may take a sublayer's place; empty: it has to stay."""
        if ref.kind == "attention":
            return self.attention if ref.layer else self.first
        return self.mlp if ref.kind == "mlp" else ()


_GRAPH = Held(_ANY, _ANY, _ANY, intercept=True, llama_only=False, form="ONNX")
SERVERS: Mapping[Server, Held] = {
    # The width of all heads is that of layer 0, which needs heads; a linear map has them.
    "llama.cpp": Held(("none", "linear"), first=("linear",), form="GGUF"),
    # The stream is None before the first attention has been met.
    "vllm": Held(),
    "sglang": Held(),
    "tensorrt-llm": Held(("none", "linear"), ("none", "linear"), ("none", "linear")),
    # The mask is made from the cache of the first attention that isn't dropped.
    "mlx": Held(("none", "linear"), ("none", "linear"), ("none",)),
    "onnxruntime": _GRAPH,
    "openvino": _GRAPH,
    "tensorrt": _GRAPH,
}
CHECKPOINT_SERVERS = tuple(name for name, held in SERVERS.items() if held.form == "DeciLM")


def is_plain(deletions: Sequence[PlannedDeletion]) -> bool:
    """Whether only whole blocks go, and nothing takes their places."""
    gone: dict[int, set[SublayerKind]] = {}
    for ref in (ref for deletion in deletions for ref in deletion.sublayers):
        gone.setdefault(ref.layer, set()).add(ref.kind)
    bare = all(deletion.replacement == "none" for deletion in deletions)
    return bare and all(kinds == set(BLOCK_KINDS) for kinds in gone.values())


def refuse_unheld(
    servers: Iterable[Server],
    deletions: Sequence[PlannedDeletion],
    *,
    plain: bool = True,
    healed: bool = False,  # what takes their places will be what can
) -> None:
    """Refuses a plan that one of some runtimes can't hold."""
    if plain and is_plain(deletions):
        return
    for server, deletion in product(servers, deletions):
        for ref in deletion.sublayers:
            places = SERVERS[server].places(ref)
            if not places or (deletion.replacement not in places and not healed):
                held = (
                    f"what may take its place is {' or '.join(places)}" if places else "it needs it"
                )
                raise PlanError(
                    f"{server} can't hold {ref} with {deletion.replacement} in its place: {held}.",
                    f"Plan or heal with --for {server}, drop whole blocks, or name a runtime that "
                    "holds the plan.",
                    code="replacement-unheld",
                )


@dataclass(frozen=True)
class ServingRow:
    """What one runtime can hold of a model, in words as :class:`Held`, and of a plan."""

    runtime: Server
    form: str
    attention: str
    mlp: str
    first: str
    problem: str | None = None  # why it can't hold the plan; empty where it can


def serving_rows(other_arithmetic: str, deletions: Sequence[PlannedDeletion]) -> list[ServingRow]:
    """What each runtime can hold; whole blocks without replacements go everywhere."""
    problems = where_served(deletions)
    alien_words = f"it computes such models as Llama does, and {other_arithmetic}"
    result = []
    for server, held in SERVERS.items():
        places = [held.places(SublayerRef(*ref)) for ref in _KINDS_OF_ROW]
        alien = bool(other_arithmetic) and held.llama_only
        words = [
            (", ".join(_WORDS[place] for place in own) or STAYS)
            + " without intercept" * ("linear" in own and not held.intercept)
            for own in places
        ]
        problem = problems.get(server)
        if alien:
            words = [STAYS] * len(words)
            problem = alien_words if problem == "" and not is_plain(deletions) else problem
        result.append(ServingRow(server, held.form, words[0], words[1], words[2], problem))
    return result


def where_served(deletions: Sequence[PlannedDeletion]) -> dict[Server, str]:
    """For each runtime why it can't hold a plan; empty where it can.

    A map's numbers may still have an intercept, and the model be no Llama: who writes it looks.
    """
    lines: dict[Server, str] = {}
    for server in SERVERS:
        try:
            refuse_unheld([server], deletions)
            lines[server] = ""
        except PlanError as error:
            lines[server] = error.message
    return lines


def places_of(server: Server | None, ref: SublayerRef) -> tuple[Replacement, ...]:
    """What may take a sublayer's place in a plan for a runtime; None: for any of them."""
    return _ANY if server is None else SERVERS[server].places(ref)


_ALIKE = ("llama", "mistral")
_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size")
_WIDTH_UNIT = 256


def other_arithmetic(config: Mapping[str, Any]) -> str:
    """What of a config such servers would pass over, in words; empty where nothing is."""
    kind = config.get("model_type")
    if kind is None:
        names = config.get("architectures")
        first = names[0] if isinstance(names, list) and names else ""
        return other_class(first if isinstance(first, str) else "")
    if kind not in _ALIKE:
        return f"its type is {kind}"
    if not all(_is_size(config.get(name)) for name in _SIZES):
        return ""
    hidden, heads, width = (config[name] for name in _SIZES)
    act, head = config.get("hidden_act", "silu"), config.get("head_dim")
    head = head if _is_size(head) else hidden // heads
    rules = (
        (act != "silu", f"its activation is {act}"),
        (bool(config.get("attention_bias")), "its attention has biases"),
        (bool(config.get("mlp_bias")), "its MLP has biases"),
        (config.get("sliding_window") is not None, "its attention has a window"),
        (head * heads != hidden, f"its heads are {head} wide, not hidden_size / heads"),
        (width % _WIDTH_UNIT != 0, f"its MLP is {width} wide, no multiple of {_WIDTH_UNIT}"),
    )
    return next((what for broken, what in rules if broken), "")


def other_class(name: str) -> str:
    """The same by what transformers calls the model's class alone."""
    return f"its class is {name}" if name and name not in _CLASSES else ""


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
