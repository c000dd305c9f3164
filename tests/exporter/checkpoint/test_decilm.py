"""Checkpoints in other forms: as DeciLM, which servers read, and an encoder's first layers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PruningPlan
from exporter.artifacts.loaded_plan import Replacements
from exporter.artifacts.plans import read_plan
from exporter.checkpoint.write import write_checkpoint
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import PlanError, UnknownArchitectureError, UsageError
from exporter.models.ablation.branch_replacements import branches_replaced
from graph_passes import ReplacementTensors
from tests.raising import raises
from tests.tiny_models import family_loaded, ids_of, planned, random_replacements

pytestmark = pytest.mark.torch


SIZES = {"num_hidden_layers": 3, "intermediate_size": 256}
NAMES = {"tensorrt-llm": ("linear_attn", "linear_mlp"), "mlx": ("linear", "linear")}


def without_intercept(given: Replacements) -> Replacements:
    tensors = {
        ref: ReplacementTensors(0 * tensor.bias, tensor.weight)
        for ref, tensor in given.tensors.items()
    }
    return Replacements(given.path, given.sha256, tensors)


def written(
    folder: Path, plan: Any, server: Any = None, *, intercept: bool = False,
    family: str = "llama", **changes: Any,
) -> Any:  # fmt: skip
    """What the model answers without the plan's branches; the folder is written."""
    loaded = family_loaded(family, **SIZES | changes)
    given = random_replacements(loaded.model.config.hidden_size, plan)
    given = given if intercept else without_intercept(given)
    with branches_replaced(loaded.model, branch_replacements_of(plan, given, loaded.model)):
        wanted = loaded.model(ids_of()).logits
    facts = write_checkpoint(
        loaded, PruningPlan(deletions=plan), folder, replacements=given, form="decilm",
        server=server,
    )  # fmt: skip
    assert facts.after.parameters < facts.before.parameters
    return wanted


def config_of(folder: Path) -> Any:
    """The config as vLLM, SGLang and TensorRT-LLM get it: by the folder's own module."""
    path = folder / "configuration_decilm.py"
    spec = importlib.util.spec_from_file_location("decilm_of_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DeciLMConfig.from_pretrained(folder)


def served(folder: Path, names: tuple[str, str] = ("", "")) -> Any:
    """The logits as the servers' modelling files compute them; every tensor must be used."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional

    config, weights = config_of(folder), {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    used: set[str] = set()

    def take(name: str) -> Any:
        used.add(name)
        return weights[name]

    def normed(x: Any, name: str) -> Any:
        return functional.rms_norm(x, x.shape[-1:], take(f"{name}.weight"), config.rms_norm_eps)

    hidden, heads = config.hidden_size, config.num_attention_heads
    stream = take("model.embed_tokens.weight")[ids_of()]
    for layer, block in enumerate(config.block_configs):
        at = f"model.layers.{layer}"
        if not block.attention.no_op:
            x = normed(stream, f"{at}.input_layernorm")
            if block.attention.replace_with_linear:
                stream = stream + x @ take(f"{at}.self_attn.{names[0]}.weight").T
            else:
                kv_heads = heads // block.attention.n_heads_in_group
                stream = stream + _attention(x, at, take, heads, kv_heads, theta(folder))
        if not block.ffn.no_op:
            x = normed(stream, f"{at}.post_attention_layernorm")
            if block.ffn.replace_with_linear:
                stream = stream + x @ take(f"{at}.mlp.{names[1]}.weight").T
            else:
                width = int(2 * round(block.ffn.ffn_mult, 6) * hidden / 3)
                width += -width % 256
                gate = take(f"{at}.mlp.gate_proj.weight")
                assert len(gate) == width
                inner = functional.silu(x @ gate.T) * (x @ take(f"{at}.mlp.up_proj.weight").T)
                stream = stream + inner @ take(f"{at}.mlp.down_proj.weight").T
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = normed(stream, "model.norm") @ take(head).T
    assert used == set(weights)
    assert not torch.isnan(logits).any()
    return logits


def theta(folder: Path) -> float:
    """Where SGLang and mlx-lm look for it."""
    return float(json.loads((folder / "config.json").read_text())["rope_theta"])


def _attention(x: Any, at: str, take: Any, heads: int, kv_heads: int, base: float) -> Any:
    import torch
    from torch.nn import functional

    batch, length, hidden = x.shape
    head = hidden // heads

    def projected(name: str, count: int) -> Any:
        made = x @ take(f"{at}.self_attn.{name}.weight").T
        return made.view(batch, length, count, head).transpose(1, 2)

    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, head, 2) / head))
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))

    def turned(part: Any) -> Any:
        first, second = part.chunk(2, -1)
        return part * cos + torch.cat([-second, first], -1) * sin

    q, k = turned(projected("q_proj", heads)), turned(projected("k_proj", kv_heads))
    v = projected("v_proj", kv_heads)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, -1) @ take(f"{at}.self_attn.o_proj.weight").T


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    "plan",
    [
        planned(("attention", 1, "none"), ("mlp", 2, "none")),
        planned(("mlp", 0, "none"), ("block", 2, "none")),
        planned(("attention", 2, "none"), ("attention", 1, "none")),
    ],
)
def test_every_server_computes_the_cut(tmp_path: Path, plan: Any, family: str) -> None:
    wanted = written(tmp_path / "out", plan, family=family)
    assert float((served(tmp_path / "out") - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("server", list(NAMES))
def test_maps_have_the_servers_names(tmp_path: Path, server: str) -> None:
    plan = planned(("attention", 1, "linear"), ("mlp", 2, "linear"), ("attention", 2, "none"))
    wanted = written(tmp_path / "out", plan, server)
    result = served(tmp_path / "out", NAMES[server])
    assert float((result - wanted).abs().max()) < 1e-4


def test_every_key_that_a_server_reads_is_there(tmp_path: Path) -> None:
    written(tmp_path / "out", planned(("attention", 1, "none")), rope_theta=5e5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] is None
    first, second, _ = config["block_configs"]
    kept = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2}
    assert first["attention"] == kept
    assert second["attention"] == kept | {"no_op": True, "n_heads_in_group": None}
    width = 1.5 * config["intermediate_size"] / config["hidden_size"]
    assert second["ffn"] == {"no_op": False, "replace_with_linear": False, "ffn_mult": width}


def test_the_folder_is_a_plan_too_and_can_be_written_again(tmp_path: Path) -> None:
    plan = planned(("attention", 1, "none"), ("block", 2, "none"))
    for _ in range(2):
        written(tmp_path / "out", plan)
    result = read_plan(tmp_path / "out" / "config.json")
    gone = {ref for item in plan for ref in item.sublayers}
    assert {ref for deletion in result.deletions for ref in deletion.sublayers} == gone
    (tmp_path / "out" / "mine.py").write_text("")
    with raises(UsageError, "not-ours", "mine.py"):
        written(tmp_path / "out", plan)


@pytest.mark.parametrize(
    ("drop", "server", "code", "changes"),
    [
        (("attention", 0, "none"), "vllm", "replacement-unheld", {}),
        (("attention", 0, "none"), None, "replacement-unheld", {}),
        (("block", 0, "none"), "sglang", "replacement-unheld", {}),
        (("attention", 1, "linear"), None, "replacement-unheld", {}),
        (("attention", 1, "linear"), "vllm", "replacement-unheld", {}),
        (("attention", 1, "bias"), "mlx", "replacement-unheld", {}),
        (("attention", 0, "linear"), "mlx", "replacement-unheld", {}),
        (("mlp", 1, "bias"), "tensorrt-llm", "replacement-unheld", {}),
        (("attention", 1, "linear"), "mlx", "replacement-unheld", {"intercept": True}),
        *((("attention", 1, "none"), None, "unread-architecture", changes) for changes in (
            {"family": "gemma2"}, {"family": "mixtral"}, {"intermediate_size": 96},
            {"head_dim": 8}, {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"},
        )),
    ],
)  # fmt: skip
def test_what_a_server_can_not_hold(
    tmp_path: Path, drop: Any, server: Any, code: str, changes: Any
) -> None:
    kind = UnknownArchitectureError if code == "unread-architecture" else PlanError
    branch = "attention" if drop[0] == "block" else drop[0]
    named = () if code == "unread-architecture" else (f"{branch} {drop[1]}",)
    with raises(kind, code, *named):
        written(tmp_path / "out", planned(drop), server, **changes)
    assert not (tmp_path / "out").exists()
