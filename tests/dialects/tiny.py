"""The models that every exporter writes: small, random, each branch large enough to be missed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.exporter.tiny_families import tiny_tokenizer
from tests.tiny_torch import tiny_loaded

HEADS, HIDDEN = 4, 64
ENCODER_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 0, "vocab_size": 96, "hidden_size": HIDDEN},
    "bert": {"num_hidden_layers": 0, "hidden_size": HIDDEN},
    "gpt2": {"n_layer": 0},
    "gemma2": {"num_hidden_layers": 0, "vocab_size": 96, "hidden_size": HIDDEN, "head_dim": 16}
    | {"sliding_window": 8},
}


def loaded(family: str, layers: int, *, dtype: str = "float32", eager: bool = False) -> Any:
    """A model of a family, as the loader gives it."""
    changes = {k: layers if "layer" in k else v for k, v in _SIZES[family].items()}
    if eager:
        changes["attn_implementation"] = "eager"
    made = tiny_loaded(family, dtype=dtype, initializer_range=0.2, **changes)
    for name, weight in made.model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide whose bias goes where
            weight.normal_(std=0.1)
    return made


def checkpoint(folder: Path, family: str, layers: int) -> Path:
    """A folder with a decoder and a tokenizer, for builders that read one."""
    made = loaded(family, layers)
    made.model.generation_config.max_length = None
    made.model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def flat_decoder(made: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """A decoder as a module of plain tensors, an example of its inputs, and its interface."""
    import torch

    from exporter.models.onnx_interface import InterfaceModule, interface_of

    interface = interface_of(made.model)
    inner = InterfaceModule(made.model, interface)
    count = len(interface.token_inputs)

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *values: Any) -> Any:
            tokens = dict(zip(interface.token_inputs, values[:count], strict=True))
            return tuple(self.inner(tokens, values[count:]))

    ids = torch.ones(2, 3, dtype=torch.long)
    positions = torch.arange(5, 8).expand(2, -1).contiguous()
    tokens = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": positions,
    }
    example = [tokens[name] for name in interface.token_inputs]
    return Flat(), (*example, *interface.random_past(2, 5)), interface


def flat_encoder(made: Any) -> tuple[Any, tuple[Any, ...]]:
    """An encoder as a module of plain tensors, and an example of its inputs."""
    import torch

    model = made.model

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *inputs: Any) -> Any:
            named = dict(zip(ENCODER_INPUTS, inputs, strict=True))
            return self.inner(**named).last_hidden_state

    return Encoder(), (torch.ones(2, 6, dtype=torch.long),) * len(ENCODER_INPUTS)


def axes(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, dict[int, str]]:
    """Named dimensions, as TorchScript's exporter takes them."""
    found: dict[str, dict[int, str]] = {}
    for name in (*inputs, *outputs):
        if name.startswith("past"):
            found[name] = {0: "batch", 2: "past"}
        elif name.startswith("present") or name == "attention_mask":
            found[name] = {0: "batch", 2 if name.startswith("present") else 1: "total"}
        else:
            found[name] = {0: "batch", 1: "sequence"}
    return found
