"""What is sound before it is spoilt: models of a few kilobytes, and all that commands are given."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "exporter"), str(TESTS / "graph_passes")]

TIMING = (
    *("--prefill", "8", "--decode-past", "8", "--rounds", "2", "--threads", "1"),
    *("--eval-text", "in/other.txt", "--eval-tokens", "32", "--config", "in/few.yaml"),
)
SCORING = ("--calibration", "in/text.txt", "--samples", "2", "--sequence-length", "16")

_SWEEP = """\
models: [../llama]
plans: [attention:1]
precisions: [fp32]
shapes: {prefill: [8], decode_past: [8]}
scoring: {calibration: ../in/text.txt, samples: 2, sequence_length: 16, batch_size: 2}
measuring:
  {rounds: 2, eval_text: ../in/other.txt, eval_tokens: 32, eval_sequence_length: 16, threads: 1,
   agreement_prompts: 0}
"""


def write_template(work: Path) -> None:
    """Makes the working directory that each try gets a copy of."""
    here = Path.cwd()
    (work / "in").mkdir(parents=True)
    os.chdir(work)
    try:
        _write_inputs(Path("in"))
        _write_models(work)
        _write_graph(work)
        _write_records(work)
        _write_media()
    finally:
        os.chdir(here)


def _write_inputs(folder: Path) -> None:
    """A decoder in PyTorch and as graphs, whole and cut, with texts, scores, plans and a sweep."""
    from tests.engine_support import written
    from tests.llama_shaped import LlamaShape, write_llama
    from tests.text_graphs import WORDS, write_llama_folder, write_tokenizer

    words = [WORDS[(7 * n + n // 5) % len(WORDS)] for n in range(600)]
    (folder / "text.txt").write_text(" ".join(words[:400]))
    (folder / "other.txt").write_text(" ".join(words[150:][::-1]))
    (folder / "few.yaml").write_text("agreement_prompts: 0\n")
    (folder / "short.yaml").write_text("eval_sequence_length: 16\n")
    (folder / "search.yaml").write_text("search_tokens: 32\nshortlist: 2\n")
    for name, layers in {"whole": 3, "cut": 2}.items():
        shape = LlamaShape(
            layers=layers, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=64,
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        (folder / name).mkdir()
        write_llama(folder / name / "model.onnx", shape, noise=0.1)
    write_tokenizer(folder / "whole")
    (folder / "engine").mkdir()
    written(folder / "engine")
    write_llama_folder(folder / "llama")
    _write_scores(folder)


def _write_scores(folder: Path) -> None:
    from exporter.artifacts.plans import parse_drops
    from exporter.cli import run

    if run(("score", "in/llama", "-o", "in/importance.json", *SCORING, "-q")):
        raise RuntimeError("the sound model can't be scored")
    for name, drops in {"plan": ["attention:1"], "blocks": ["block:1"]}.items():
        parse_drops(drops).write(folder / f"{name}.json")


def _write_models(work: Path) -> None:
    from tests.tiny_models import into_cache

    shutil.copytree("in/llama", "llama")
    shutil.copytree("in/llama", "download")
    into_cache(work / "download", work / "hub", subfolder="")
    (work / "download").rmdir()
    for name, config, model in (
        ("bert", "BertConfig", "BertModel"),
        ("vit", "ViTConfig", "ViTModel"),
    ):
        _write_encoder(work / name, config, model)


def _write_media() -> None:
    """A classifier with pictures, a listener with recordings, and a task."""
    from tests.tiny_models import write_classifier, write_images, write_recordings, write_source

    write_images(write_classifier(Path("seen")) / "pictures", 4)
    write_recordings(write_source(Path("heard"), "whisper") / "sounds", 0)
    item = {"query": "the", "choices": ["list", "of"], "gold": 0}
    Path("tasks").mkdir()
    Path("tasks/mine.jsonl").write_text(f"{json.dumps(item)}\n" * 3)


def _write_encoder(folder: Path, config: str, model: str) -> None:
    import torch
    import transformers

    from tests.tiny_models import SMALL

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SMALL, "hidden_size": 32, "intermediate_size": 48}
    if config == "ViTConfig":
        sizes = {
            key: value for key, value in sizes.items() if key.endswith(("size", "layers", "heads"))
        }
        sizes |= {"image_size": 16, "patch_size": 8}
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    made.save_pretrained(folder)
    if model == "BertModel":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"llama/{name}", folder / name)
    else:
        result = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(result))


def _write_graph(work: Path) -> None:
    """An ONNX model as onnxruntime-genai's builder leaves it."""
    shutil.copytree("in/whole", "onnx")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if Path("llama", name).exists():
            shutil.copy(f"llama/{name}", f"onnx/{name}")
    decoder = {
        "filename": "model.onnx", "num_hidden_layers": 3, "head_size": 8, "hidden_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key",
                   "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits"},
    }  # fmt: skip
    result = {"model": {"type": "llama", "decoder": decoder, "vocab_size": 64}, "search": {}}
    Path("onnx/genai_config.json").write_text(json.dumps(result))
    _write_encoder_graph(Path("encoder"))


def _write_encoder_graph(folder: Path) -> None:
    """The same files beside a graph without caches, which alone is packed for Triton."""
    from tests.tiny_graphs import TinySpec, tiny_model

    shutil.copytree("onnx", folder)
    (data,) = folder.glob("*.data*")
    encoder = tiny_model(TinySpec(cache=False))
    data.unlink()
    ir.save(encoder, folder / "model.onnx", external_data=data.name, size_threshold_bytes=0)


def _write_records(work: Path) -> None:
    """Reports, plans, engines and earlier results, in folders of their own."""
    from tests.made_reports import gate_report, gate_row

    for name in ("plans", "reports", "sweeps"):
        Path(name).mkdir()
    shutil.copytree("in/engine", "engine")
    shutil.copy("in/importance.json", "reports/importance.json")
    gate_report([gate_row()]).write(Path("reports/report.json"))
    _write_healed(Path("plans"))
    Path("sweeps/one.yaml").write_text(_SWEEP)
    out = Path("earlier")
    shutil.copytree("in/cut", out / "graph")
    shutil.copy("in/importance.json", out / "importance.json")
    shutil.copy("in/plan.json", out / "plan.json")
    shutil.copytree("in/llama", out / "res")
    if work != Path.cwd():
        raise RuntimeError(work)


def _write_healed(folder: Path) -> None:
    """A plan with replacements of its own."""
    import numpy as np
    from safetensors.numpy import save_file

    from exporter.files import sha256_file

    save_file({"attention.1.bias": np.zeros(32, np.float32)}, folder / "healed.safetensors")
    content = json.loads(Path("in/plan.json").read_text())
    content["deletions"] = [{"layer": 1, "kind": "attention", "replacement": "bias"}]
    content["replacements"] = {
        "path": "healed.safetensors", "sha256": sha256_file(folder / "healed.safetensors"),
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(content))


def in_a_child(task: Callable[[], None]) -> None:
    """Does something in a fork, so that this process stays one of one thread."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            task()
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the sound models could not be made")
