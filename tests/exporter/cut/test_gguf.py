"""Cuts of GGUF files: what stays is there byte for byte, and llama.cpp's graphs compute the cut."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cli import run
from exporter.cut.gguf_deci import ZERO_WIDTH
from exporter.cut.gguf_surgery import GgufOptions, cut_gguf
from exporter.errors import PlanError, SurgeryError, UsageError
from exporter.models.gguf_header import read_header
from exporter.models.gguf_model_files import read_model
from graph_passes.plan_record import PLAN_KEY
from tests.raising import raises
from tests.tiny_gguf import HEADS, HIDDEN, KV_HEADS, WIDTH, TinyGguf, llama_cpp_logits, tensors_of

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
NOTHING = np.zeros((HIDDEN, HIDDEN))


def drops(*named: str) -> LoadedPlan:
    parts = [item.split(":") for item in named]
    return LoadedPlan.of([PlannedDeletion(layer=int(n), kind=kind) for kind, n in parts])  # type: ignore[arg-type]


def healed(
    folder: Path, layers: list[int], *, intercept: float = 0.0, low_rank: bool = False
) -> LoadedPlan:
    """A plan with maps in place of attentions, and its file of numbers."""
    rng = np.random.default_rng(1)
    numbers = {}
    for layer in layers:
        key = f"attention.{layer}"
        numbers[f"{key}.bias"] = np.full(HIDDEN, intercept, np.float32)
        if low_rank:
            numbers[f"{key}.weight_down"] = rng.standard_normal((8, HIDDEN)).astype(np.float32)
            numbers[f"{key}.weight_up"] = rng.standard_normal((HIDDEN, 8)).astype(np.float32)
        else:
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
    plan, target = drops(*dropped), tmp_path / "cut.gguf"
    cut_gguf(source, target, plan)
    masked = {(ref.layer, ref.kind): NOTHING for d in plan.plan.deletions for ref in d.sublayers}
    wanted = llama_cpp_logits(source, TOKENS, masked)
    assert np.abs(wanted - llama_cpp_logits(source, TOKENS)).max() > 0.1
    assert np.abs(wanted - llama_cpp_logits(target, TOKENS)).max() < 1e-9


def test_without_its_zeros_an_mlp_takes_the_attention_with_it(source: Path, tmp_path: Path) -> None:
    """The trap in llama.cpp for which an MLP of zeros is written."""
    cut_gguf(source, tmp_path / "cut.gguf", drops("mlp:2"))
    entries = read_header(tmp_path / "cut.gguf").entries
    assert entries["deci.feed_forward_length"].wholes == [WIDTH, WIDTH, ZERO_WIDTH, WIDTH]
    spoilt = TinyGguf.llama(architecture="deci")
    spoilt.entries["deci.feed_forward_length"] = ("i", [WIDTH, WIDTH, 0, WIDTH])
    wrong = llama_cpp_logits(spoilt.write(tmp_path / "wrong.gguf"), TOKENS)
    assert np.abs(wrong - llama_cpp_logits(tmp_path / "cut.gguf", TOKENS)).max() > 0.1


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-5), ("F16", 2e-2)])
def test_a_map_takes_an_attentions_place(
    source: Path, tmp_path: Path, kind: str, limit: float, low_rank: bool
) -> None:
    plan, target = healed(tmp_path, [0, 2], low_rank=low_rank), tmp_path / "cut.gguf"
    facts = cut_gguf(source, target, plan, GgufOptions(map_type=kind))  # type: ignore[arg-type]
    masked = {}
    for ref, given in plan.tensors.items():
        maps = [np.asarray(item, np.float64) for item in given.maps.values()]
        masked[tuple(ref)] = (maps[0] if len(maps) == 1 else maps[1] @ maps[0]).T
    wanted = llama_cpp_logits(source, TOKENS, masked)  # type: ignore[arg-type]
    floats = llama_cpp_logits(target, TOKENS)
    assert np.abs(wanted - floats).max() < limit * np.abs(wanted).max()
    entries = read_header(target).entries
    assert entries["deci.attention.head_count"].wholes == [HEADS] * 4
    assert entries["deci.attention.head_count_kv"].wholes == [0, KV_HEADS, 0, KV_HEADS]
    assert (facts.tensors_added, facts.tensors_removed) == (2, 8)


def test_kept_tensors_are_the_same_bytes(source: Path, tmp_path: Path) -> None:
    cut_gguf(source, tmp_path / "cut.gguf", drops("attention:2", "mlp:1", "block:0"))
    before, after = tensors_of(source), tensors_of(tmp_path / "cut.gguf")
    made = {f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")}
    for name, content in after.items():
        number = int(name.split(".")[1]) if name.startswith("blk.") else -1
        original = name.replace(f"blk.{number}.", f"blk.{number + 1}.")
        assert name in made or content == before[original], name
    assert not any(any(after[name]) for name in made)
    assert not [name for name in after if name.startswith("blk.1.attn")]


def test_a_file_is_smaller_by_the_dropped_tensors(source: Path, tmp_path: Path) -> None:
    facts = cut_gguf(source, tmp_path / "cut.gguf", drops("attention:1"))
    gone = {k: v for k, v in tensors_of(source).items() if k.startswith("blk.1.attn")}
    assert facts.bytes_before - facts.bytes_after == sum(map(len, gone.values()))
    assert facts.tensors_removed == len(gone) == 5
    assert facts.architecture == ("llama", "deci")


def test_metadata_stays_but_for_the_layers(source: Path, tmp_path: Path) -> None:
    cut_gguf(source, tmp_path / "a.gguf", drops("attention:1"))
    cut_gguf(source, tmp_path / "b.gguf", drops("block:1"))
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
    cut_gguf(tiny.write(tmp_path / "s.gguf"), tmp_path / "cut.gguf", drops("block:1", "block:2"))
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
    cut_gguf(tiny.write(tmp_path / "s.gguf"), tmp_path / "cut.gguf", drops("block:1"))
    token_embd_weight = tensors_of(tmp_path / "cut.gguf")["token_embd.weight"]
    assert token_embd_weight[:size] == content
    assert not any(token_embd_weight[size:])


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    tiny = TinyGguf.llama()
    whole = tiny.write(tmp_path / "whole.gguf")
    shards = tiny.write_shards(tmp_path, 3)
    plan = drops("attention:2", "block:3")
    cut_gguf(whole, tmp_path / "a.gguf", plan)
    for number, shard in enumerate(shards):
        cut_gguf(shard, tmp_path / f"b{number}.gguf", plan)
        assert (tmp_path / f"b{number}.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    facts = cut_gguf(whole, tmp_path / "c.gguf", plan, GgufOptions(shard_bytes=100_000))
    assert facts.files == [
        f"c-{n + 1:05}-of-{len(facts.files):05}.gguf" for n in range(len(facts.files))
    ]
    assert len(facts.files) > 1
    written = read_model(tmp_path / facts.files[-1])
    assert len(written.tensors) == len(tensors_of(tmp_path / "a.gguf"))
    cut_gguf_back = {n: c for f in facts.files for n, c in tensors_of(tmp_path / f).items()}
    assert cut_gguf_back == tensors_of(tmp_path / "a.gguf")
    assert all(
        sum(map(len, tensors_of(tmp_path / f).values())) <= 100_000
        or len(tensors_of(tmp_path / f)) == 1
        for f in facts.files
    )


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    shards = TinyGguf.llama().write_shards(tmp_path, 2)
    before = [shard.read_bytes() for shard in shards]
    for shard in shards:
        with raises(UsageError, "overwrites-input", shard):
            cut_gguf(shards[0], shard, drops("attention:1"))
    link = tmp_path / "link.gguf"
    link.hardlink_to(shards[1])
    with raises(UsageError, "overwrites-input", link):
        cut_gguf(shards[0], link, drops("attention:1"))
    assert [shard.read_bytes() for shard in shards] == before


def test_another_kind_of_file_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with raises(UsageError, "foreign-file"):
        cut_gguf(source, tmp_path / "notes.txt", drops("attention:1"))
    (tmp_path / "folder").mkdir()
    with raises(SurgeryError, "is-a-folder"):
        cut_gguf(source, tmp_path / "folder", drops("attention:1"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_the_earlier_result(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "cut.gguf"
    cut_gguf(source, target, drops("attention:1"))
    before = target.read_bytes()
    with raises(PlanError, "intercept"):
        cut_gguf(source, target, healed(tmp_path, [1], intercept=0.5))
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["cut.gguf"]


def test_a_plan_for_another_file_is_told(source: Path, tmp_path: Path) -> None:
    plan = healed(tmp_path, [1]).plan.model_copy(update={"made_from": {"model": "0" * 64}})
    plan.write(tmp_path / "plan.json")
    with raises(PlanError, "another-model"):
        cut_gguf(source, tmp_path / "cut.gguf", LoadedPlan.read(tmp_path / "plan.json"))
    own = hashlib.sha256(source.read_bytes()).hexdigest()
    plan.model_copy(update={"made_from": {"model": own}}).write(tmp_path / "plan.json")
    cut_gguf(
        source, tmp_path / "cut.gguf", LoadedPlan.read(tmp_path / "plan.json"),
        GgufOptions(map_type="F32"),
    )  # fmt: skip


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "cut.gguf"
    assert run(["gguf", str(source), "--drop", "attention:1,2", "-o", str(target), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["architecture"] == ["llama", "deci"]
    assert content["files"] == ["cut.gguf"]
    assert run(["gguf", str(source), "-o", str(target)]) == 2
    assert run(["gguf", str(source), "--drop", "attention:9", "-o", str(target)]) == 2
    assert run(["gguf", str(source), "--drop", "attention:1", "-o", str(source)]) == 2
