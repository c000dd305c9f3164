"""LLM-Drop's own similarity function, on activations that are recorded here."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PACKAGE = "llm_drop_prune"
_FOLDER = "src/llmtuner/compression/prune"
Recorded = dict[tuple[int, str], list[torch.Tensor]]


def similarities(checkout: Path, model: Any, ids: torch.Tensor, target: str) -> list[float]:
    """What its ``get_layer_similarities`` gives for every layer of a Llama model."""
    recorded, samples = _recorded(model, ids), len(ids)
    code = _loaded(checkout)
    nothing = [None] * samples
    code.prepare_calibration_input = lambda *_: (recorded[0, "in"], *[nothing] * 4)
    accelerator = types.SimpleNamespace(
        device="cpu", is_main_process=False, print=lambda *_: None,
        unwrap_model=lambda module: module, reduce=lambda value, reduction: value,
    )  # fmt: skip
    layers = len(model.model.layers)
    stand_in = _stand_in(recorded, layers, samples)
    layer_similarities = code.get_layer_similarities(
        stand_in, None, accelerator, samples, True, target
    )
    return [float(value) for value in layer_similarities]


def _loaded(checkout: Path) -> Any:
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(checkout / _FOLDER)]
    # What the function asks of these has nothing to do with its figures.
    files, tools = types.ModuleType(f"{_PACKAGE}.io"), types.ModuleType(f"{_PACKAGE}.utils")
    vars(files).update(create_dir=None)
    vars(tools).update(
        print_gpu_memory=lambda _: None, prepare_calibration_input=None, auto_map={}, CUSTOM_FILE={}
    )
    for module in (package, files, tools):
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{_PACKAGE}.layer_drop")


def _recorded(model: Any, ids: torch.Tensor) -> Recorded:
    """Each layer's streams and branch outputs, a tensor ``[1, tokens, hidden]`` a sample."""
    recorded: Recorded = {}
    handles = []

    def keep(layer: int, name: str, output: bool) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, result: Any) -> None:
            first = result[0] if isinstance(result, tuple) else result
            given = args[0] if args else kwargs.get("hidden_states")
            recorded.setdefault((layer, name), []).append((first if output else given).clone())

        return hook

    for number, layer in enumerate(model.model.layers):
        for name, module, output in (
            ("in", layer.input_layernorm, False), ("attn", layer.self_attn, True),
            ("mid", layer.post_attention_layernorm, False), ("mlp", layer.mlp, True),
            ("out", layer, True),
        ):  # fmt: skip
            hook = keep(number, name, output)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        for row in ids:
            model.model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return recorded


class _Replay(nn.Module):
    """Gives back one recorded output after the other, round and round."""

    def __init__(self, values: list[torch.Tensor], in_tuple: bool) -> None:
        super().__init__()
        self._values, self._in_tuple, self.calls = values, in_tuple, 0

    def forward(self, _stream: torch.Tensor) -> Any:
        value = self._values[self.calls % len(self._values)]
        self.calls += 1
        return (value,) if self._in_tuple else value


class _Layer(nn.Module):
    def __init__(self, recorded: Recorded, number: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.Identity(), nn.Identity()
        self.self_attn = _Replay(recorded[number, "attn"], in_tuple=True)
        self.mlp = _Replay(recorded[number, "mlp"], in_tuple=False)
        self._recorded, self._number = recorded, number

    def forward(self, _stream: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        streams = {name: self._recorded[self._number, name] for name in ("in", "mid", "out")}
        sample = self.self_attn.calls % len(streams["in"])
        self.self_attn(self.input_layernorm(streams["in"][sample]))
        self.mlp(self.post_attention_layernorm(streams["mid"][sample]))
        return (streams["out"][sample],)


def _stand_in(recorded: Recorded, layers: int, samples: int) -> nn.Module:
    model, inner = nn.Module(), nn.Module()
    inner.layers = nn.ModuleList(_Layer(recorded, number) for number in range(layers))
    model.model = inner
    model.config = types.SimpleNamespace(
        num_hidden_layers=layers, model_type="llama", use_cache=False
    )
    return model
