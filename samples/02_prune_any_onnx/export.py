"""Exports an encoder with PyTorch alone, the way many ONNX files come about.

Call: ``python export.py MODEL_FOLDER encoder.onnx``
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel


class Encoder(torch.nn.Module):
    """Token ids and mask, ``[batch, sequence]`` each, to the last hidden state."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask).last_hidden_state


source, target = sys.argv[1:]
model = AutoModel.from_pretrained(source, local_files_only=True).eval()
batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
tokens = torch.randint(1000, (2, 7))
Path(target).parent.mkdir(parents=True, exist_ok=True)
torch.onnx.export(
    Encoder(model),
    (tokens, torch.ones_like(tokens)),
    target,
    dynamo=True,
    opset_version=20,
    verbose=False,
    input_names=["input_ids", "attention_mask"],
    output_names=["last_hidden_state"],
    dynamic_shapes=({0: batch, 1: sequence}, {0: batch, 1: sequence}),
)
