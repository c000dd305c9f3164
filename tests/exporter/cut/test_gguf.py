"""Cuts of GGUF files: what llama.cpp computes, what stays byte for byte, and what is refused."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cli import run
from exporter.cut.gguf_deci import ZERO_WIDTH, check_deci, deci_entries
from exporter.cut.gguf_layers import layers_left
from exporter.cut.gguf_surgery import cut_gguf
from exporter.errors import (
    DepthcutError,
    GgufFileError,
    PlanError,
    SurgeryError,
    UnsafeInputError,
    UsageError,
)
from exporter.models.gguf_header import read_header
from exporter.models.gguf_model_files import layers_of, read_model, sizes_of
from graph_passes.plan_record import PLAN_KEY
from tests.raising import raises
from tests.text_graphs import contents
from tests.tiny_gguf import HEADS, HIDDEN, KV_HEADS, WIDTH, TinyGguf, llama_cpp_logits, tensors_of

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
NOTHING = np.zeros((HIDDEN, HIDDEN))


def drop(*named: str, replacement: Any = "none") -> LoadedPlan:
    deletions = []
    for item in named:
        kind, layer = item.split(":")
        deletions.append(
            PlannedDeletion(layer=int(layer), kind=kind, replacement=replacement)  # type: ignore[arg-type]
        )
    return LoadedPlan.of(deletions)


def healed(folder: Path, layers: list[int], *, intercept: float = 0.0) -> LoadedPlan:
    """A plan with maps in place of attentions, and its file of numbers."""
    rng = np.random.default_rng(1)
    numbers = {}
    for layer in layers:
        key = f"attention.{layer}"
        numbers[f"{key}.bias"] = np.full(HIDDEN, intercept, np.float32)
        matrix = 0.1 * rng.standard_normal((HIDDEN, HIDDEN))
        numbers[f"{key}.weight"] = matrix.astype(np.float32)
    save_file(numbers, folder / "numbers.safetensors")
    sha256 = hashlib.sha256((folder / "numbers.safetensors").read_bytes()).hexdigest()
    plan = PruningPlan(
        deletions=[
            PlannedDeletion(layer=n, kind="attention", replacement="linear") for n in layers
        ],
        replacements={"path": "numbers.safetensors", "sha256": sha256},  # type: ignore[arg-type]
    )
    plan.write(folder / "plan.json")
    return LoadedPlan.read(folder / "plan.json")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return TinyGguf.llama().write(tmp_path / "source.gguf")


@pytest.mark.parametrize(
    "dropped",
    [
        ["attention:1"],
        ["attention:3", "attention:2"],
        ["mlp:0", "mlp:3"],
        ["attention:1", "mlp:2"],
        ["block:1"],
        ["block:0", "block:3"],
        ["attention:3", "mlp:3", "attention:1"],
        ["block:0", "attention:2", "mlp:1"],
    ],
)
def test_a_cut_computes_what_the_masked_original_does(
    source: Path, tmp_path: Path, dropped: list[str]
) -> None:
    plan, target = drop(*dropped), tmp_path / "cut.gguf"
    cut_gguf(source, target, plan)
    masked = {(ref.layer, ref.kind): NOTHING for d in plan.plan.deletions for ref in d.sublayers}
    wanted = llama_cpp_logits(source, TOKENS, masked)
    assert np.abs(wanted - llama_cpp_logits(source, TOKENS)).max() > 0.1
    assert np.abs(wanted - llama_cpp_logits(target, TOKENS)).max() < 1e-9


def test_without_its_zeros_an_mlp_takes_the_attention_with_it(source: Path, tmp_path: Path) -> None:
    """The trap in llama.cpp for which an MLP of zeros is written."""
    cut_gguf(source, tmp_path / "cut.gguf", drop("mlp:2"))
    entries = read_header(tmp_path / "cut.gguf").entries
    assert entries["deci.feed_forward_length"].wholes == [WIDTH, WIDTH, ZERO_WIDTH, WIDTH]
    spoilt = TinyGguf.llama(architecture="deci")
    spoilt.entries["deci.feed_forward_length"] = ("i", [WIDTH, WIDTH, 0, WIDTH])
    wrong = llama_cpp_logits(spoilt.write(tmp_path / "wrong.gguf"), TOKENS)
    assert np.abs(wrong - llama_cpp_logits(tmp_path / "cut.gguf", TOKENS)).max() > 0.1


def test_a_map_takes_an_attentions_place(source: Path, tmp_path: Path) -> None:
    plan, target = healed(tmp_path, [0, 2]), tmp_path / "cut.gguf"
    facts = cut_gguf(source, target, plan)
    masked = {}
    for ref, given in plan.tensors.items():
        masked[tuple(ref)] = np.asarray(given.weight, np.float64).T
    wanted = llama_cpp_logits(source, TOKENS, masked)  # type: ignore[arg-type]
    floats = llama_cpp_logits(target, TOKENS)
    assert np.abs(wanted - floats).max() < 2e-2 * np.abs(wanted).max()
    entries = read_header(target).entries
    assert entries["deci.attention.head_count"].wholes == [HEADS] * 4
    assert entries["deci.attention.head_count_kv"].wholes == [0, KV_HEADS, 0, KV_HEADS]
    assert (facts.tensors_added, facts.tensors_removed) == (2, 8)


def test_kept_tensors_are_the_same_bytes_and_a_file_is_smaller_by_the_others(
    source: Path, tmp_path: Path
) -> None:
    cut_gguf(source, tmp_path / "cut.gguf", drop("attention:2", "mlp:1", "block:0"))
    before, after = tensors_of(source), tensors_of(tmp_path / "cut.gguf")
    made = {f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")}
    for name, content in after.items():
        number = int(name.split(".")[1]) if name.startswith("blk.") else -1
        original = name.replace(f"blk.{number}.", f"blk.{number + 1}.")
        assert name in made or content == before[original], name
    assert not any(any(after[name]) for name in made)
    assert not [name for name in after if name.startswith("blk.1.attn")]
    facts = cut_gguf(source, tmp_path / "cut.gguf", drop("attention:1"))
    gone = [content for name, content in before.items() if name.startswith("blk.1.attn")]
    assert facts.bytes_before - facts.bytes_after == sum(map(len, gone))
    assert facts.tensors_removed == len(gone) == 5
    assert facts.architecture == ("llama", "deci")


def test_metadata_stays_but_for_the_layers(source: Path, tmp_path: Path) -> None:
    cut_gguf(source, tmp_path / "a.gguf", drop("attention:1"))
    cut_gguf(source, tmp_path / "b.gguf", drop("block:1"))
    before = read_header(source).entries
    deci, own = (read_header(tmp_path / name).entries for name in ("a.gguf", "b.gguf"))
    for key, entry in before.items():
        if not key.startswith(("llama.", "general.architecture")):
            assert deci[key] == own[key] == entry
    assert own["llama.block_count"].whole == 3
    assert deci["deci.block_count"].whole == 4
    assert deci["deci.attention.head_count"].wholes == [4, 0, 4, 4]
    assert deci["deci.attention.key_length"].whole == HIDDEN // HEADS
    assert deci["deci.rope.freq_base"].value == before["llama.rope.freq_base"].value
    assert json.loads(deci[PLAN_KEY].text or "")[0]["layer"] == 1
    assert {key for key in deci if key.startswith("llama.")} == set()


def test_arrays_of_layers_lose_those_that_go(tmp_path: Path) -> None:
    tiny = TinyGguf.llama(architecture="qwen3")
    tiny.entries["qwen3.feed_forward_length"] = ("I", [1, 2, 3, 4])
    cut_gguf(tiny.write(tmp_path / "s.gguf"), tmp_path / "cut.gguf", drop("block:1", "block:2"))
    entries = read_header(tmp_path / "cut.gguf").entries
    assert entries["qwen3.feed_forward_length"].wholes == [1, 4]
    assert entries["general.architecture"].text == "qwen3"


@pytest.mark.parametrize("kind", [12, 39, 99])
def test_blocks_of_any_type_are_copied(tmp_path: Path, kind: int) -> None:
    """Of a type that isn't known, all up to the next tensor."""
    tiny = TinyGguf.llama(architecture="qwen3")
    size = {12: 144 * 40, 39: 17 * 8 * 40}.get(kind, 777)
    content = np.random.default_rng(0).bytes(size)
    tiny.tensors["token_embd.weight"] = ((256, 40), kind, content)
    cut_gguf(tiny.write(tmp_path / "s.gguf"), tmp_path / "cut.gguf", drop("block:1"))
    token_embd_weight = tensors_of(tmp_path / "cut.gguf")["token_embd.weight"]
    assert token_embd_weight[:size] == content
    assert not any(token_embd_weight[size:])


def test_shards_are_read_and_become_one_file(tmp_path: Path) -> None:
    tiny = TinyGguf.llama()
    whole = tiny.write(tmp_path / "whole.gguf")
    plan = drop("attention:2", "block:3")
    cut_gguf(whole, tmp_path / "a.gguf", plan)
    for number, shard in enumerate(tiny.write_shards(tmp_path, 3)):
        cut_gguf(shard, tmp_path / f"b{number}.gguf", plan)
        assert (tmp_path / f"b{number}.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_neither_inputs_nor_others_files_are_overwritten(tmp_path: Path) -> None:
    shards = TinyGguf.llama().write_shards(tmp_path, 2)
    link, notes = tmp_path / "link.gguf", tmp_path / "notes.txt"
    link.hardlink_to(shards[1])
    notes.write_text("mine")
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    for target, kind, code in (
        *((place, UsageError, "overwrites-input") for place in (*shards, link)),
        (notes, UsageError, "foreign-file"),
        (tmp_path / "folder", SurgeryError, "is-a-folder"),
    ):
        with raises(kind, code, target):
            cut_gguf(shards[0], target, drop("attention:1"))
    target = tmp_path / "out" / "cut.gguf"
    cut_gguf(shards[0], target, drop("attention:1"))
    earlier = target.read_bytes()
    with raises(PlanError, "replacement-unheld", "attention 1"):
        cut_gguf(shards[0], target, healed(tmp_path, [1], intercept=0.5))
    assert contents(target.parent) == {"cut.gguf": earlier}
    assert {**contents(tmp_path), **before} == contents(tmp_path)


def test_a_plan_for_another_file_is_told(source: Path, tmp_path: Path) -> None:
    plan = healed(tmp_path, [1]).plan
    own = hashlib.sha256(source.read_bytes()).hexdigest()
    for sha256, refused in (("0" * 64, True), (own, False)):
        path = plan.model_copy(update={"made_from": {"model": sha256}}).write(tmp_path / "p.json")
        with raises(PlanError, "another-model") if refused else nullcontext():
            cut_gguf(source, tmp_path / "cut.gguf", LoadedPlan.read(path))


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "cut.gguf"
    assert run(["gguf", str(source), "--drop", "attention:1,2", "-o", str(target), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["architecture"] == ["llama", "deci"]
    assert content["files"] == ["cut.gguf"]
    other = tmp_path / "other.gguf"
    assert run(["gguf", str(source), "--drop", "attention:1", "-o", str(other)]) == 0
    judged = f"depthcut compare llama.cpp:{source} llama.cpp:{other} -o report"
    assert judged in capsys.readouterr().out
    assert run(["gguf", str(source), "-o", str(target)]) == 2
    assert run(["gguf", str(source), "--drop", "attention:9", "-o", str(target)]) == 2
    assert run(["gguf", str(source), "--drop", "attention:1", "-o", str(source)]) == 2


Change = Callable[[TinyGguf], Any]


def entry(key: str, value: Any) -> Change:
    return lambda tiny: tiny.entries.update({key: value})


def own(key: str, value: Any) -> Change:
    """An entry of the file's architecture."""
    return lambda tiny: tiny.entries.update(
        {f"{tiny.entries['general.architecture']}.{key}": value}
    )


def without(key: str) -> Change:
    return lambda tiny: tiny.entries.pop(key)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, size: int | None = None) -> Change:
    content = bytes(4 * int(np.prod(shape)) if size is None else size)
    return lambda tiny: tiny.tensors.update({name: (shape, kind, content)})


def made(**fields: Any) -> Change:
    return lambda tiny: vars(tiny).update(fields)


def gone(name: str) -> Change:
    return lambda tiny: tiny.tensors.pop(name)


def head_widths(number: tuple[str, int]) -> Change:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return lambda tiny: tiny.entries.update({f"llama.{name}": number for name in names})


ONE = drop("attention:1")
BLOCK = drop("block:1")
TWO = drop("block:0", "block:1")
HEADS_OF, WIDTHS = "attention.head_count", "feed_forward_length"
WINDOWS, NORM = "attention.sliding_window_pattern", "blk.1.ffn_norm.weight"


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
    (made(offsets={"output_norm.weight": 1 << 60}), ONE, "wrong-offset", ""),
    (made(offsets={"output_norm.weight": 0}), ONE, "overlap", ""),
    (made(offsets={"output_norm.weight": 5}), ONE, "beyond-end", ""),
    (made(version=1), ONE, "unknown-version", "1"),
    (made(version=3 << 24), ONE, "big-endian", ""),
    (made(tensor_count=1 << 62), ONE, "too-many", "tensors"),
    (made(entry_count=1 << 62), ONE, "too-many", "entries"),
    (made(entry_count=60_000), ONE, "too-many", ""),
    (entry("split.count", ("H", 3)), ONE, "shard-missing", "00003"),
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
    ("qwen2", None, ONE, "unread-architecture", "attention 1"),
    ("qwen2", None, drop("mlp:3"), "unread-architecture", "mlp 3"),
    ("mamba", None, BLOCK, "unread-architecture", "mamba"),
    ("gemma3", None, BLOCK, "unread-architecture", "layer 2"),
    ("smollm3", None, TWO, "unread-architecture", "layer 2"),
    ("gemma2", None, BLOCK, "unread-architecture", "layer 2"),
    ("minicpm", None, BLOCK, "unread-architecture", "residual_scale"),
    ("gemma2", own("block_count", ("I", 46)), TWO, "unread-architecture", "44"),
    ("gemma2", own("block_count", ("I", 48)), TWO, "unread-architecture", "46"),
    ("gemma2", own("block_count", ("I", 44)), TWO, "", ""),
    ("gemma3", own("block_count", ("I", 62)), BLOCK, "unread-architecture", "62"),
    ("gemma3", own("block_count", ("I", 46)), BLOCK, "unread-architecture", "layer 2"),
    ("gemma2", own(WINDOWS, ("I", 3)), TWO, "unread-architecture", "layer 2"),
    ("gemma2", own(WINDOWS, ("I", 2)), TWO, "", ""),
    ("gemma2", own(WINDOWS, ("I", 0)), TWO, "", ""),
    ("bert", own("moe_every_n_layers", ("I", 2)), BLOCK, "unread-architecture", "moe_every"),
    ("qwen3", own("odd", ("I", [1, 2, 3, 4])), BLOCK, "unread-architecture", "qwen3.odd"),
    ("qwen3", own("odd", ["a"] * 4), BLOCK, "unread-architecture", "qwen3.odd"),
    ("llama", own("expert_count", ("I", 8)), ONE, "unread-architecture", "expert_count"),
    ("llama", own("attention.key_length", ("I", 8)), ONE, "unread-architecture", "key_length"),
    ("llama", own("rope.dimension_count", ("I", 8)), ONE, "unread-architecture", "rope"),
    ("llama", own(HEADS_OF, ("i", [4, 4])), ONE, "wrong-array", "head_count"),
    ("llama", own(HEADS_OF, ("i", [4, -1, 4, 4])), ONE, "wrong-array", ""),
    ("llama", own(HEADS_OF, ("I", 1 << 31)), ONE, "wrong-array", "head_count"),
    ("llama", own(HEADS_OF, ("i", -4)), ONE, "wrong-array", ""),
    ("llama", own(WIDTHS, ("Q", [96, 96, 96, 1 << 40])), ONE, "wrong-array", WIDTHS),
    ("llama", own(WIDTHS, ("f", [96.0] * 4)), ONE, "wrong-array", ""),
    ("llama", head_widths(("Q", 1 << 32)), ONE, "unread-architecture", 1 << 32),
    ("llama", head_widths(("i", -16)), ONE, "unread-architecture", "-16"),
    ("llama", head_widths(("i", 16)), ONE, "", ""),
    ("llama", own("embedding_length", ("I", 1 << 31)), ONE, "unread-architecture", 1 << 31),
    ("llama", own("embedding_length", ("i", -64)), ONE, "unread-architecture", "blk.0.attn_norm"),
    ("llama", tensor(NORM, (HIDDEN,), 1, 2 * HIDDEN), ONE, "unread-architecture", NORM),
    ("llama", tensor("blk.2.attn_q_norm.weight", (16,)), ONE, "unread-architecture", "attn_q_norm"),
    ("llama", tensor("blk.2.ffn_up.scale", (1,)), ONE, "unread-architecture", "ffn_up.scale"),
    ("llama", tensor("position_embd.weight", (HIDDEN, 8)), ONE, "unread-architecture", "position"),
    ("llama", gone("blk.1.attn_norm.weight"), drop("attention:1", "mlp:1"), "", ""),
    ("llama", None, drop("attention:0"), "no-attention-left", "attention 0"),
    ("llama", None, drop("block:0", "attention:1"), "no-attention-left", "attention 1"),
    ("llama", None, drop("mixer:1"), "sublayer-missing", "mixer 1"),
    ("llama", None, drop("cross_attention:1"), "sublayer-missing", "cross_attention 1"),
    ("llama", None, drop("attention:2", replacement="bias"), "unread-architecture", "attention 2"),
    ("llama", None, drop("mlp:2", replacement="bias"), "unread-architecture", "mlp 2"),
    ("llama", None, drop("mlp:2", replacement="linear"), "unread-architecture", "mlp 2"),
    ("llama", None, drop("block:2", replacement="linear"), "unread-architecture", "mlp 2"),
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
        kind = GgufFileError if code == "wrong-array" else SurgeryError
        _refused(tmp_path, tiny, plan, kind, code, named)
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
        _refused(tmp_path, tiny, plan, SurgeryError, "no-attention-left", "attention 1")
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


def with_length(path: Path, key: str, skipped: int, length: int) -> Path:
    """A file in which a string, or an array, is said to be so long."""
    data = TinyGguf.llama().data()
    at = data.index(key.encode()) + len(key) + skipped
    path.write_bytes(data[:at] + struct.pack("<Q", length) + data[at + 8 :])
    return path


@pytest.mark.parametrize(("key", "skipped"), [("general.name", 4), ("tokenizer.ggml.scores", 8)])
@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_lengths_beyond_the_end_allocate_nothing(
    key: str, skipped: int, length: int, tmp_path: Path
) -> None:
    with raises(GgufFileError, "beyond-end", key):
        read_model(with_length(tmp_path / "s.gguf", key, skipped, length))


def test_a_header_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """A sparse file, whose strings could be as long as it says."""
    path = with_length(tmp_path / "s.gguf", "general.name", 4, 1 << 39)
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
        with raises(GgufFileError, "wrong-array", "head_count"):
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


def _refused(
    folder: Path, tiny: TinyGguf, plan: LoadedPlan, kind: type[Any], code: str, named: object
) -> None:
    source, target = tiny.write(folder / "s.gguf"), folder / "out" / "cut.gguf"
    with raises(kind, code, *filter(None, [named])) as caught:
        cut_gguf(source, target, plan)
    assert caught.value.hint, "no way out"
    assert not target.parent.exists()
