"""Other libraries that decode, each in a process of its own and maybe of another environment."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT, NEW = 64, 32
"""Tokens of the prompt, which counts from 3 on, and of the continuation."""

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A library that has loaded a model."""

    name: str
    same: str
    versions: dict[str, str]
    tokens: list[int]
    process: subprocess.Popen[str]

    def step_ms(self) -> float:
        """Generates once; the mean milliseconds of a token after the first."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def optimum(folder: Path, threads: int, python: str | None) -> Iterator[Peer | None]:
    """optimum on the same ONNX file; None, with the reason printed, where it can't run."""
    if python is None:
        print("optimum: skipped, no python of its environment is given (--optimum-python)")
        yield None
        return
    same = "the same ONNX file, with IO binding; each step goes through a torch module"
    with _peer("optimum", same, python, "peer_optimum.py", folder, threads) as peer:
        yield peer


@contextlib.contextmanager
def genai(folder: Path, threads: int, python: str) -> Iterator[Peer | None]:
    """onnxruntime-genai on the same ONNX file, to which a config is written in a folder beside."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as view:
        for file in folder.iterdir():
            if file.is_file() and file.name != "genai_config.json":
                os.link(file, Path(view, file.name))  # data behind symbolic links is refused
        Path(view, "genai_config.json").write_text(json.dumps(_config(folder)))
        same = "the same ONNX file, the cache handed on as outputs; greedy search in C++"
        with _peer("onnxruntime-genai", same, python, "peer_genai.py", Path(view), threads) as peer:
            yield peer


@contextlib.contextmanager
def genai_built(folder: Path | None, threads: int, python: str) -> Iterator[Peer | None]:
    """onnxruntime-genai on a folder of its own builder."""
    name = "onnxruntime-genai's own build"
    if folder is None:
        print(f"{name}: skipped, no folder of its model builder is given (--genai-dir)")
        yield None
        return
    same = "the same weights; another graph with fused attention, one buffer for the whole cache"
    with _peer(name, same, python, "peer_genai.py", folder, threads) as peer:
        yield peer


@contextlib.contextmanager
def _peer(
    name: str, same: str, python: str, script: str, folder: Path, threads: int
) -> Iterator[Peer | None]:
    command = [python, str(_HERE / script), str(folder), *map(str, (threads, PROMPT, NEW))]
    # Beside this file lie modules that would shadow others.
    command.insert(1, "-P")
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            process.wait()
            errors.seek(0)
            reason = "".join((errors.read().strip() or line).splitlines()[-1:])
            print(f"{name}: skipped, {python} failed: {reason}")
            yield None
            return
        try:
            yield Peer(name, same, **json.loads(line), process=process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _config(folder: Path) -> dict[str, Any]:
    """genai's config of a decoder whose names are optimum's."""
    import onnx

    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    plain = [value.name for value in graph.input if "past_key_values" not in value.name]
    heads = model["num_attention_heads"]
    past, present = (
        {f"{kind}_{part}_names": f"{prefix}.%d.{part}" for part in ("key", "value")}
        for kind, prefix in (("past", "past_key_values"), ("present", "present"))
    )
    decoder = {
        "filename": "model.onnx",
        "head_size": model.get("head_dim") or model["hidden_size"] // heads,
        "hidden_size": model["hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("num_key_value_heads") or heads,
        "num_hidden_layers": sum(v.name.endswith(".key") for v in graph.input),
        "inputs": {**{name: name for name in plain}, **past},
        "outputs": {"logits": "logits", **present},
        "session_options": {"provider_options": []},
    }
    ends = {name: model.get(name) or 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "model": {
            **ends,
            "type": model["model_type"],
            "context_length": model["max_position_embeddings"],
            "vocab_size": model["vocab_size"],
            "decoder": decoder,
        },
        "search": {"do_sample": False, "past_present_share_buffer": False, "max_length": 512},
    }
