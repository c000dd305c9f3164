"""Pruned checkpoints: what is in the files, who loads them, who refuses, and that they train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PruningPlan
from exporter.artifacts.plans import read_plan
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.checkpoint.pruned_model import load_pruned, save_pruned, shallow_config
from exporter.checkpoint.write import CARD, write_checkpoint
from exporter.cli import run
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import ExportError, ModelSourceError
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.loading.meta_model import filled_while_running, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import load_model
from exporter.progress import Quiet
from tests.made_reports import full_report
from tests.raising import raises, tells
from tests.reading import Heard, lines_of, run_lines
from tests.text_graphs import write_llama_folder
from tests.tiny_models import (
    answer,
    check_export,
    export_onnx,
    family_loaded,
    ids_of,
    planned,
    random_replacements,
)

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


GAPS = planned(("attention", 0, "none"), ("mlp", 1, "none"))
BLOCK = planned(("block", 1, "none"))
LAYERS = {"gpt2": "n_layer"}
FAMILIES = ["llama_tied", "gemma2", "gpt2", "gpt_neox", "mixtral"]


def three_layers(family: str = "llama", **changes: Any) -> Any:
    return family_loaded(family, **{LAYERS.get(family, "num_hidden_layers"): 3}, **changes)


def written(
    folder: Path, plan: Any, family: str = "llama", *, heard: Heard | None = None, **changes: Any
) -> tuple[Any, Any]:
    """The facts of a checkpoint in ``folder``, and what its model should answer."""
    loaded = three_layers(family, **changes)
    given = random_replacements(loaded.model.config.hidden_size, plan)
    with branches_replaced(loaded.model, branch_replacements_of(plan, given, loaded.model)):
        wanted = answer(loaded.model)
    facts = write_checkpoint(
        loaded, PruningPlan(deletions=plan), folder, replacements=given, progress=heard or Quiet()
    )
    return facts, wanted


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def tensors(folder: Path) -> dict[str, int]:
    """The bytes of every tensor in the files, as their headers place them."""
    sizes = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        own = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items()}
        assert len(data) == 8 + length + sum(own.values())
        sizes |= own
    return sizes


def whole_bytes(tmp_path: Path, family: str) -> dict[str, int]:
    save_checkpoint(three_layers(family), tmp_path / "whole")
    return tensors(tmp_path / "whole")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_refuses_gaps_and_our_loader_does_not(family: str, tmp_path: Path) -> None:
    whole = whole_bytes(tmp_path, family)
    facts, wanted = written(tmp_path / "hf", GAPS, family)
    assert answer(load_pruned(tmp_path / "hf").model).equal(wanted)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain(tmp_path / "hf")
    held = tensors(tmp_path / "hf")
    assert held.keys() <= whole.keys()
    empty = {name for name, size in held.items() if size == 0}
    assert len(empty) == 2
    gone = sum(size for name, size in whole.items() if name in empty or name not in held)
    assert sum(held.values()) == sum(whole.values()) - gone
    assert facts.before.bytes - facts.after.bytes == gone > 0
    assert not facts.plain


def test_the_config_says_it_in_others_words(tmp_path: Path) -> None:
    written(tmp_path / "gaps", GAPS, "gemma2")
    config = config_of(tmp_path / "gaps")
    assert (config["drop_attn_list"], config["drop_mlp_list"]) == ([0], [1])
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 3
    assert read_plan(tmp_path / "gaps" / "config.json").deletions == GAPS
    written(tmp_path / "healed", planned(("attention", 0, "bias"), ("mlp", 1, "none")))
    config = config_of(tmp_path / "healed")
    assert not {"drop_attn_list", "drop_mlp_list"} & config.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_blocks_leave_a_plain_model(family: str, tmp_path: Path) -> None:
    import torch

    whole = whole_bytes(tmp_path, family)
    facts, wanted = written(tmp_path / "hf", BLOCK, family)
    assert (facts.kept, facts.plain) == ([0, 2], True)
    # Experts are put together anew, so that sums come in another order; else there is no error.
    torch.testing.assert_close(answer(plain(tmp_path / "hf")), wanted, rtol=0, atol=1e-6)
    assert load_model(str(tmp_path / "hf")).ref.num_layers == 2
    assert load_pruned(tmp_path / "hf").ref.num_layers == 2
    gone = sum(size for name, size in whole.items() if re.search(r"(layers|h)\.1\.", name))
    assert sum(tensors(tmp_path / "hf").values()) == sum(whole.values()) - gone
    assert facts.before.bytes - facts.after.bytes == gone


def test_a_norm_after_the_sum_stays_with_its_layer(tmp_path: Path) -> None:
    """In BERT's kind it is on the stream: a layer less would have two norms less."""
    heard = Heard()
    facts, _ = written(tmp_path, BLOCK, "bert", heard=heard)
    assert facts.kept is None
    assert "Bert" in heard.lines[0]


def test_a_config_is_renumbered_where_it_names_layers() -> None:
    config = {
        "num_hidden_layers": 4, "layer_types": list("abcd"), "mlp_only_layers": [0, 1, 3],
        "first_k_dense_replace": 2, "eos_token_id": [1, 2, 3, 4], "use_cache": True,
        "per_layer_config": {"03": {"head_dim": 8}, "1": {"head_dim": 4}}, "max_window_layers": 9,
    }  # fmt: skip
    assert shallow_config(config, [0, 2, 3], 4, "num_hidden_layers") == {
        "num_hidden_layers": 3, "layer_types": list("acd"), "mlp_only_layers": [0, 2],
        "first_k_dense_replace": 1, "eos_token_id": [1, 2, 3, 4], "use_cache": True,
        "per_layer_config": {"2": {"head_dim": 8}}, "max_window_layers": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(three_layers(), tmp_path_factory.mktemp("whole"), opset=20)


def test_a_plain_one_is_what_the_pruned_onnx_file_is(exported: Path, tmp_path: Path) -> None:
    """Prefill and decode with caches; logits to 1e-4 of the largest, or of 1."""
    prune_file(exported, tmp_path / "cut" / "model.onnx", BLOCK, CutOptions(verify="none"))
    facts, wanted = written(tmp_path / "hf", BLOCK)
    again = load_pruned(tmp_path / "hf")
    checks = check_export(again, tmp_path / "cut" / "model.onnx", layers=facts.kept)
    assert len(checks) == 4
    limit = 1e-4 * max(1.0, float(wanted.abs().max()))
    assert all(check.passed for check in checks)
    assert max(check.max_abs_error for check in checks if "logits" in check.name) <= limit
    other = planned(("block", 2, "none"))
    prune_file(exported, tmp_path / "other" / "model.onnx", other, CutOptions(verify="none"))
    with raises(ExportError, "other-outputs", "present.1.key"):
        check_export(again, tmp_path / "other" / "model.onnx", layers=facts.kept)


def test_one_with_gaps_can_be_exported_as_it_is(tmp_path: Path) -> None:
    """So that a checkpoint that was tuned becomes an ONNX file without its base."""
    plan = planned(("attention", 0, "linear"), ("attention", 2, "none"), ("mlp", 1, "bias"))
    written(tmp_path / "hf", plan)
    loaded = load_pruned(tmp_path / "hf")
    file = export_onnx(loaded, tmp_path / "onnx", opset=20)
    checks = check_export(loaded, file)
    assert len(checks) == 4
    assert all(check.passed for check in checks)
    loaded.model.model.layers[0].self_attn.replacement_bias += 1
    with raises(ExportError, "wrong-results", "logits"):
        check_export(loaded, file)


def test_it_trains_and_is_written_again(tmp_path: Path) -> None:
    import torch

    written(tmp_path / "hf", planned(("attention", 0, "linear"), ("mlp", 1, "none")))
    assert not any(p.requires_grad for p in load_pruned(tmp_path / "hf").model.parameters())
    loaded = load_pruned(tmp_path / "hf", train=True)
    model: Any = loaded.model
    assert model.training
    step = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(ids_of(), labels=ids_of()).loss
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    model.eval()
    save_pruned(loaded, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")  # As a trainer does.
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert answer(load_pruned(folder).model).equal(answer(model))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            plain(folder)


def test_the_card_tells_what_is_known_and_no_more(tmp_path: Path) -> None:
    facts, _ = written(tmp_path / "hf", GAPS)
    bare = model_card(facts, CardSources(PruningPlan(deletions=GAPS)))
    assert "1 attention: layer 0" in bare
    assert "Nothing was measured on this checkpoint." in bare
    assert "not replaced" in bare
    assert "load_pruned" in bare
    assert "AutoModel" not in bare
    assert "license" not in bare.split("---")[1]
    assert "base_model" not in bare
    named = facts.model_copy(
        update={"base": "owner/name", "on_hub": True, "license": {"license": "apache-2.0"},
                "kept": [0, 2], "plain": True, "deletions": BLOCK},
    )  # fmt: skip
    report = full_report()
    text = model_card(named, CardSources(PruningPlan(deletions=BLOCK), report=report))
    assert text.startswith("---\n")
    assert 'base_model: "owner/name"' in text
    assert "license: apache-2.0" in text
    assert "AutoModelForCausalLM" in text
    assert "load_pruned" not in text
    assert "perplexity" in text
    assert report.environment.processor in text


def test_the_card_carries_the_licence_and_no_path(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "hf"
    save_checkpoint(three_layers(), base)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    (base / "LICENSE").write_text("mine")
    (tmp_path / "config.json").write_text('{"drop_attn_list": [1], "drop_mlp_list": []}')
    assert run(["checkpoint", str(base), str(tmp_path / "config.json"), "-o", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "\nlicense: mit\n" in card
    assert "language" not in card.split("---")[1]
    assert (out / "LICENSE").read_text() == "mine"
    for name in ("README.md", "config.json"):
        assert str(tmp_path) not in (out / name).read_text()
    assert (out / "model.safetensors").stat().st_mode == (out / "README.md").stat().st_mode
    (tmp_path / "config.json").write_text('{"drop_attn_list": [7], "drop_mlp_list": []}')
    assert run(["checkpoint", str(base), str(tmp_path / "config.json"), "-o", str(out)]) == 2
    assert run(["checkpoint", str(base), str(tmp_path / "config.json"), "-o", str(base)]) == 2


HEALED = planned(("attention", 0, "linear"), ("mlp", 1, "bias"), ("mlp", 2, "none"))


def sharded(folder: Path, family: str, **changes: Any) -> Path:
    with quiet_transformers():
        three_layers(family, **changes).model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def both(tmp_path: Path, base: Path, plan: Any, *, heard: Any = None) -> tuple[Any, Any]:
    """The facts of the checkpoints in ``memory`` and ``streamed``."""
    facts = []
    for name, loaded in {"memory": load_model(str(base)), "streamed": load_meta(str(base))}.items():
        given = random_replacements(loaded.model.config.hidden_size, plan)
        written = write_checkpoint(
            loaded, PruningPlan(deletions=plan), tmp_path / name, replacements=given,
            progress=heard or Quiet(),
        )  # fmt: skip
        facts.append(written)
    return facts[0], facts[1]


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("plan", [GAPS, BLOCK, HEALED], ids=["gaps", "block", "healed"])
def test_a_streamed_checkpoint_is_the_one_from_memory(
    family: str, plan: Any, tmp_path: Path
) -> None:
    base = sharded(tmp_path / "base", family)
    memory, streamed = both(tmp_path, base, plan)
    assert streamed == memory
    assert config_of(tmp_path / "streamed") == config_of(tmp_path / "memory")
    wanted = answer(load_pruned(tmp_path / "memory").model)
    assert answer(load_pruned(tmp_path / "streamed").model).equal(wanted)
    again = load_meta(str(tmp_path / "streamed"), pruned=True)
    with filled_while_running(again):
        assert answer(again.model).equal(wanted)
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


def test_it_is_written_in_the_models_own_dtype_or_another(tmp_path: Path) -> None:
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
    meta = load_meta(str(sharded(tmp_path / "base", "llama")))
    sorted((tmp_path / "base").glob("*.safetensors"))[-1].unlink()
    with raises(ModelSourceError, "unreadable", ".safetensors"):
        write_checkpoint(meta, PruningPlan(deletions=GAPS), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_llama_folder(tmp_path / "source")
    return tmp_path / "source"


def lines_for(source: Path, plan: Any) -> dict[str, str]:
    plan, folder = PruningPlan(deletions=plan), source.with_name("hf")
    loaded = load_model(str(source))
    write_checkpoint(loaded, plan, folder, card=lambda f: model_card(f, CardSources(plan)))
    return lines_of((folder / CARD).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("plan", "library"), [(GAPS, "depthcut"), (BLOCK, "transformers")], ids=["gaps", "plain"]
)
def test_the_lines_in_a_card_load_its_checkpoint(plan: Any, library: str, source: Path) -> None:
    lines = lines_for(source, plan)
    assert list(lines) == [library]
    _, result = run_lines(lines[library], source.with_name("hf"))
    assert len(result["tokens"]) > 5
    if plan is GAPS:
        assert result["tuned"].model.training
        return
    assert result["model"].config.num_hidden_layers == 2
    sentences = '[{"path": "", "type": "sentence_transformers.models.Transformer"}]'
    (source / "modules.json").write_text(sentences)
    assert list(lines_for(source, plan)) == [library, "sentence-transformers"]
    assert (source.with_name("hf") / "modules.json").is_file()
