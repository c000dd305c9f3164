"""Checkpoints written from shards to shards are those that are written from memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import BLOCK, GAPS, Heard, plain, tensors, three_layers

from exporter.artifacts import PruningPlan
from exporter.errors import ModelSourceError
from exporter.progress import Quiet
from tests.raising import ends_in, raises, tells
from tests.tiny_gguf import TinyGguf
from tests.tiny_models import RANK, answer, planned, random_replacements

pytestmark = pytest.mark.torch

HEALED = planned(("attention", 0, "linear"), ("mlp", 1, "bias"), ("mlp", 2, "none"))
FAMILIES = ["llama_tied", "gpt2", "mixtral"]


def sharded(folder: Path, family: str, **changes: Any) -> Path:
    from exporter.models.loading.model_class import quiet_transformers

    with quiet_transformers():
        three_layers(family, **changes).model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def both(tmp_path: Path, base: Path, plan: Any, *, heard: Any = None) -> tuple[Any, Any]:
    """The facts of the checkpoints in ``memory`` and ``streamed``."""
    from exporter.checkpoint.write import write_checkpoint
    from exporter.models.loading.meta_model import load_meta
    from exporter.models.loading.model_source import load_model

    facts = []
    for name, loaded in {"memory": load_model(str(base)), "streamed": load_meta(str(base))}.items():
        given = random_replacements(loaded.model.config.hidden_size, plan, rank=RANK)
        written = write_checkpoint(
            loaded, PruningPlan(deletions=plan), tmp_path / name, replacements=given,
            progress=heard or Quiet(),
        )  # fmt: skip
        facts.append(written)
    return facts[0], facts[1]


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [GAPS, BLOCK, HEALED], ids=["gaps", "block", "healed"])
def test_it_is_the_one_from_memory(family: str, plan: Any, tmp_path: Path) -> None:
    from exporter.checkpoint.pruned_model import load_pruned
    from exporter.models.loading.meta_model import filled_while_running, load_meta

    base = sharded(tmp_path / "base", family)
    memory, streamed = both(tmp_path, base, plan)
    assert streamed == memory
    assert config_of(tmp_path / "streamed") == config_of(tmp_path / "memory")
    wanted = load_pruned(tmp_path / "memory").model
    model = load_pruned(tmp_path / "streamed").model
    assert answer(model).equal(answer(wanted))
    again = load_meta(str(tmp_path / "streamed"), pruned=True)
    with filled_while_running(again):
        assert answer(again.model).equal(answer(wanted))
    ours, theirs = tensors(tmp_path / "streamed"), tensors(tmp_path / "memory")
    assert sum(ours.values()) == sum(theirs.values())
    if plan is not BLOCK:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            plain(tmp_path / "streamed")
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    assert index["metadata"]["total_size"] == sum(ours.values())


def test_layers_are_known_without_the_modules_that_they_are_known_by(tmp_path: Path) -> None:
    """bloom's MLP, whose last projection adds to the stream itself, goes as a whole."""
    memory, streamed = both(tmp_path, sharded(tmp_path / "base", "bloom"), GAPS)
    assert streamed == memory
    assert tensors(tmp_path / "streamed") == tensors(tmp_path / "memory")


@pytest.mark.parametrize("plan", [GAPS, BLOCK], ids=["gaps", "block"])
def test_what_no_module_reads_is_not_carried_on(plan: Any, tmp_path: Path) -> None:
    """Old files hold each layer's rotary frequencies; a renumbered layer would meet another's."""
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    three_layers().model.save_pretrained(base)
    path = base / "model.safetensors"
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    old = {name.format(layer): torch.full((4,), float(layer)) for layer in range(3)}
    save_file({**load_file(path), **old}, path, metadata={"format": "pt"})
    both(tmp_path, base, plan)
    assert tensors(tmp_path / "streamed") == tensors(tmp_path / "memory")


def test_a_head_that_counts_the_layers_keeps_them(tmp_path: Path) -> None:
    from exporter.models.loading.model_files import save_checkpoint
    from tests.tiny_models import tiny_loaded

    save_checkpoint(tiny_loaded("esm"), tmp_path / "base")
    heard = Heard()
    memory, streamed = both(tmp_path, tmp_path / "base", BLOCK, heard=heard)
    assert streamed == memory
    assert streamed.kept is None
    lines = [line for line in heard.lines if "not with fewer layers" in line]
    assert len(lines) == 2
    assert not any(str(tmp_path) in line for line in lines)


def test_it_is_written_in_the_models_own_dtype_or_another(tmp_path: Path) -> None:
    from exporter.cli import run

    base = sharded(tmp_path / "base", "llama", dtype="bfloat16")
    plan = PruningPlan(deletions=GAPS).write(tmp_path / "plan.json")
    sizes = []
    for options in ((), ("--stream",), ("--stream", "--dtype", "float32")):
        out = tmp_path / "-".join(["hf", *options])
        assert run(["checkpoint", str(base), str(plan), "-o", str(out), "-q", *options]) == 0
        sizes.append(sum(tensors(out).values()))
    assert sizes[0] == sizes[1]
    assert sizes[2] == 2 * sizes[1]
    assert config_of(tmp_path / "hf---stream")["dtype"] == "bfloat16"


def test_what_a_layers_number_decides_is_found_out_and_nothing_is_left(tmp_path: Path) -> None:
    heard = Heard()
    base = sharded(tmp_path / "base", "gpt2", scale_attn_by_inverse_layer_idx=True)
    memory, streamed = both(tmp_path, base, BLOCK, heard=heard)
    assert memory == streamed
    assert streamed.kept is None
    assert sum("checkpoint: " in line and tells(line, 2) for line in heard.lines) == 2
    names = {path.name for path in (tmp_path / "streamed").iterdir()}
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert {n for n in names if n.endswith(".safetensors")} == set(index["weight_map"].values())


def test_a_shard_that_gets_lost_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    from exporter.checkpoint.write import write_checkpoint
    from exporter.models.loading.meta_model import load_meta

    meta = load_meta(str(sharded(tmp_path / "base", "llama")))
    sorted((tmp_path / "base").glob("*.safetensors"))[-1].unlink()
    with raises(ModelSourceError, "unreadable", ".safetensors"):
        write_checkpoint(meta, PruningPlan(deletions=GAPS), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_gguf_file_can_not_be_streamed(tmp_path: Path) -> None:
    from exporter.cli import run

    TinyGguf.llama().write(tmp_path / "model.gguf")
    plan = PruningPlan(deletions=GAPS).write(tmp_path / "plan.json")
    arguments = ["checkpoint", str(tmp_path / "model.gguf"), str(plan), "-o", str(tmp_path / "hf")]
    with ends_in(ModelSourceError, "quantized", "model.gguf"):
        assert run([*arguments, "--stream"]) == 2
