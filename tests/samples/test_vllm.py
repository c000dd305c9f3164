"""The sample for vLLM runs up to the server: it plans for it and writes what it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.samples.running import run_sample
from tests.text_graphs import write_tokenizer

SAMPLE = "11_vllm/run.sh"
LAYERS = 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256, max_position_embeddings=1024,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.mark.torch
def test_the_folder_is_written_for_vllm(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_sample(tmp_path, SAMPLE, model, out, "--drop-attn", str(LAYERS - 1))
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "served" / "config.json").read_text())
    gaps = [block["attention"]["no_op"] for block in config["block_configs"]]
    assert gaps == [False, True, True, True]  # vLLM can't do without the first
    assert not any(block["ffn"]["no_op"] for block in config["block_configs"])
    with safe_open(out / "served" / "model.safetensors", "np") as file:
        held = {name.split(".")[2] for name in file.keys() if "self_attn" in name}  # noqa: SIM118
    assert held == {"0"}
    assert str(out / "served") in done.stdout.splitlines()[-1]


@pytest.mark.torch
def test_what_vllm_cant_hold_ends_the_sample(model: Path, tmp_path: Path) -> None:
    done = run_sample(tmp_path, SAMPLE, model, tmp_path / "out", "--drop-attn", str(LAYERS))
    assert done.returncode == 2
    assert not (tmp_path / "out" / "served").exists()
