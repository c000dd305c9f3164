"""Sublayers that mix tokens without being attentions, and the states that they keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import largest_difference, oracle_error, run, session, sites_of

from graph_passes import Deletion, Refusal, find_sites, prune_graph
from graph_passes.testing import masked_model
from tests.tiny_graphs import HIDDEN, TinySpec, _Builder, tiny_feed

WINDOW = 3


class _Convolutions(_Builder):
    """Every layer has a gated convolution of several tokens where attention would be."""

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        opened = self._op("MatMul", x, self._weight(HIDDEN, HIDDEN))
        return [self._op("MatMul", self._convolved(opened), self._weight(HIDDEN, HIDDEN))]

    def _convolved(self, x: ir.Value) -> ir.Value:
        turned = self._op("Transpose", x, perm=[0, 2, 1])
        weight = self._weight(HIDDEN, 1, WINDOW)
        made = self._op("Conv", turned, weight, group=HIDDEN, pads=[WINDOW - 1, 0])
        return self._op("Transpose", made, perm=[0, 2, 1])


class _OfPictures(_Convolutions):
    """The same over floats instead of tokens."""

    def build(self) -> ir.Model:
        model = super().build()
        model.graph.inputs[0].dtype = ir.DataType.FLOAT
        return model


def test_a_model_of_mixers_alone_can_be_cut() -> None:
    model = _Convolutions(TinySpec(cache=False), 0).build()
    kinds = [(site.layer, site.kind) for site in sites_of(model)]
    assert kinds == [(layer, kind) for layer in range(3) for kind in ("mixer", "mlp")]
    for layer in range(3):
        assert oracle_error(model, [Deletion(layer, "mixer")]) < 1e-6


def test_convolutions_over_something_else_than_tokens_are_no_transformer() -> None:
    (refusal,) = find_sites(_OfPictures(TinySpec(cache=False), 0).build())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "no-attention"


class _StatefulMixers(_Convolutions):
    """One token at a time, with a window of earlier ones and a recurrent state per layer."""

    def _convolved(self, x: ir.Value) -> ir.Value:
        layer = len(self._outputs) // 2
        past = self._state(f"past_conv.{layer}", "batch", HIDDEN, WINDOW - 1)
        turned = self._op("Transpose", x, perm=[0, 2, 1])
        window = self._op("Concat", past, turned, axis=2)
        made = self._op("Conv", window, self._weight(HIDDEN, 1, WINDOW), group=HIDDEN)
        kept = self._op(
            "Slice", window, *map(self._constant, (np.array([1]), np.array([9]), np.array([2])))
        )
        self._publish(kept, f"present_conv.{layer}", "batch", HIDDEN, WINDOW - 1)
        step = self._op("Transpose", made, perm=[0, 2, 1])
        state = self._recurred(step, layer)
        self._outputs.append(kept)
        self._outputs.append(state)
        return self._op("MatMul", step, state)

    def _recurred(self, step: ir.Value, layer: int) -> ir.Value:
        """The delta rule: the state forgets what it answers to a key, and learns the value."""
        state = self._state(f"past_recurrent.{layer}", "batch", HIDDEN, HIDDEN)
        lacking = self._op("Sub", step, self._op("MatMul", step, state))
        key = self._op("Transpose", step, perm=[0, 2, 1])
        made = self._op("Add", state, self._op("MatMul", key, lacking))
        self._publish(made, f"present_recurrent.{layer}", "batch", HIDDEN, HIDDEN)
        return made

    def _state(self, name: str, *dims: Any) -> ir.Value:
        floats = ir.TensorType(ir.DataType.FLOAT)
        value = ir.Value(name=name, type=floats, shape=ir.Shape(dims))
        self._inputs.append(value)
        return value


def _names(layer: int, stem: str) -> tuple[str, ...]:
    return (f"{stem}_conv.{layer}", f"{stem}_recurrent.{layer}")


def test_states_go_with_their_mixer() -> None:
    model = _StatefulMixers(TinySpec(cache=False, annotated=False), 0).build()
    mixers = [site for site in sites_of(model) if site.kind == "mixer"]
    assert [site.kv_inputs for site in mixers] == [_names(n, "past") for n in range(3)]
    assert [site.kv_outputs for site in mixers] == [_names(n, "present") for n in range(3)]
    deletions = [Deletion(1, "mixer"), Deletion(2, "mlp")]
    pruned, report = prune_graph(model, deletions, renumber_kv=True)
    assert report.kv_renumbering == {
        before: after
        for stem in ("past", "present")
        for before, after in zip(_names(2, stem), _names(1, stem), strict=True)
    }
    feed = tiny_feed(model, seq=1)
    rng = np.random.default_rng(0)
    for name in [name for site in mixers for name in site.kv_inputs]:
        width = WINDOW - 1 if "conv" in name else HIDDEN
        feed[name] = rng.standard_normal((2, HIDDEN, width)).astype(np.float32) * 0.1
    expected = run(session(masked_model(model, deletions), optimise=False), feed)
    renamed = report.kv_renumbering
    kept = {renamed.get(k, k): v for k, v in feed.items() if k not in _names(1, "past")}
    back = {after: before for before, after in renamed.items()}
    have = run(session(pruned, optimise=False), kept)
    have = {back.get(name, name): value for name, value in have.items()}
    assert largest_difference(expected, have, _names(1, "present")) < 1e-4


class _WithoutMlp(_StatefulMixers):
    """Layers of one sublayer each: mixer, attention, mixer."""

    stateful = True

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        make = _Builder._attention if layer == 1 else _StatefulMixers._attention
        return self._op("Add", x, make(self, self._norm(x), layer)[0])

    def _convolved(self, x: ir.Value) -> ir.Value:
        return super()._convolved(x) if self.stateful else _Convolutions._convolved(self, x)


class _WithoutState(_WithoutMlp):
    stateful = False


def test_a_mixer_behind_an_attention_is_told_by_its_state() -> None:
    model = _WithoutMlp(TinySpec(cache=False, annotated=False), 0).build()
    kinds = [(site.layer, site.kind) for site in sites_of(model)]
    assert kinds == [(0, "mixer"), (1, "attention"), (2, "mixer")]


def test_without_a_state_it_might_be_an_mlp_with_a_convolution() -> None:
    (refusal,) = find_sites(_WithoutState(TinySpec(cache=False, annotated=False), 0).build())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "ambiguous-mixer"


class _ConvolutionalPositions(_Builder):
    """A convolution over the embeddings, added before the first layer."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer == 0:
            turned = self._op("Transpose", x, perm=[0, 2, 1])
            weight = self._weight(HIDDEN, HIDDEN, WINDOW)
            made = self._op("Relu", self._op("Conv", turned, weight, pads=[1, 1]))
            x = self._op("Add", x, self._op("Transpose", made, perm=[0, 2, 1]))
        return super()._layer(x, layer)


@pytest.mark.parametrize("form", ["pre_norm", "post_norm"])
def test_a_convolutional_position_embedding_is_no_layer(form: str) -> None:
    usual = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]
    spec = TinySpec(form=form, cache=False)  # type: ignore[arg-type]
    model = _ConvolutionalPositions(spec, 0).build()
    assert [(site.layer, site.kind) for site in sites_of(model)] == usual
    # Nor is it once the attention behind it is gone.
    pruned, _ = prune_graph(model, [Deletion(0, "attention")])
    assert [(site.layer, site.kind) for site in sites_of(pruned)] == usual[1:]


def test_the_same_convolution_with_products_of_its_own_is_a_mixer() -> None:
    model = _MixerFirst(TinySpec(cache=False), 0).build()
    kinds = [(site.layer, site.kind) for site in sites_of(model)]
    assert kinds[:3] == [(0, "mixer"), (1, "attention"), (1, "mlp")]


class _MixerFirst(_Convolutions):
    """A mixer without an MLP, then layers of attention and MLP."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer == 0:
            return self._op("Add", x, super()._attention(self._norm(x), layer)[0])
        return super()._layer(x, layer)

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return _Builder._attention(self, x, layer)
