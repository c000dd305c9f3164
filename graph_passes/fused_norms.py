"""Takes ONNX Runtime's fused residual sums apart for the surgery, and joins what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import onnx_ir as ir

from graph_passes.finding.dataflow import is_add
from graph_passes.finding.shapes import broadcast_reason

DOMAIN = "com.microsoft"
BIAS_SLOTS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""For each skip-norm (input, skip, gamma, ...): where its bias stands, the last operand."""
_OUTPUT, _SUM = 0, 3
_EMBEDDING, _EMBEDDING_SUM = "EmbedLayerNormalization", 2
_EPSILON = 1e-12  # the schema's default, for all of them
_RMS_NORM_SINCE = 23  # the opset


def is_skip_norm(node: ir.Node) -> bool:
    """Whether a node is a residual sum and a norm in one."""
    return node.domain == DOMAIN and node.op_type in BIAS_SLOTS


@dataclass(frozen=True, eq=False)
class Apart:
    """What one fused operator was made into."""

    original: ir.Node
    norm: ir.Node
    total: ir.Node
    bias: ir.Node | None = None

    @property
    def sum(self) -> ir.Value:
        """The stream behind the sum."""
        return self.total.outputs[0 if self.total is not self.original else _EMBEDDING_SUM]

    @property
    def extra(self) -> tuple[ir.Node, ...]:
        """The nodes of which the fused operator has none of its own."""
        if self.total is self.original:
            return (self.norm,)
        return (self.total,) if self.bias is None else (self.total, self.bias)


def has_fused(graph: ir.Graph) -> bool:
    """Whether there is anything to take apart."""
    return any(_can_split(node) for node in graph)


def taken_apart(model: ir.Model) -> ir.Model:
    """The model, or, if it has fused sums, a copy with all of them taken apart."""
    if not has_fused(model.graph):
        return model
    copy = model.clone()
    take_apart(copy.graph)
    return copy


def take_apart(graph: ir.Graph) -> list[Apart]:
    """Replaces each fused sum by plain operators of the same names.

    A bias goes to the operand that is the branch. Until :func:`join` is called, the biased
    operand has the name of the operand itself, as has the norm that of the sum.
    """
    place = {node: i for i, node in enumerate(graph)}
    return [_split(graph, node, place) for node in list(graph) if _can_split(node)]


def _can_split(node: ir.Node) -> bool:
    if node.domain != DOMAIN:
        return False
    if node.op_type == _EMBEDDING:
        return len(node.outputs) > _EMBEDDING_SUM and _is_used(node.outputs[_EMBEDDING_SUM])
    if node.op_type not in BIAS_SLOTS or len(node.inputs) < 3 or None in node.inputs[:3]:
        return False
    return not any(_is_used(value) for value in node.outputs[1:_SUM])


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _split(graph: ir.Graph, node: ir.Node, place: dict[ir.Node, int]) -> Apart:
    if node.op_type == _EMBEDDING:
        return _split_embedding(graph, node, place)
    slot = BIAS_SLOTS[node.op_type]
    operands, bias = list(node.inputs[:2]), _operand(node, slot)
    biased = None
    if bias is not None:
        side = _branch_side(node, place)
        branch = operands[side]
        assert branch is not None
        biased = ir.Node("", "Add", [branch, bias], name=node.name)
        operands[side] = biased.outputs[0]
        annotate(biased.outputs[0], branch, branch.name)
    total = ir.Node("", "Add", operands, name=node.name)
    norm = _plain_norm(graph, node, total.outputs[0], node.inputs[2:slot])
    made = [total, norm] if biased is None else [biased, total, norm]
    annotate(total.outputs[0], node.outputs[_OUTPUT], None)
    if len(node.outputs) > _SUM and _is_used(node.outputs[_SUM]):
        take_over(total.outputs[0], node.outputs[_SUM])
    take_over(norm.outputs[0], node.outputs[_OUTPUT])
    graph.insert_before(node, made)
    graph.remove(node, safe=True)
    place.update(dict.fromkeys(made, place[node]))
    return Apart(node, norm, total, biased)


def _split_embedding(graph: ir.Graph, node: ir.Node, place: dict[ir.Node, int]) -> Apart:
    """Puts a norm of its own behind the sum; the operator's own result is then unread."""
    norm = _plain_norm(graph, node, node.outputs[_EMBEDDING_SUM], node.inputs[5:7])
    result, name = node.outputs[_OUTPUT], node.outputs[_OUTPUT].name
    take_over(norm.outputs[0], result)
    result.name = name
    graph.insert_after(node, norm)
    place[norm] = place[node]
    return Apart(node, norm, node)


def _plain_norm(
    graph: ir.Graph, node: ir.Node, stream: ir.Value, weights: Iterable[ir.Value | None]
) -> ir.Node:
    op_type = "LayerNormalization"
    if node.op_type == "SkipSimplifiedLayerNormalization":
        # ONNX Runtime's own name stands in the default domain, which has no RMS norm before.
        standard = graph.opset_imports.get("", 0) >= _RMS_NORM_SINCE
        op_type = "RMSNormalization" if standard else "SimplifiedLayerNormalization"
    epsilon = ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", _EPSILON))
    inputs = without_trailing_gaps([stream, *weights])
    return ir.Node("", op_type, inputs, [epsilon], name=node.name)


def without_trailing_gaps(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Inputs up to the last that is given: ONNX Runtime crashes on a norm that ends with a gap."""
    given = [place for place, value in enumerate(inputs) if value is not None]
    return list(inputs[: given[-1] + 1]) if given else []


def _operand(node: ir.Node, slot: int) -> ir.Value | None:
    return node.inputs[slot] if len(node.inputs) > slot else None


def _branch_side(node: ir.Node, place: dict[ir.Node, int]) -> int:
    """Which of a skip-norm's operands its bias belongs to.

    It was fused from the end of a branch, so it goes to the operand that is computed from the
    other. Where neither is, as with parallel branches, it goes to the one that is no sum.
    """
    one, other = node.inputs[:2]
    assert one is not None
    assert other is not None
    if _is_computed_from(one, other, place):
        return 0
    if _is_computed_from(other, one, place):
        return 1
    return int(is_add(one.producer()))


def _is_computed_from(value: ir.Value, source: ir.Value, place: dict[ir.Node, int]) -> bool:
    """Whether one value is computed from another; looks no further back than that one."""
    origin = source.producer()
    first = -1 if origin is None else place[origin]
    seen: set[ir.Node] = set()
    queue = [value]
    while queue:
        node = queue.pop().producer()
        if node is None or node in seen or place.get(node, -1) < first:
            continue
        seen.add(node)
        if source in node.inputs:
            return True
        queue.extend(above for above in node.inputs if above is not None)
    return False


def join(
    graph: ir.Graph, parts: Iterable[Apart], biases: Collection[ir.Node] = frozenset()
) -> None:
    """Fuses each norm that is left with the sum that it now stands behind, if that was fused."""
    place = {node: i for i, node in enumerate(graph)}
    alive = list(parts)
    sums = {part.sum: part for part in alive if part.total.graph is graph}
    for part in alive:
        if part.norm.graph is not graph:
            continue
        stream = part.norm.inputs[0]
        assert stream is not None
        behind = sums.get(stream)
        if part.total is part.original:
            take_over(part.original.outputs[_OUTPUT], part.norm.outputs[0])
            graph.remove(part.norm, safe=True)
        elif behind is not None and _can_fuse(part, behind, place):
            del sums[stream]
            _fuse(graph, part, behind, place, biases)
    for part in sums.values():
        _settle(graph, part)
    _rename_identities(graph, {part.original.name for part in alive})


def _can_fuse(part: Apart, behind: Apart, place: dict[ir.Node, int]) -> bool:
    """Whether there is an Add of equal shapes, and the norm's weights are known where it stands."""
    if behind.total is behind.original:
        return False
    one, other = behind.total.inputs
    assert one is not None
    assert other is not None
    if broadcast_reason(one, other, ()) or broadcast_reason(other, one, ()):
        return False  # an Add broadcasts, a fused sum does not
    producers = [value.producer() for value in part.norm.inputs[1:] if value is not None]
    return all(node is None or place[node] < place[behind.total] for node in producers)


def _fuse(
    graph: ir.Graph,
    part: Apart,
    behind: Apart,
    place: dict[ir.Node, int],
    biases: Collection[ir.Node],
) -> None:
    """Makes one operator of a norm and the sum before it."""
    add, norm, original = behind.total, part.norm, part.original
    operands, biased = _unbiased(behind, biases)
    bias = [] if biased is None else [biased.inputs[1]]
    slot = BIAS_SLOTS[original.op_type]
    weights = [*norm.inputs[1:], *[None] * (slot - 1 - len(norm.inputs))]
    read = add.outputs[0].is_graph_output() or len(add.outputs[0].uses()) > 1
    fused = ir.Node(
        original.domain,
        original.op_type,
        without_trailing_gaps([*operands, *weights, *bias]),
        list(original.attributes.values()),
        num_outputs=_SUM + 1 if read else 1,
        name=original.name,
        doc_string=original.doc_string,
        metadata_props=dict(original.metadata_props),
    )
    for unused in fused.outputs[1:_SUM]:
        unused.name = ""
    graph.insert_before(add, fused)
    take_over(fused.outputs[_OUTPUT], norm.outputs[0])
    graph.remove(norm, safe=True)
    if read:
        take_over(fused.outputs[_SUM], add.outputs[0])
    graph.remove([add] if biased is None else [add, biased], safe=True)
    place[fused] = place[add]


def _unbiased(
    part: Apart, biases: Collection[ir.Node]
) -> tuple[list[ir.Value | None], ir.Node | None]:
    """A sum's operands, and the Add of a bias to one of them if no one else reads it."""
    operands = list(part.total.inputs)
    for slot, operand in enumerate(operands):
        add = None if operand is None else operand.producer()
        is_bias = add is not None and (add is part.bias or add in biases)
        if add is not None and is_bias and len(add.outputs[0].uses()) == 1:
            operands[slot] = add.inputs[0]
            return operands, add
    return operands, None


def _settle(graph: ir.Graph, part: Apart) -> None:
    """Gives what stands beside a sum that stays on its own other names than the sum's."""
    if part.norm.graph is graph and part.total is not part.original:
        graph.remove(part.norm)
        part.norm.name = None  # the graph finds a free one
        graph.insert_after(part.total, part.norm)
    if part.bias is not None and part.bias.graph is graph:
        graph.remove(part.bias)
        part.bias.name = part.bias.outputs[0].name = None
        graph.insert_before(part.total, part.bias)


def annotate(value: ir.Value, like: ir.Value, name: str | None) -> None:
    """Gives a value a name, and the type and shape of another."""
    value.name, value.type = name, like.type
    value.shape = like.shape.copy() if like.shape is not None else None


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Puts one value in another's place, name and all."""
    annotate(new, old, old.name)
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _rename_identities(graph: ir.Graph, names: Collection[str | None]) -> None:
    """Gives an Identity in a sum's place, which keeps two public names apart, one of its own.

    It has the sum's, as has the norm that was fused with it.
    """
    taken = Counter(node.name for node in graph) if names else Counter[str | None]()
    for node in graph:
        if node.op_type == "Identity" and node.name in names and taken[node.name] > 1:
            number = next(n for n in count(1) if f"{node.name}.{n}" not in taken)
            node.name = f"{node.name}.{number}"
            taken[node.name] += 1
