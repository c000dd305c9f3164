"""GGUF files and plans that can't be cut: each a clear error, and nothing is written."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut.gguf_deci import check_deci, deci_entries
from exporter.cut.gguf_layers import layers_left
from exporter.cut.gguf_surgery import GgufOptions, cut_gguf
from exporter.errors import (
    DepthcutError,
    GgufFileError,
    PlanError,
    SurgeryError,
    UnsafeInputError,
)
from exporter.models.gguf_header import read_header
from exporter.models.gguf_model_files import layers_of, read_model, sizes_of
from tests.raising import raises
from tests.tiny_gguf import HIDDEN, TinyGguf

Change = Callable[[TinyGguf], Any]


def entry(key: str, value: Any) -> Change:
    return lambda tiny: tiny.entries.update({key: value})


def without(key: str) -> Change:
    return lambda tiny: tiny.entries.pop(key)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, size: int | None = None) -> Change:
    content = bytes(4 * int(np.prod(shape)) if size is None else size)
    return lambda tiny: tiny.tensors.update({name: (shape, kind, content)})


def gone(name: str) -> Change:
    return lambda tiny: tiny.tensors.pop(name)


def drop(*named: str, replacement: str = "none") -> LoadedPlan:
    parts = [item.split(":") for item in named]
    return LoadedPlan.of(
        [
            PlannedDeletion(layer=int(n), kind=kind, replacement=replacement)  # type: ignore[arg-type]
            for kind, n in parts
        ]
    )


def head_widths(number: tuple[str, int]) -> Change:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return lambda tiny: tiny.entries.update({f"llama.{name}": number for name in names})


ONE = drop("attention:1")
BLOCK = drop("block:1")
TWO = drop("block:0", "block:1")


UNREADABLE: list[Any] = [
    (entry("general.architecture", "qwen9"), BLOCK, "entry-missing", "qwen9.block_count"),
    (without("llama.embedding_length"), drop("mlp:1"), "entry-missing", "embedding_length"),
    (without("general.architecture"), ONE, "entry-missing", "general.architecture"),
    (entry("llama.block_count", "4"), ONE, "entry-missing", "llama.block_count"),
    (entry("llama.block_count", ("I", 0)), ONE, "layer-count", "llama.block_count"),
    (entry("llama.block_count", ("I", 1 << 30)), ONE, "layer-count", "llama.block_count"),
    (without("llama.attention.head_count"), ONE, "entry-missing", "head_count"),
    (without("llama.feed_forward_length"), ONE, "entry-missing", "feed_forward_length"),
    (entry("general.alignment", ("I", 24)), ONE, "wrong-alignment", "24"),
    (entry("general.alignment", ("I", 0)), ONE, "wrong-alignment", "0"),
    (entry("general.alignment", ("I", 1 << 31)), ONE, "wrong-alignment", "alignment"),
    (entry("general.alignment", "32"), ONE, "wrong-alignment", "alignment"),
    (tensor("blk.1.odd", (33, 4), 8, 34 * 4), ONE, "wrong-shape", "blk.1.odd"),
    (tensor("blk.1.odd", (0, 4), 0, 0), ONE, "wrong-shape", "blk.1.odd"),
    (tensor("blk.1.odd", (1 << 40, 1 << 40), 0, 4), ONE, "wrong-shape", "blk.1.odd"),
    (tensor("blk.1.odd", (64, 64), 0, 4), ONE, "beyond-end", "blk.1.odd"),
    (
        lambda tiny: tiny.offsets.update({"output_norm.weight": 1 << 60}),
        ONE,
        "wrong-offset",
        "",
    ),
    (lambda tiny: tiny.offsets.update({"output_norm.weight": 0}), ONE, "overlap", ""),
    (lambda tiny: tiny.offsets.update({"output_norm.weight": 5}), ONE, "beyond-end", ""),
    (lambda tiny: setattr(tiny, "version", 1), ONE, "unknown-version", "1"),
    (lambda tiny: setattr(tiny, "version", 3 << 24), ONE, "big-endian", ""),
    (lambda tiny: setattr(tiny, "tensor_count", 1 << 62), ONE, "too-many", "tensors"),
    (lambda tiny: setattr(tiny, "entry_count", 1 << 62), ONE, "too-many", "entries"),
    (lambda tiny: setattr(tiny, "entry_count", 60_000), ONE, "too-many", ""),
    (entry("split.count", ("H", 3)), ONE, "shard-name", "00003"),
    (entry("split.count", "3"), ONE, "entry-missing", "split.count"),
]


@pytest.mark.parametrize(("change", "plan", "code", "named"), UNREADABLE)
def test_files_that_can_not_be_read(
    tmp_path: Path, change: Change, plan: LoadedPlan, code: str, named: str
) -> None:
    tiny = TinyGguf.llama()
    change(tiny)
    _refused(tmp_path, tiny, plan, GgufFileError, code, named)


UNCOMPUTED: list[Any] = [
    ("qwen2", None, ONE, "not-llama", "attention 1"),
    ("qwen2", None, drop("mlp:3"), "not-llama", "mlp 3"),
    ("mamba", None, BLOCK, "unread-architecture", "mamba"),
    ("gemma3", None, BLOCK, "pattern-of-layers", "layer 2"),
    ("smollm3", None, drop("block:0", "block:1"), "pattern-of-layers", "layer 2"),
    ("gemma2", None, drop("block:1"), "pattern-of-layers", "layer 2"),
    ("minicpm", None, BLOCK, "made-of-layer-count", "residual_scale"),
    ("gemma2", entry("gemma2.block_count", ("I", 46)), TWO, "made-of-layer-count", "44"),
    ("gemma2", entry("gemma2.block_count", ("I", 48)), TWO, "made-of-layer-count", "46"),
    ("gemma2", entry("gemma2.block_count", ("I", 44)), TWO, "", ""),
    ("gemma3", entry("gemma3.block_count", ("I", 62)), BLOCK, "made-of-layer-count", "62"),
    ("gemma3", entry("gemma3.block_count", ("I", 46)), BLOCK, "pattern-of-layers", "layer 2"),
    (
        "gemma2",
        entry("gemma2.attention.sliding_window_pattern", ("I", 3)),
        TWO,
        "pattern-of-layers",
        "layer 2",
    ),
    ("gemma2", entry("gemma2.attention.sliding_window_pattern", ("I", 2)), TWO, "", ""),
    ("gemma2", entry("gemma2.attention.sliding_window_pattern", ("I", 0)), TWO, "", ""),
    (
        "bert",
        entry("bert.moe_every_n_layers", ("I", 2)),
        BLOCK,
        "pattern-of-layers",
        "moe_every",
    ),
    ("qwen3", entry("qwen3.odd", ("I", [1, 2, 3, 4])), BLOCK, "unknown-array", "qwen3.odd"),
    ("qwen3", entry("qwen3.odd", ["a"] * 4), BLOCK, "unknown-array", "qwen3.odd"),
    ("llama", entry("llama.expert_count", ("I", 8)), ONE, "experts", "expert_count"),
    ("llama", entry("llama.attention.key_length", ("I", 8)), ONE, "head-widths", "key_length"),
    ("llama", entry("llama.rope.dimension_count", ("I", 8)), ONE, "head-widths", "rope"),
    (
        "llama",
        entry("llama.attention.head_count", ("i", [4, 4])),
        ONE,
        "wrong-array",
        "head_count",
    ),
    (
        "llama",
        entry("llama.attention.head_count", ("i", [4, -1, 4, 4])),
        ONE,
        "wrong-array",
        "",
    ),
    (
        "llama",
        entry("llama.attention.head_count", ("I", 1 << 31)),
        ONE,
        "wrong-array",
        "head_count",
    ),
    ("llama", entry("llama.attention.head_count", ("i", -4)), ONE, "wrong-array", ""),
    (
        "llama",
        entry("llama.feed_forward_length", ("Q", [96, 96, 96, 1 << 40])),
        ONE,
        "wrong-array",
        "feed_forward_length",
    ),
    ("llama", entry("llama.feed_forward_length", ("f", [96.0] * 4)), ONE, "wrong-array", ""),
    ("llama", head_widths(("Q", 1 << 32)), ONE, "head-widths", 1 << 32),
    ("llama", head_widths(("i", -16)), ONE, "head-widths", "-16"),
    ("llama", head_widths(("i", 16)), ONE, "", ""),
    ("llama", entry("llama.embedding_length", ("I", 1 << 31)), ONE, "wrong-norm", 1 << 31),
    (
        "llama",
        entry("llama.embedding_length", ("i", -64)),
        ONE,
        "wrong-norm",
        "blk.0.attn_norm",
    ),
    (
        "llama",
        tensor("blk.1.ffn_norm.weight", (HIDDEN,), 1, 2 * HIDDEN),
        ONE,
        "wrong-norm",
        "blk.1.ffn_norm.weight",
    ),
    ("llama", tensor("blk.2.attn_q_norm.weight", (16,)), ONE, "unread-tensor", "attn_q_norm"),
    ("llama", tensor("blk.2.ffn_up.scale", (1,)), ONE, "unread-tensor", "ffn_up.scale"),
    ("llama", tensor("position_embd.weight", (HIDDEN, 8)), ONE, "unread-tensor", "position"),
    ("llama", gone("blk.1.attn_norm.weight"), drop("attention:1", "mlp:1"), "", ""),
    ("llama", None, drop("attention:0"), "first-attention", "attention 0"),
    ("llama", None, drop("block:0", "attention:1"), "first-attention", "attention 1"),
    ("llama", None, drop("mixer:1"), "kind-unknown-here", "mixer 1"),
    ("llama", None, drop("cross_attention:1"), "kind-unknown-here", "cross_attention 1"),
    (
        "llama",
        None,
        drop("attention:2", replacement="bias"),
        "replacement-unheld",
        "attention 2",
    ),
    ("llama", None, drop("mlp:2", replacement="bias"), "replacement-unheld", "mlp 2"),
    ("llama", None, drop("mlp:2", replacement="linear"), "replacement-unheld", "mlp 2"),
    ("llama", None, drop("block:2", replacement="linear"), "replacement-unheld", "mlp 2"),
    ("llama", entry("depthcut.plan", "[]"), ONE, "cut-before", ""),
]


@pytest.mark.parametrize(("architecture", "change", "plan", "code", "named"), UNCOMPUTED)
def test_cuts_that_llama_cpp_would_not_compute(
    tmp_path: Path,
    architecture: str,
    change: Change | None,
    plan: LoadedPlan,
    code: str,
    named: object,
) -> None:
    tiny = TinyGguf.llama(architecture=architecture)
    if change is not None:
        change(tiny)
    if code:
        _refused(tmp_path, tiny, plan, SurgeryError, code, named)
    else:
        cut_gguf(tiny.write(tmp_path / "s.gguf"), tmp_path / "cut.gguf", plan)


def test_what_is_not_there_can_not_go(tmp_path: Path) -> None:
    tiny = TinyGguf.llama(architecture="deci")
    for name in [name for name in tiny.tensors if name.startswith("blk.1.attn")]:
        tiny.tensors.pop(name)
    tiny.entries["deci.attention.head_count"] = ("i", [4, 0, 4, 4])
    tiny.entries["deci.attention.head_count_kv"] = ("i", [2, 0, 2, 2])
    _refused(tmp_path, tiny, ONE, SurgeryError, "sublayer-missing", "attention 1")
    for plan in (drop("block:0"), drop("block:0", "attention:2")):
        _refused(tmp_path, tiny, plan, SurgeryError, "first-attention", "attention 1")
    cut_gguf(tmp_path / "s.gguf", tmp_path / "blocks.gguf", drop("block:3"))
    cut_gguf(tmp_path / "s.gguf", tmp_path / "cut.gguf", drop("attention:2"))
    wholes = read_header(tmp_path / "cut.gguf").entries["deci.attention.head_count"].wholes
    assert wholes == [4, 0, 0, 4]


OTHER_PLANS: list[Any] = [
    (drop("attention:4"), "layer-missing", "attention 4"),
    (drop("attention:1", "block:1"), "dropped-twice", "attention 1"),
    (drop("block:0", "block:1", "block:2", "block:3"), "nothing-left", ""),
    (drop("attention:1", replacement="linear"), "numbers-missing", "attention 1"),
]


@pytest.mark.parametrize(("plan", "code", "named"), OTHER_PLANS)
def test_plans_for_other_models(tmp_path: Path, plan: LoadedPlan, code: str, named: str) -> None:
    _refused(tmp_path, TinyGguf.llama(), plan, PlanError, code, named)


NO_GGUF: list[Any] = [
    (b"", "not-gguf"),
    (b"GG", "not-gguf"),
    (b"GGUF", "beyond-end"),
    (b"GGUF\3\0\0\0", "beyond-end"),
    (b"ONNX" + bytes(100), "not-gguf"),
    (b"GGUF\3\0\0\0" + b"\xff" * 400, "too-many"),
]


@pytest.mark.parametrize(("data", "code"), NO_GGUF)
def test_what_is_no_gguf_file(tmp_path: Path, data: bytes, code: str) -> None:
    path = tmp_path / "s.gguf"
    path.write_bytes(data)
    with raises(GgufFileError, code, path):
        read_model(path)


@pytest.mark.parametrize("kind", [13, 200, 9])
def test_values_of_unknown_types(tmp_path: Path, kind: int) -> None:
    data = TinyGguf.llama().data()
    at = data.index(b"general.name") + len("general.name")
    (tmp_path / "s.gguf").write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
    with pytest.raises(GgufFileError):
        read_model(tmp_path / "s.gguf")


def test_lengths_beyond_the_end_allocate_nothing(tmp_path: Path) -> None:
    """A string and an array that would fill any memory."""
    data = TinyGguf.llama().data()
    at = data.index(b"general.name") + len("general.name") + 4
    for length in (1 << 20, 1 << 40, (1 << 64) - 1):
        (tmp_path / "s.gguf").write_bytes(data[:at] + struct.pack("<Q", length) + data[at + 8 :])
        with raises(GgufFileError, "beyond-end", "general.name"):
            read_model(tmp_path / "s.gguf")
    at = data.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    for length in (1 << 20, 1 << 40, (1 << 64) - 1):
        (tmp_path / "s.gguf").write_bytes(data[:at] + struct.pack("<Q", length) + data[at + 8 :])
        with raises(GgufFileError, "beyond-end", "tokenizer.ggml.scores"):
            read_model(tmp_path / "s.gguf")


def test_a_header_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """A sparse file, whose strings could be as long as it says."""
    data = TinyGguf.llama().data()
    at = data.index(b"general.name") + len("general.name") + 4
    path = tmp_path / "s.gguf"
    path.write_bytes(data[:at] + struct.pack("<Q", 1 << 39))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with raises(GgufFileError, "too-large", path):
        read_model(path)


def test_arrays_take_no_more_memory_than_their_bytes(tmp_path: Path) -> None:
    """Strings are not kept one by one, nor numbers that are too many for the layers."""
    tiny, many = TinyGguf.llama(), 200_000
    tiny.entries["tokenizer.ggml.tokens"] = [""] * many
    tiny.entries["llama.attention.head_count"] = ("B", [4] * many)
    path = tiny.write(tmp_path / "s.gguf")
    tracemalloc.start()
    try:
        model = read_model(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 8 * many
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        with raises(SurgeryError, "wrong-array", "head_count"):
            sizes_of(model)
        assert tracemalloc.get_traced_memory()[1] - held < many
    finally:
        tracemalloc.stop()


def test_every_cut_short_file_is_refused(tmp_path: Path) -> None:
    data, path = TinyGguf.llama(layers=1).data(), tmp_path / "s.gguf"
    rng = np.random.default_rng(0)
    for end in [*range(0, 600, 7), *rng.integers(600, len(data) - 200, 60)]:
        path.write_bytes(data[:end])
        with pytest.raises(GgufFileError):
            read_model(path)


def test_spoilt_headers_are_refused_or_read(tmp_path: Path) -> None:
    """Bytes of the header at random: an error of ours, or a file that can be cut."""
    data, path = TinyGguf.llama(layers=2).data(), tmp_path / "s.gguf"
    end = data.index(b"output_norm.weight")
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        spoilt = bytearray(data)
        for place in rng.integers(4, end, rng.integers(1, 4)):
            spoilt[place] = rng.integers(0, 256)
        path.write_bytes(spoilt)
        try:
            model = read_model(path)
            layers = layers_left(ONE.plan.deletions, layers_of(model))
            check_deci(model, layers)
            assert deci_entries(model, layers)
            outcomes["read"] += 1
        except DepthcutError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_shards_that_are_missing_or_do_not_belong(tmp_path: Path) -> None:
    tiny, folder = TinyGguf.llama(), tmp_path / "model"
    folder.mkdir()
    shards = tiny.write_shards(folder, 3)
    second = shards[1].read_bytes()
    shards[1].unlink()
    with raises(GgufFileError, "shard-missing", shards[1]):
        read_model(shards[0])
    shards[1].write_bytes(shards[2].read_bytes())
    with raises(GgufFileError, "shard-mismatch", shards[1]):
        read_model(shards[0])
    shards[1].write_bytes(second[:200])
    with raises(GgufFileError, "too-many", shards[1]):
        read_model(shards[2])
    shards[1].unlink()
    outside = tmp_path / "other.gguf"
    outside.write_bytes(second)
    shards[1].symlink_to(outside)
    with pytest.raises(UnsafeInputError):
        read_model(shards[0])
    shards[1].unlink()
    shards[1].write_bytes(second)
    assert len(read_model(shards[0]).tensors) == len(tiny.tensors)


def test_a_shard_with_a_tensor_of_another(tmp_path: Path) -> None:
    tiny = TinyGguf.llama()
    shards = tiny.write_shards(tmp_path, 2)
    result = {"split.no": ("H", 1), "split.count": ("H", 2), "split.tensors.count": ("i", 38)}
    first = next(iter(tiny.tensors))
    TinyGguf(result, {first: tiny.tensors[first]}).write(shards[1])
    with raises(GgufFileError, "tensor-twice", first):
        read_model(shards[0])


def test_a_map_of_a_type_that_can_not_hold_it(tmp_path: Path) -> None:
    from tests.exporter.cut.test_gguf import healed

    source = TinyGguf.llama().write(tmp_path / "s.gguf")
    plan = healed(tmp_path, [1], intercept=0.1)
    with raises(PlanError, "intercept", "attention 1"):
        cut_gguf(source, tmp_path / "cut.gguf", plan, GgufOptions(map_type="F32"))


def _refused(
    folder: Path, tiny: TinyGguf, plan: LoadedPlan, kind: type[Any], code: str, named: object
) -> None:
    source, target = tiny.write(folder / "s.gguf"), folder / "out" / "cut.gguf"
    with raises(kind, code, *filter(None, [named])) as caught:
        cut_gguf(source, target, plan)
    assert caught.value.hint, "no way out"
    assert not target.parent.exists()


def test_sixty_kinds_of_bad_input_are_sixty_errors() -> None:
    """Told from each other by their code and by what they name, tables of files and plans alone."""
    kinds = {(code, str(named)) for *_, code, named in [*UNREADABLE, *UNCOMPUTED, *OTHER_PLANS]}
    kinds |= {(code, str(data[:8])) for data, code in NO_GGUF}
    assert len({kind for kind in kinds if kind[0]}) >= 60
