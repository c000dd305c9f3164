"""A pruned model in PyTorch: what it computes, what its checkpoint holds, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.checkpoint.pruned_model import load_pruned, prune_model, save_pruned
from exporter.compare.kinds import open_torch_arm
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import ExportError, ModelSourceError, UnknownArchitectureError, UsageError
from exporter.models import pruned_structure
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.loading.model_source import load_model
from tests.raising import raises
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

PLAN = planned(("attention", 0, "linear"), ("mlp", 0, "bias"), ("mlp", 1, "linear"))
BARE = planned(("attention", 0, "none"), ("mlp", 1, "none"))
FAMILIES = ["llama_tied", "gemma2", "gpt2", "gpt_neox", "bloom", "mixtral", "bert"]
PARTS = ("replacement_bias", "replacement_weight")


def size(loaded: Any) -> int:
    return sum(weight.numel() for weight in loaded.model.parameters())


def pruned(family: str, plan: Any = PLAN, *, seed: int = 0) -> Any:
    """The model, changed, with what it should answer and how large it was."""
    loaded = family_loaded(family)
    given = random_replacements(loaded.model.config.hidden_size, plan, seed=seed)
    cut = branch_replacements_of(plan, given, loaded.model)
    with branches_replaced(loaded.model, cut):
        wanted = answer(loaded.model)
    before = size(loaded)
    prune_model(loaded, plan, cut)
    return loaded, wanted, before


def saved(tmp_path: Path, family: str = "llama", plan: Any = PLAN) -> tuple[Path, Any]:
    loaded, wanted, _ = pruned(family, plan)
    save_pruned(loaded, tmp_path / "checkpoint")
    return tmp_path / "checkpoint", wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_do_what_the_cut_does_and_no_hook_is_left(family: str, tmp_path: Path) -> None:
    loaded, wanted, before = pruned(family)
    assert answer(loaded.model).equal(wanted)
    hooks = [m for m in loaded.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert size(loaded) < before
    save_pruned(loaded, tmp_path / "checkpoint")
    again = load_pruned(tmp_path / "checkpoint")
    assert type(again.model).__name__ == type(loaded.model).__name__
    assert answer(again.model).equal(wanted)
    assert size(again) == size(loaded)
    other, _, _ = pruned(family, seed=1)
    assert not answer(other.model).equal(wanted)


def test_replacements_stand_under_their_modules_names(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder, _ = saved(tmp_path)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = {key for key in file.keys() if "replacement_" in key}  # noqa: SIM118
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert names == {
        *(f"{attention}.{part}" for part in PARTS), f"{mlp}.replacement_bias",
        *(f"model.layers.1.mlp.{part}" for part in PARTS),
    }  # fmt: skip
    section = json.loads((folder / "config.json").read_text())["depthcut"]
    assert section["deletions"] == [d.model_dump() for d in PLAN]
    with raises(ModelSourceError, "already-pruned"):  # others ask for the whole model
        load_model(str(folder))
    arm = open_torch_arm(folder, compiled=False, provider="cpu", threads=1, precision="fp32")
    assert arm.facts.kv_cache_bytes_per_token == 1 * 2 * 2 * 24 * 4  # of two layers one
    assert arm.facts.parameters == size(pruned("llama")[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(family_loaded("llama"), tmp_path_factory.mktemp("whole"), opset=20)


def cut_file(exported: Path, folder: Path, plan: Any, seed: int = 0) -> Path:
    given = random_replacements(96, plan, seed=seed)
    numbers = given if given.tensors else None
    prune_file(exported, folder / "m.onnx", LoadedPlan.of(plan, numbers), CutOptions(verify="none"))
    return folder / "m.onnx"


@pytest.mark.parametrize("plan", [PLAN, BARE], ids=["healed", "bare"])
def test_it_computes_what_the_pruned_onnx_file_computes(
    plan: Any, exported: Path, tmp_path: Path
) -> None:
    """Prefill and decode, one row padded; its caches are the graph's."""
    loaded = load_pruned(saved(tmp_path, plan=plan)[0])
    checks = check_export(loaded, cut_file(exported, tmp_path / "cut", plan))
    assert [check.phase for check in checks] == ["prefill"] * 2 + ["decode"] * 2
    largest = float(answer(loaded.model).abs().max())
    assert all(check.passed for check in checks)
    assert all(check.tolerance <= 2e-4 * max(1.0, largest) for check in checks)
    if plan is PLAN:
        other = cut_file(exported, tmp_path / "other", plan, seed=1)
        with raises(ExportError, "wrong-results", "logits"):
            check_export(loaded, other)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_it_generates_without_its_first_attention(family: str, tmp_path: Path) -> None:
    """The length of the past is read from the first layer's cache, which keeps no keys now."""
    import torch

    plan = planned(("attention", 0, "none"), ("mlp", 1, "bias"))
    model = load_pruned(saved(tmp_path, family, plan)[0]).model
    ids = ids_of(1, 7)
    for beams in (1, 3):
        result = model.generate(
            ids, max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert result.shape == (1, 13)
        if beams == 1:
            alone = ids
            for _ in range(6):
                with torch.inference_mode():
                    logits = model(alone, use_cache=False).logits
                alone = torch.cat([alone, logits[:, -1:].argmax(-1)], dim=1)
            assert result.equal(alone)


BRANCH = {"path": "model.layers.0.mlp", "layer": 0, "kind": "mlp"}


@pytest.mark.parametrize(
    ("section", "code", "named"),
    [
        ({"version": 99}, "newer-schema", 99),
        ({"branches": [{"path": "model.layers.0.mlp"}]}, "", "$.depthcut.branches[0].layer"),
        ({"branches": [], "passing": ["model.layers.7.mlp"]}, "another-model",
         "model.layers.7.mlp"),
        *(({"branches": [BRANCH | {name: value}]}, "", f"$.depthcut.branches[0].{name}")
          for name, value in (("path", ""), ("maps", [[4, 4]] * 3), ("bias", -1),
                              ("multiplier", 0.0))),
    ],
)  # fmt: skip
def test_a_section_that_makes_no_sense_is_refused(
    tmp_path: Path, section: dict[str, Any], code: str, named: object
) -> None:
    folder, _ = saved(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["depthcut"] |= section
    path.write_text(json.dumps(config))
    with raises(ModelSourceError, code, named):
        load_pruned(folder)


def test_a_missing_replacement_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, wanted = saved(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.replacement_bias"
    kept = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with raises(ModelSourceError, "unreadable", 1, "replacement_bias"):
        load_pruned(folder)
    save_file({**tensors, name: kept + 1}, path, metadata={"format": "pt"})
    assert not answer(load_pruned(folder).model).equal(wanted)


def test_only_an_earlier_checkpoint_is_written_over(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    save_pruned(pruned("llama", BARE)[0], folder)
    assert "replacement" not in (folder / "model.safetensors").read_bytes()[:4000].decode("latin1")
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with raises(UsageError, "not-ours"):
        save_pruned(pruned("llama")[0], foreign)
    assert (foreign / "notes.txt").read_text() == "keep"
    for mine in (folder / "checkpoint-10", folder / "training_args.bin"):
        mine.mkdir()
        with raises(UsageError, "not-ours", mine.name):
            save_pruned(pruned("llama", BARE)[0], folder)
        mine.rmdir()
    (folder / "LICENSE").write_text("the base's")
    save_pruned(pruned("llama", BARE)[0], folder)


def test_a_model_that_would_compute_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one of a family in which something else stands between branch and stream."""
    monkeypatch.setattr(pruned_structure, "_lonely_norms", lambda m, *_: [m.model.norm])
    with raises(UnknownArchitectureError, "wrong-results"):
        pruned("llama")
