"""What each sublayer of a graph or a model takes: parameters, weights, caches, and its work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir

from exporter.artifacts.latency import Shape
from exporter.engines.runners.cache_form import read_cache_form
from exporter.errors import CostError
from exporter.models import sentence_folder
from exporter.models.architectures import SublayerModules, layer_modules, sublayers
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.model_folder import find_model
from graph_passes.files.storage import load_model
from graph_passes.finding.dataflow import CONTRACTIONS
from graph_passes.finding.shapes import head_count, head_size
from graph_passes.finding.sharing import own_parameters
from graph_passes.finding.weights import constant_weight, float_type, is_weight, parameters, width
from graph_passes.fusing.logits_to_keep import KEEP
from graph_passes.locate import FoundSite, survey
from graph_passes.pipeline import graph_size
from graph_passes.replacement_nodes import spare_input
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


@dataclass(frozen=True)
class CacheSize:
    """One input that holds keys, values or a state: ``fixed + per_token * positions`` bytes."""

    per_token: float = 0.0
    fixed: float = 0.0
    # positions at most, of a window or of a buffer, whose bytes are fixed; a state has none
    window: int | None = None

    def bytes(self, context: int) -> float:
        """Of one sequence of ``context`` tokens."""
        kept = context if self.window is None else min(context, self.window)
        return self.fixed + self.per_token * kept


@dataclass(frozen=True)
class SublayerSize:
    """What goes with a sublayer, its norm included."""

    parameters: int
    linear_parameters: int
    weight_bytes: int
    linear_weight_bytes: int
    takes_linear: bool = True
    caches: tuple[CacheSize, ...] = ()
    operators: int = 0  # nodes of its graph; 0 where there is none
    expert_parameters: int = 0  # of which each token takes the share `chosen`
    chosen: float = 1.0

    def used(self, tokens: int) -> tuple[float, float]:
        """Parameters that multiply a token, and bytes of weights that so many read at most."""
        held = self.weight_bytes * self.expert_parameters / max(1, self.parameters)
        unread = held * (1 - min(1.0, tokens * self.chosen))
        idle = self.expert_parameters * (1 - self.chosen)
        return self.parameters - idle, self.weight_bytes - unread

    def reach(self, context: int) -> int:
        """How many positions an attention looks at; a recurrent one at none."""
        keys = [cache for cache in self.caches if cache.per_token or cache.window is not None]
        windows = [cache.window for cache in keys if cache.window is not None]
        return 0 if self.caches and not keys else min([context, *windows])

    def kv_bytes(self, context: int, batch: int = 1) -> int:
        """What its cache takes for ``batch`` sequences of ``context`` tokens."""
        return cache_bytes(self.caches, context, batch)


def cache_bytes(caches: tuple[CacheSize, ...], context: int, batch: int) -> int:
    """What caches take for ``batch`` sequences of ``context`` tokens."""
    return batch * math.ceil(sum(cache.bytes(context) for cache in caches))


class Work(NamedTuple):
    """What one run of a model does."""

    multiplications: float  # by weights
    pair_multiplications: float  # of attentions, between positions
    weight_bytes: float  # with the start of each operator, which takes as long as some bytes
    cache_bytes: float


@dataclass(frozen=True)
class GraphSizes:
    """A graph's sublayers and the rest of it.

    Weights that several sublayers share belong to the rest: none of them removes them alone. What
    a set of sublayers removes may so be more than the sum of theirs, and never less.
    """

    sublayers: Mapping[SublayerRef, SublayerSize]
    parameters: int
    weight_bytes: int
    rest: SublayerSize = SublayerSize(0, 0, 0, 0)  # what is multiplied, and cached, beside them
    hidden: int | None = None  # width of the residual stream; None where the graph doesn't tell
    number_bytes: int = 4
    operator_bytes: int = 0  # weights that are read while an operator is started
    answers_last: bool = False  # what isn't in a sublayer is multiplied at a prompt's last position
    longest: int | None = None  # positions that the graph can hold; None where it sets no limit
    longest_text: int | None = None  # None where nothing says so
    name: str = field(default="the graph", compare=False)

    def __getitem__(self, name: SublayerRef) -> SublayerSize:
        """One sublayer's."""
        try:
            return self.sublayers[name]
        except KeyError:
            raise CostError(
                f"{self.name} has no {name[1]} {name[0]} that can be cut.",
                "depthcut inspect lists what it has.",
                code="sublayer-missing",
            ) from None

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes a cache or a state."""
        return bool(self.rest.caches) or any(
            sublayer.caches for sublayer in self.sublayers.values()
        )

    def replacement_parameters(self, replacement: Replacement) -> int:
        """Numbers that a replacement brings at most; a bias may find one that it is added to."""
        if replacement == "none":
            return 0
        if self.hidden is None:
            raise CostError(
                f"{self.name} doesn't declare the width of its residual stream, so the size of "
                f"a replacement ({replacement}) is unknown.",
                "Infer the graph's shapes first (onnx.shape_inference).",
                code="width-unknown",
            )
        if replacement == "bias":
            return self.hidden
        return self.hidden * (self.hidden + 1)

    def saved_parameters(self, name: SublayerRef, replacement: Replacement = "none") -> int:
        """How many parameters the graph loses; below 0 where a replacement is the larger one."""
        own = self[name]
        removed = own.linear_parameters if replacement == "linear" else own.parameters
        return removed - self.replacement_parameters(replacement)

    def saved_weight_bytes(self, name: SublayerRef, replacement: Replacement = "none") -> int:
        """How many bytes the weights lose; below 0 where a replacement is the larger one."""
        own = self[name]
        removed = own.linear_weight_bytes if replacement == "linear" else own.weight_bytes
        return removed - self.number_bytes * self.replacement_parameters(replacement)

    def saved_bytes(
        self, name: SublayerRef, replacement: Replacement = "none", *, context: int, batch: int
    ) -> int:
        """How many bytes the weights, and the caches of so many tokens, lose."""
        kept = self[name].kv_bytes(context, batch)
        return self.saved_weight_bytes(name, replacement) + kept

    def total_parameters(self, choices: Mapping[Any, Replacement] | None = None) -> int:
        """Parameters that are left, at most."""
        cut = (choices or {}).items()
        return self.parameters - sum(self.saved_parameters(*item) for item in cut)

    def total_bytes(
        self,
        choices: Mapping[Any, Replacement] | None = None,
        *,
        context: int = 0,
        batch: int = 1,
    ) -> int:
        """Bytes of all weights and caches that are left, at most."""
        if self.longest is not None and context > self.longest:
            raise CostError(
                f"{self.name} ends at {self.longest} positions; {context} were asked for.",
                "Ask for a shorter context.",
                code="context-too-long",
            )
        owners = (sublayer.caches for sublayer in self.sublayers.values())
        caches = self.rest.caches + tuple(cache for own in owners for cache in own)
        whole = self.weight_bytes + cache_bytes(caches, context, batch)
        cut = (choices or {}).items()
        return whole - sum(self.saved_bytes(*item, context=context, batch=batch) for item in cut)

    def work(self, cell: Shape, choices: Mapping[Any, Replacement] | None = None) -> Work:
        """What is left of a run's work where some sublayers are cut."""
        tokens, context, cut = cell.batch * cell.sequence_length, cell.total_length, choices or {}
        left = [size for name, size in self.sublayers.items() if name not in cut]
        answered = cell.batch if self.answers_last else tokens
        used, (rest, rest_held) = [size.used(tokens) for size in left], self.rest.used(answered)
        for name, how in cut.items():
            own, saved = self[name], self.saved_weight_bytes(name, how)
            used.append(
                (own.parameters - self.saved_parameters(name, how), own.weight_bytes - saved)
            )
        pairs = (
            size.parameters / (2 * (self.hidden or 1)) * size.reach(context)
            for name, size in self.sublayers.items()
            if name[1] == "attention" and name not in cut
        )
        started = self.operator_bytes * sum(size.operators for size in [*left, self.rest])
        return Work(
            tokens * math.fsum(numbers for numbers, _ in used) + answered * rest,
            tokens * math.fsum(pairs),
            math.fsum(held for _, held in used) + rest_held + started,
            float(sum(size.kv_bytes(context, cell.batch) for size in [*left, self.rest])),
        )


def sizes(onnx: Path) -> GraphSizes:
    """Weighs every sublayer of an ONNX file."""
    windows = read_cache_form(onnx).windows
    folder = find_model(onnx)
    experts = _experts(folder.config)
    result = weigh(load_model(onnx), windows, experts, name=str(onnx), longest=longest_text(onnx))
    return replace(result, longest_text=sentence_folder.longest_text(folder.home))


class _Experts(NamedTuple):
    """Experts of a layer, and the share of them that each token takes."""

    number: int = 0
    chosen: float = 1.0

    def are(self, name: str | None, shape: Sequence[object]) -> bool:
        """Whether a weight is of experts, apart or all in one."""
        packed = len(shape) == len(("expert", "rows", "columns")) and shape[0] == self.number
        return packed or "experts" in (name or "").split(".")


def _experts(config: Mapping[str, Any]) -> _Experts:
    text = config.get("text_config")
    read = text if isinstance(text, dict) else config
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((n for n in map(read.get, names) if isinstance(n, int) and n > 0), 0)
    chosen = read.get("num_experts_per_tok")
    if not number or not isinstance(chosen, int):
        return _Experts()
    return _Experts(number, min(max(chosen, 1) / number, 1.0))


def longest_text(onnx: Path) -> int | None:
    """Positions that a graph can hold, by its caches and the config beside it; None for no limit.

    Of an image its patches.
    """
    folder = find_model(onnx)
    if folder.classifies_images:
        return folder.patches
    known = (read_cache_form(onnx).longest, folder.longest_sequence)
    return min((limit for limit in known if limit is not None), default=None)


def weigh(
    model: ir.Model,
    windows: Mapping[str, int],
    experts: _Experts | None = None,
    *,
    name: str = "the graph",
    longest: int | None = None,
) -> GraphSizes:
    """Weighs every sublayer of a graph; see :func:`exporter.choose.costs.weighing.sizes`."""
    findings = survey(model)
    sites = [site for site in findings.sites if site.obstacle is None]
    if not sites:
        reason = "".join(f": {refusal.reason}" for refusal in findings.refusals[:1])
        raise CostError(f"{name} holds no sublayer that can be cut{reason}.", code="no-sublayers")
    whole = graph_size(model)
    owned = {value.name for site in sites for value in site.caches}
    others = (value for value in model.graph.inputs if value.name not in owned)
    rest = [value for value in others if CACHE_INPUT.fullmatch(value.name or "")]
    dtype, hidden = _stream_form(sites)
    return GraphSizes(
        sublayers=dict(_sized(site, windows, experts or _Experts()) for site in sites),
        parameters=whole.parameters,
        weight_bytes=whole.bytes,
        rest=_rest(sites, tuple(_cache_size(value, windows) for value in rest)),
        hidden=hidden,
        number_bytes=4 if dtype is None else math.ceil(dtype.itemsize),
        answers_last=KEEP in model.graph.initializers,
        longest=longest,
        name=name,
    )


_WRAPPING = frozenset({"Transpose", "Cast", "Identity", "DequantizeLinear"})


def _rest(sites: Sequence[FoundSite], caches: tuple[CacheSize, ...]) -> SublayerSize:
    """What is multiplied beside the sublayers: most of it where the answers are made."""
    graph = sites[0].tree.add.graph or ()  # the model's, or that of a copy
    inside = {node for site in sites for node in site.dying}
    products = (n for n in graph if n.op_type in CONTRACTIONS and n not in inside)
    read = {origin for node in products for origin in map(_origin, node.inputs) if origin}
    weights = [value for value in read if is_weight(value)]
    held = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    count = sum(map(parameters, weights))
    others = _operators(node for node in graph if node not in inside)
    return SublayerSize(count, count, held, held, caches=caches, operators=others)


def _origin(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return _origin(node.inputs[0]) if node and node.op_type in _WRAPPING else value


def _sized(
    site: FoundSite, windows: Mapping[str, int], experts: _Experts
) -> tuple[SublayerRef, SublayerSize]:
    takes_linear = not isinstance(site.branch_input, str)
    linear = spare_input(site).dying if takes_linear else site.dying
    own = _own_weights(site.dying)
    routed = [value for value in own if experts.are(value.name, tuple(value.shape or ()))]
    size = SublayerSize(
        parameters=_parameters(site.dying),
        linear_parameters=_parameters(linear),
        weight_bytes=_weight_bytes(site.dying),
        linear_weight_bytes=_weight_bytes(linear),
        takes_linear=takes_linear,
        caches=tuple(_cache_size(value, windows) for value in site.caches),
        operators=_operators(site.dying),
        expert_parameters=sum(map(parameters, routed)),
        chosen=experts.chosen,
    )
    return site.ref, size


def _operators(nodes: Iterable[ir.Node]) -> int:
    return sum(node.op_type not in ("Constant", "Identity", "Shape") for node in nodes)


def _parameters(dying: Set[ir.Node]) -> int:
    return own_parameters(dying) + sum(tensor.size for tensor in _constants(dying))


def _constants(nodes: Iterable[ir.Node]) -> list[ir.TensorProtocol]:
    return [tensor for node in nodes if (tensor := constant_weight(node)) is not None]


def _own_weights(dying: Set[ir.Node]) -> list[ir.Value]:
    read = {value for node in dying for value in node.inputs if value is not None}
    return [v for v in read if is_weight(v) and all(user in dying for user in v.consumers())]


def _weight_bytes(dying: Set[ir.Node]) -> int:
    tensors = [value.const_value for value in _own_weights(dying)]
    return sum(t.nbytes for t in [*tensors, *_constants(dying)] if t is not None)


def _cache_size(value: ir.Value, windows: Mapping[str, int]) -> CacheSize:
    """Of one input ``[batch, heads, length, head size]``, or of a state of another form."""
    if value.shape is None or value.dtype is None:
        return CacheSize()
    dims = [dim if isinstance(dim, int) else None for dim in value.shape][1:]
    name, has_length = value.name or "", len(dims) == len(("heads", "length", "head size"))
    if has_length:
        dims = [dims[0] or head_count(value), dims[1], dims[2] or head_size(value)]
    bytes_each = math.prod(dim for dim in dims if dim is not None) * value.dtype.itemsize
    if None not in dims:
        room = dims[1] if has_length and CACHE_INPUT.fullmatch(name) else None
        return CacheSize(fixed=bytes_each, window=room)
    return CacheSize(per_token=bytes_each, window=windows.get(name))


def _stream_form(sites: Iterable[FoundSite]) -> tuple[ir.DataType | None, int | None]:
    """The dtype and the width of the stream that the sites add to."""
    values = [
        value
        for site in sites
        for value in (site.tree.add.outputs[0], *(leaf.value for leaf in site.leaves))
    ]
    inputs = [site.branch_input for site in sites if isinstance(site.branch_input, ir.Value)]
    return float_type(values), width([*values, *inputs])


def module_sizes(loaded: LoadedModel) -> GraphSizes:
    """Weighs the modules of every attention and MLP of a model, without their norms and caches.

    A cut takes the norms too: it removes a few thousandths more than this says. Weights that
    several modules share belong to none of them.
    """
    model: Any = loaded.model
    owners = {module.number: module.layer for module in layer_modules(model)}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    everything, config = list(model.parameters()), model.config.get_text_config()
    experts, names = _experts(config.to_dict()), {id(p): n for n, p in model.named_parameters()}
    head = model.get_output_embeddings()
    read = [] if head is None else [head.weight]

    def size(part: SublayerModules) -> SublayerSize:
        inside = (part.contribution, part.reads)
        children = owners[part.layer].children()  # those that the branch goes through
        own = [c for c in children if any(m is s for m in c.modules() for s in inside)]
        alone = [p for child in own for p in child.parameters() if uses[id(p)] == 1]
        count, held = sum(p.numel() for p in alone), sum(p.nbytes for p in alone)
        routed = sum(p.numel() for p in alone if experts.are(names[id(p)], p.shape))
        return SublayerSize(
            count, count, held, held, expert_parameters=routed, chosen=experts.chosen
        )

    count, held = sum(p.numel() for p in read), sum(p.nbytes for p in read)
    return GraphSizes(
        {part.ref: size(part) for part in sublayers(model)},
        parameters=sum(p.numel() for p in everything),
        weight_bytes=sum(p.nbytes for p in everything),
        rest=SublayerSize(count, count, held, held),
        hidden=config.hidden_size,
        number_bytes=everything[0].element_size(),
        name=loaded.ref.source,
    )
