"""Which inputs and outputs are a branch's KV cache, and what of a branch must not stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import (
    Arrays,
    check_tidy,
    largest_difference,
    oracle_error,
    run,
    session,
    sites_of,
    tiny,
)

from graph_passes import Deletion, Refusal, SurgeryError, find_sites, prune_graph
from graph_passes.testing import masked_model
from tests.raising import raises
from tests.tiny_graphs import HEAD_DIM, HEADS, HIDDEN, TinySpec, _Builder, tiny_feed


class _OwnMasks(_Builder):
    """Each layer has a float mask of its own among the inputs."""

    def build(self) -> ir.Model:
        shape = ir.Shape(["batch", 1, "seq", "total"])
        floats = ir.TensorType(ir.DataType.FLOAT)
        self.masks = [
            ir.Value(name=f"mask_{layer}", type=floats, shape=shape)
            for layer in range(self._spec.layers)
        ]
        self._inputs += self.masks
        return super().build()

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        shared, self._bias = self._bias, self._op("Add", self._bias, self.masks[layer])
        made = super()._attention(x, layer)
        self._bias = shared
        return made


@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_of_a_layers_own_is_no_cache(fused: bool) -> None:
    model = _OwnMasks(TinySpec(fused=fused, annotated=False), 0).build()
    attention = sites_of(model)[0]
    assert attention.kv_inputs == ("past_key_values.0.key", "past_key_values.0.value")
    pruned, _ = prune_graph(model, [Deletion(0, "attention")], renumber_kv=True)
    names = [value.name for value in pruned.graph.inputs]
    assert "mask_0" in names
    assert "past_key_values.2.key" not in names


def test_a_cache_without_a_declared_shape_goes_too() -> None:
    model = tiny("past_from_last")
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_key_values"):
            value.shape = None
    _, report = prune_graph(model, [Deletion(1, "attention")])
    assert report.deleted[0].inputs_removed == ("past_key_values.1.key", "past_key_values.1.value")


class _CrossAttention(_Builder):
    """Every layer looks at an encoder's states, or at its keys and values from a cache."""

    published = False
    cached = False

    def build(self) -> ir.Model:
        self.states = self._input("encoder_hidden_states", "batch", "source", HIDDEN)
        return super().build()

    def _input(self, name: str, *dims: int | str) -> ir.Value:
        floats = ir.TensorType(ir.DataType.FLOAT)
        value = ir.Value(name=name, type=floats, shape=ir.Shape(dims))
        self._inputs.append(value)
        return value

    def _keys(self, layer: int, part: str) -> ir.Value:
        if self.cached:
            name = f"past_key_values.{layer}.encoder.{part}"
            return self._input(name, "batch", HEADS, "source", HEAD_DIM)
        made = self._heads(self.states)
        if self.published:
            self._publish(made, f"present.{layer}.encoder.{part}", "batch", 2, "source", 4)
            self._outputs.append(made)
        return made

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        (attention,) = self._attention(self._norm(x), layer)
        x = self._op("Add", x, attention)
        query, key, value = self._heads(x), self._keys(layer, "key"), self._keys(layer, "value")
        scores = self._op("MatMul", query, self._op("Transpose", key, perm=[0, 1, 3, 2]))
        result = self._op("MatMul", self._op("Softmax", scores), value)
        flat = self._op("Transpose", result, perm=[0, 2, 1, 3])
        flat = self._op("Reshape", flat, self._constant(np.array([0, 0, HIDDEN])))
        x = self._op("Add", x, self._op("MatMul", flat, self._weight(HIDDEN, HIDDEN)))
        (mlp,) = self._mlp(self._norm(x), layer)
        return self._op("Add", x, mlp)


class _Published(_CrossAttention):
    published = True


class _Cached(_CrossAttention):
    cached = True


class _PassedOn(_Cached):
    """The cache that comes in goes out again as it is."""

    def _keys(self, layer: int, part: str) -> ir.Value:
        made = super()._keys(layer, part)
        shown = self._op("Identity", made)
        self._publish(shown, f"present.{layer}.encoder.{part}", "batch", HEADS, "source", HEAD_DIM)
        self._outputs.append(shown)
        return made


@pytest.mark.parametrize("builder", [_Published, _PassedOn])
def test_cross_attention_takes_the_keys_that_it_publishes(builder: type[_Builder]) -> None:
    model = builder(TinySpec(layers=2), 0).build()
    names = tuple(f"present.1.encoder.{part}" for part in ("key", "value"))
    assert [site.kv_outputs for site in sites_of(model) if site.kind == "cross_attention"][
        1
    ] == names
    deletions = [Deletion(1, "cross_attention")]
    pruned, report = prune_graph(model, deletions)
    assert report.deleted[0].outputs_removed == names
    assert not any(
        ".1.encoder." in (v.name or "") for v in (*pruned.graph.inputs, *pruned.graph.outputs)
    )
    assert "present.0.encoder.key" in [value.name for value in pruned.graph.outputs]
    check_tidy(pruned)
    feed = _cross_feed(model)
    expected = run(session(masked_model(model, deletions), optimise=False), feed)
    assert largest_difference(expected, run(session(pruned, optimise=False), feed), names) == 0.0


def _cross_feed(model: ir.Model) -> Arrays:
    rng = np.random.default_rng(0)
    feed = tiny_feed(model, seq=3, past=2)
    for value in model.graph.inputs:
        if "encoder" in (value.name or ""):
            sizes = {"batch": 2, "source": 5}
            assert value.shape is not None
            shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
            feed[value.name or ""] = rng.standard_normal(shape).astype(np.float32)
    return feed


class _SharedKeys(_Published):
    """Both layers look at the keys and values that the first one publishes."""

    def _keys(self, layer: int, part: str) -> ir.Value:
        self._made = getattr(self, "_made", {})
        if part not in self._made:
            self._made[part] = super()._keys(layer, part)
        return self._made[part]


def test_published_keys_stay_while_another_layer_looks_at_them() -> None:
    model = _SharedKeys(TinySpec(layers=2), 0).build()
    cross = [site for site in sites_of(model) if site.kind == "cross_attention"]
    assert [site.kv_outputs for site in cross] == [(), ()]
    pruned, _ = prune_graph(model, [Deletion(0, "cross_attention")])
    assert "present.0.encoder.key" in [value.name for value in pruned.graph.outputs]


class _DerivedKeys(_Published):
    """The public keys are no projection of the layer's own, but half of one and more."""

    def _keys(self, layer: int, part: str) -> ir.Value:
        made = self._heads(self.states)
        shown = self._op("Tanh", made)
        self._publish(shown, f"present.{layer}.encoder.{part}", "batch", HEADS, "source", HEAD_DIM)
        self._outputs.append(shown)
        return made


def test_an_output_that_is_made_of_the_keys_keeps_cross_attention_in_place() -> None:
    sites = find_sites(_DerivedKeys(TinySpec(layers=2), 0).build())
    refused = [item for item in sites if isinstance(item, Refusal)]
    assert [(r.layer, r.kind) for r in refused] == [(n, "cross_attention") for n in range(2)]
    assert refused[0].code == "public-keys"


def test_first_step_caches_are_renumbered_as_those_of_the_later_steps() -> None:
    model = tiny("pre_norm")
    for value in list(model.graph.inputs):
        if (value.name or "").startswith("past_key_values"):
            _begin_with_nothing(model, value)
    _, report = prune_graph(model, [Deletion(0, "attention")], renumber_kv=True)
    assert report.kv_renumbering["present.1.key"] == "present.0.key"
    assert report.kv_renumbering["present.2.value"] == "present.1.value"


def _begin_with_nothing(model: ir.Model, cache: ir.Value) -> None:
    """Puts an empty constant in a cache input's place."""
    nothing = ir.tensor(np.zeros((2, HEADS, 0, HEAD_DIM), np.float32), name=cache.name)
    model.graph.inputs.remove(cache)
    cache.const_value, cache.shape = nothing, ir.Shape(nothing.shape)
    model.graph.register_initializer(cache)


def test_cross_attention_goes_with_its_projections_or_its_cache() -> None:
    inner = sites_of(_CrossAttention(TinySpec(layers=2), 0).build())[1]
    assert (inner.kind, inner.kv_inputs) == ("cross_attention", ())
    assert inner.parameters == 4 * HIDDEN * HIDDEN
    cached = sites_of(_Cached(TinySpec(layers=2), 0).build())[1]
    names = ("past_key_values.0.encoder.key", "past_key_values.0.encoder.value")
    assert (cached.kind, cached.kv_inputs) == ("cross_attention", names)


def test_a_deleted_branch_that_is_still_needed_for_its_shape_is_an_error() -> None:
    spec = TinySpec(cache=False, mask_in_branch=True, annotated=False)
    model = _LengthFromBranch(spec, 0).build()
    assert oracle_error(model, [Deletion(0, "attention")]) == 0.0
    model.graph.inputs[0].shape = ir.Shape(["batch", None])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with raises(SurgeryError, "still-computed", "attention 0", "Shape"):
        prune_graph(model, [Deletion(0, "attention")])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert oracle_error(model, [Deletion(1, "attention")]) == 0.0


class _LengthFromBranch(_Builder):
    """Every norm takes its shape from what layer 0's attention has computed."""

    context: ir.Value | None = None

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        made = super()._attention(x, layer)
        if layer == 0:
            self.context = self._nodes[-2].outputs[0]
        return made

    def _norm(self, x: ir.Value) -> ir.Value:
        normed = super()._norm(x)
        if self.context is None:
            return normed
        return self._op("Reshape", normed, self._op("Shape", self.context))


def test_a_public_shape_is_not_taken_from_another_cache() -> None:
    model = tiny("gathered_past")
    key = next(v for v in model.graph.inputs if v.name == "past_key_values.1.key")
    shape = next(user for user, _ in key.uses() if user.op_type == "Shape")
    value = shape.outputs[0]
    value.name, value.shape = "key_shape", ir.Shape([4])
    value.type = ir.TensorType(ir.DataType.INT64)
    model.graph.outputs.append(value)
    for other in model.graph.inputs:
        if (other.name or "").startswith(("past_key_values.0", "past_key_values.2")):
            other.shape = ir.Shape(["batch", 9, "past", HEAD_DIM])
    pruned, _ = prune_graph(model, [Deletion(1, "attention")])
    (public,) = [value for value in pruned.graph.outputs if value.name == "key_shape"]
    joined = public.producer()
    assert joined is not None
    heads = ir.convenience.get_const_tensor(joined.inputs[1])  # type: ignore[arg-type]
    assert heads is not None
    assert heads.numpy().tolist() == [HEADS]


class _MeanSkip(_Builder):
    """Layer 1's skip is a mean over all tokens, which broadcasts back in the sum."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer != 1:
            return super()._layer(x, layer)
        mean = self._op("ReduceMean", x, self._constant(np.array([1])))
        whole = self._op("Expand", mean, self._op("Shape", x))
        (attention,) = self._attention(self._norm(whole), layer)
        return self._op("Add", mean, attention)


def test_an_undeclared_skip_that_may_broadcast_is_refused() -> None:
    sites = find_sites(_MeanSkip(TinySpec(cache=False, annotated=False), 0).build())
    refused = [item for item in sites if isinstance(item, Refusal)]
    assert [(r.layer, r.kind) for r in refused] == [(1, "attention")]
    assert refused[0].code == "unknown-shape"


class _NormInSteps(_Builder):
    """Norms that take a mean themselves."""

    def _norm(self, x: ir.Value) -> ir.Value:
        mean = self._op("ReduceMean", x, self._constant(np.array([-1])))
        return super()._norm(self._op("Sub", x, mean))


@pytest.mark.parametrize("form", ["pre_norm", "post_norm"])
def test_an_undeclared_skip_behind_a_norm_is_none_that_broadcasts(form: str) -> None:
    model = _NormInSteps(TinySpec(form=form, annotated=False), 0).build()  # type: ignore[arg-type]
    assert len(sites_of(model)) == len(find_sites(model)) == 6
