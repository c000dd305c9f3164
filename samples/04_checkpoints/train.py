"""Trains a tiny Llama on Python's own documentation and keeps checkpoints on the way.

Half a minute on one core. The text is the half that depthcut calibrates on; what it judges on stays
unseen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from exporter.models.texts.sources import read_texts

VOCABULARY, LENGTH, ROWS = 512, 64, 16


def make_tokenizer(documents: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte pairs, learnt from the text itself."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        documents, vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<end>", bos_token="<end>"
    )


def make_model(layers: int) -> LlamaForCausalLM:
    """A few hundred thousand weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=176, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def kept_steps(steps: int) -> set[int]:
    """Twice as many from one checkpoint to the next; the last step is one."""
    return {steps // 2**halvings for halvings in range(6)} - {0}


def train(out: Path, steps: int, layers: int) -> None:
    """Writes ``checkpoint-N`` folders, each a model with its tokenizer."""
    disable_progress_bar()  # transformers' own, one for each folder that is saved
    torch.manual_seed(0)
    documents = read_texts("pydoc", part="calibration").documents
    tokenizer = make_tokenizer(documents)
    model, ids = make_model(layers), np.array(tokenizer("\n".join(documents)).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng, kept = np.random.default_rng(0), kept_steps(steps)
    for step in range(1, steps + 1):
        starts = rng.integers(0, len(ids) - LENGTH, size=ROWS)
        batch = torch.from_numpy(np.stack([ids[start : start + LENGTH] for start in starts]))
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in kept:
            folder = out / f"checkpoint-{step}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            print(f"step {step}: loss {loss.item():.2f}, {folder}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    asked = parser.parse_args()
    train(asked.out, asked.steps, asked.layers)


if __name__ == "__main__":
    main()
