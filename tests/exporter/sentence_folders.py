"""Folders of encoders: random weights, a tokenizer, what sentence-transformers adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.exporter.tiny_lm import WORDS, write_tokenizer

_MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


def write_sentence_files(
    folder: Path,
    *,
    pooling: Mapping[str, Any] = _MEAN,
    normalise: bool = False,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
) -> None:
    """Writes them beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if prompts is not None:
        text = json.dumps({"prompts": prompts, "default_prompt_name": default_prompt})
        (folder / "config_sentence_transformers.json").write_text(text)


def write_dense(
    folder: Path, *, inputs: int, outputs: int, activation: str = "Tanh"
) -> tuple[Any, Any]:
    """Writes the files of a sentence encoder with a product between pooling and Normalize."""
    write_sentence_files(folder, normalise=True)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense, *modules[2:]]))
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(outputs, inputs)), rng.normal(size=outputs)
    (folder / "2_Dense").mkdir(exist_ok=True)
    numbers = {"linear.weight": weight, "linear.bias": bias}
    save_file(numbers, folder / "2_Dense" / "model.safetensors")
    result = {"activation_function": f"torch.nn.modules.activation.{activation}"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(result))
    return weight, bias


def write_encoder(folder: Path, head: str = "Model", **config: Any) -> None:
    """A random BERT of three layers, whose tokenizer knows the words of ``tiny_lm``."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    made = getattr(transformers, f"Bert{head}")(transformers.BertConfig(**sizes | config))
    made.save_pretrained(folder)
    write_tokenizer(folder)
    result = {"model_input_names": ["input_ids", "attention_mask"], "pad_token": "[UNK]"}
    file = str(folder / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=file, **result).save_pretrained(folder)


def write_bert_tokenizer(folder: Path) -> None:
    """The tokenizer of ``tiny_lm`` with ``[CLS]`` (21) before and ``[SEP]`` (22) behind a text."""
    from tokenizers import Tokenizer, processors

    write_tokenizer(folder, [*WORDS, "[CLS]", "[SEP]"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [(end, tokenizer.token_to_id(end)) for end in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_passages(path: Path, number: int = 40) -> None:
    """A text of paragraphs of known words, no two alike."""
    rng = np.random.default_rng(0)
    paragraphs = [" ".join(rng.choice(WORDS, rng.integers(14, 30))) for _ in range(number)]
    path.write_text("\n\n".join(paragraphs))
