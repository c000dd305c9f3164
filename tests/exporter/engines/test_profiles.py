from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from exporter.engines.build import profiles
from exporter.engines.build.profiles import (
    Ranges,
    Span,
    fitting,
    graph_inputs,
    phases_of,
    refuse_unknown_axes,
)
from exporter.engines.tensors import TensorSpec
from exporter.errors import OptionError, UsageError
from graph_passes import save_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

INT64, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
IDS = TensorSpec("input_ids", INT64, ("batch", "seq"))
MASK = TensorSpec("attention_mask", INT64, ("batch", "total"))
CACHE = TensorSpec("past_key_values.0.key", FLOAT, ("batch", 2, "past", 16))
RANGES = Ranges(batch=Span(1, 2, 4), prompt=Span(1, 8, 16), context=Span(0, 32, 64))


def profile(inputs: Sequence[TensorSpec], phase: str, ranges: Ranges) -> dict[str, list[Span]]:
    """By input, the sizes of its axes."""
    shapes = profiles.profile(inputs, phase, ranges).shapes
    return {name: list(map(Span, s.low, s.usual, s.high)) for name, s in shapes.items()}


def test_a_profile_has_the_sizes_of_its_phase() -> None:
    result = profile([IDS, MASK, CACHE], "decode", RANGES)
    assert result["input_ids"] == [Span(1, 2, 4), Span(1, 1, 1)]
    assert result["attention_mask"][1] == Span(1, 33, 65)
    assert result["past_key_values.0.key"] == [
        Span(1, 2, 4), Span(2, 2, 2), Span(0, 32, 64), Span(16, 16, 16),
    ]  # fmt: skip
    result = profile([IDS, MASK, CACHE], "prefill", RANGES)
    assert result["input_ids"][1] == result["attention_mask"][1] == Span(1, 8, 16)
    assert result["past_key_values.0.key"][2] == Span(0, 0, 0)
    assert phases_of([IDS, MASK]) == ("encode",)
    assert profile([IDS, MASK], "encode", RANGES)["attention_mask"][1] == Span(1, 8, 16)


def test_a_decoder_has_no_encode_and_an_encoder_no_decode() -> None:
    with raises(UsageError, "phase-missing", "prefill", "decode"):
        profile([IDS, CACHE], "encode", RANGES)
    with raises(UsageError, "phase-missing", "encode"):
        profile([IDS], "decode", RANGES)


@pytest.mark.parametrize("name", ["batch", "prompt", "context"])
def test_a_usual_range_for_an_axis_that_is_not_there_is_refused(name: str) -> None:
    image = TensorSpec("pixel_values", FLOAT, (1, 3, "height", 224))
    ranges = Ranges(**{name: Span(1, 2, 3)}, dims=("height=4",))
    with raises(UsageError, "range-without-axis", f"--{name}-range"):
        refuse_unknown_axes([image], ranges)
    refuse_unknown_axes([IDS, MASK, CACHE], Ranges(**{name: Span(1, 2, 3)}))


def test_an_encoder_has_no_context() -> None:
    refuse_unknown_axes([IDS, MASK], Ranges(prompt=Span(1, 8, 16)))
    given = Ranges(prompt=Span(1, 8, 16), context=Span(1, 8, 16))
    with raises(UsageError, "range-without-axis", "--context-range"):
        refuse_unknown_axes([IDS, MASK], given)
    assert fitting([IDS, MASK], given) == Ranges(prompt=Span(1, 8, 16))
    assert fitting([IDS, MASK, CACHE], given) == given


def test_an_axis_of_unknown_meaning_must_be_given() -> None:
    image = TensorSpec("pixel_values", FLOAT, ("batch", 3, "height", 224))
    with raises(UsageError, "size-missing", "'height'", "'pixel_values'") as caught:
        profile([image], "encode", RANGES)
    assert caught.value.hint == "Give it: --dim height=MIN:USUAL:MAX"
    given = Ranges(dims=("height=32:64:96",))
    assert profile([image], "encode", given)["pixel_values"] == [
        Span(1, 1, 1), Span(3, 3, 3), Span(32, 64, 96), Span(224, 224, 224),
    ]  # fmt: skip


def test_a_range_for_an_axis_that_is_not_there_is_refused() -> None:
    given = Ranges(dims=("hight=32", "seq=4"))
    with raises(UsageError, "unknown-axis", "'hight'") as caught:
        refuse_unknown_axes([IDS, MASK], given)
    assert "batch, seq, total" in caught.value.hint
    refuse_unknown_axes([IDS, MASK], Ranges(dims=("seq=4",)))


@pytest.mark.parametrize("text", ["", "a", "1:2", "3:2:1", "1:2:3:4", "-1:0:1"])
def test_what_is_no_range_is_refused(text: str) -> None:
    assert Span.parse("7") == Span(7, 7, 7)
    with pytest.raises(UsageError):
        Span.parse(text)


@pytest.mark.parametrize("bad", [{"batch": "0"}, {"prompt": "0:1:2"}, {"dims": ["64"]}])
def test_ranges_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Ranges(**bad)  # type: ignore[arg-type]


def test_sizes_that_are_digits_in_a_name_are_numbers(tmp_path: Path) -> None:
    model = tiny_model(TinySpec())
    import onnx_ir as ir

    for value in model.graph.inputs:
        if value.name == "past_key_values.0.key":
            value.shape = ir.Shape(["batch", "2", "past", "4"])
    save_model(model, tmp_path / "m.onnx")
    result = {spec.name: spec for spec in graph_inputs(tmp_path / "m.onnx")}
    assert result["past_key_values.0.key"].shape == ("batch", 2, "past", 4)
    assert phases_of([result["past_key_values.0.key"]]) == ("prefill", "decode")
    assert phases_of([result["input_ids"]]) == ("encode",)
