"""What is sound before it is spoilt: models of a few kilobytes, and all that commands are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.command_inputs import write_inputs

_DECODER = {
    "filename": "model.onnx", "num_hidden_layers": 3, "head_size": 8, "hidden_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key",
               "past_value_names": "past_key_values.%d.value"},
    "outputs": {"logits": "logits"},
}  # fmt: skip


def write_template() -> None:
    """Fills the working directory, of which each try gets a copy."""
    write_inputs(Path("in"))
    for name in ("tasks", "plans", "reports", "sweeps", "earlier"):
        Path(name).mkdir()
    _write_models()
    _write_graphs()
    _write_records()


def _write_models() -> None:
    """A decoder, also in the cache of the Hub, an encoder, a classifier and a listener."""
    from tests.tiny_models import (
        into_cache,
        write_classifier,
        write_encoder,
        write_images,
        write_recordings,
        write_source,
    )

    shutil.copytree("in/llama", "llama")
    shutil.copytree("in/llama", "download")
    into_cache(Path("download").resolve(), Path("hub").resolve(), subfolder="")
    Path("download").rmdir()
    write_encoder(Path("bert"))
    shutil.copytree(write_classifier(Path("vit")), "seen")
    write_images(Path("seen/pictures"), 4)
    write_recordings(write_source(Path("heard"), "whisper") / "sounds", 0)


def _write_graphs() -> None:
    """A decoder and an encoder, with what onnxruntime-genai's builder leaves beside a graph."""
    result = {"model": {"type": "llama", "decoder": _DECODER, "vocab_size": 64}, "search": {}}
    for name, source in {"onnx": "in/whole", "encoder": "in/encoder"}.items():
        shutil.copytree(source, name)
        for file in (*Path("in/whole").glob("*.json"), *Path("llama").glob("*config.json")):
            shutil.copy(file, f"{name}/{file.name}")
        Path(name, "genai_config.json").write_text(json.dumps(result))


def _write_records() -> None:
    """Tasks, reports, plans, engines and earlier results, in folders of their own."""
    import numpy as np
    from safetensors.numpy import save_file

    from exporter.files import sha256_file
    from tests.made_reports import gate_report, gate_row

    item = {"query": "the", "choices": ["list", "of"], "gold": 0}
    Path("tasks/mine.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    shutil.copytree("in/engine", "engine")
    shutil.copy("in/importance.json", "reports")
    gate_report([gate_row()]).write(Path("reports/report.json"))
    sweep = Path("in/one.yaml").read_text().replace("[llama]", "[../llama]")
    sweep = sweep.replace("text.txt", "../in/text.txt").replace("other.txt", "../in/other.txt")
    Path("sweeps/one.yaml").write_text(sweep)
    numbers = Path("plans/healed.safetensors")
    save_file({"attention.1.bias": np.zeros(32, np.float32)}, numbers)
    plan = json.loads(Path("in/plan.json").read_text())
    plan["deletions"] = [{"layer": 1, "kind": "attention", "replacement": "bias"}]
    plan["replacements"] = {"path": numbers.name, "sha256": sha256_file(numbers)}
    Path("plans/plan.json").write_text(json.dumps(plan))
    shutil.copytree("in/cut", "earlier/graph")
    shutil.copytree("in/llama", "earlier/res")
    for name in ("importance", "plan"):
        shutil.copy(f"in/{name}.json", "earlier")
