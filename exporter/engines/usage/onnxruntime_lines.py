"""The lines that run a graph on ONNX Runtime itself, with numpy."""

from __future__ import annotations

import onnx_ir as ir

from exporter.artifacts.uses import PLACE, Use
from exporter.engines.usage.model import TOKENIZER, UsedModel
from graph_passes.fusing.pooling import EMBEDDING, STATES

PROMPT = "The capital of France is"
_TEXTS = ("A cat sits on the mat.", "A dog lies on the rug.")
_DTYPES = {"FLOAT": "np.float32", "FLOAT16": "np.float16"}
_STEP = {
    "input_ids": "np.array([step], np.{})",
    "attention_mask": "np.ones((1, length), np.{})",
    "position_ids": "np.arange(length - len(step), length, dtype=np.{})[None]",
}
_ENCODED = {
    "input_ids": "each.ids",
    "attention_mask": "each.attention_mask",
    "token_type_ids": "each.type_ids",
}


def decoder_lines(model: UsedModel) -> Use | None:
    """Greedy generation, with the caches carried on by hand.

    Returns:
        None where a cache has a fixed length, or a kind or size that can't be told.
    """
    zeros = _empty_caches(model)
    others = [name for name in model.inputs if name not in model.pasts]
    if zeros is None or not set(others) <= _STEP.keys() or "input_ids" not in others:
        return None
    lines = [
        *_opened(model),
        *_encoded_prompt(model),
        *zeros,
        "step, length = tokens, 0",
        f"for _ in range({model.new_tokens}):",
        "    length += len(step)",
        "    feed = {",
        *(f'        "{name}": {_STEP[name].format(_integer(model, name))},' for name in others),
        "    }",
        '    logits, *presents = session.run(["logits", *outputs], {**feed, **caches})',
        "    caches = dict(zip(caches, presents))",
        "    step = [int(logits[0, -1].argmax())]",
        *([f"    if step[0] in {tuple(model.ends)}:", "        break"] if model.ends else ()),
        "    tokens += step",
        "print(tokenizer.decode(tokens))" if model.has_tokenizer else "print(tokens)",
    ]
    return Use(library="ONNX Runtime", needs=_needs(model), text="\n".join(lines))


def encoder_lines(model: UsedModel) -> Use | None:
    """Two texts at once, and what comes out of them; None where it takes no texts."""
    if not model.has_tokenizer or not set(model.inputs) <= _ENCODED.keys() or not model.inputs:
        return None
    lines = [
        *_opened(model),
        "tokenizer.enable_padding()",
        f'texts = ["{_TEXTS[0]}", "{_TEXTS[1]}"]',
        "encoded = tokenizer.encode_batch(texts)",
        "feed = {",
        *(
            f'    "{name}": np.array([{_ENCODED[name]} for each in encoded], '
            f"np.{_integer(model, name)}),"
            for name in model.inputs
        ),
        "}",
        f'found = session.run(["{_shown(model)}"], feed)[0]',
        *_answer(model),
    ]
    return Use(library="ONNX Runtime", needs=_needs(model), text="\n".join(lines))


_VECTORS: dict[tuple[str, ...], list[str]] = {
    ("mean",): [
        'mask = feed["attention_mask"][..., None]',
        "vectors = (found * mask).sum(1) / mask.sum(1)",
    ],
    ("cls",): ["vectors = found[:, 0]"],
    ("lasttoken",): [
        'last = feed["attention_mask"].sum(1) - 1',
        "vectors = found[np.arange(len(found)), last]",
    ],
}
"""How a vector is made of token states, by the modes of the pooling."""


def _shown(model: UsedModel) -> str:
    return EMBEDDING if EMBEDDING in model.outputs else model.outputs[0]


def _answer(model: UsedModel) -> list[str]:
    """What is made of an encoder's output: a vector for each text, or what its head says."""
    pooled = {EMBEDDING: ["vectors = found"], STATES: _VECTORS.get(model.pooling.modes)}
    vectors = pooled.get(_shown(model))
    if vectors is None:
        return ["print(found.shape)"]
    return [
        *vectors,
        "vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)",
        "print(vectors @ vectors.T)  # their cosines",
    ]


def _integer(model: UsedModel, name: str) -> str:
    """The type of an input of tokens."""
    return "int32" if model.inputs[name].dtype == ir.DataType.INT32 else "int64"


def _opened(model: UsedModel) -> list[str]:
    provider = "CUDA" if model.target == "onnxruntime-cuda" else "CPU"
    where = f'f"{{{PLACE}}}/{model.file}"'
    lines = ["import numpy as np", "import onnxruntime as ort"]
    lines += ["from tokenizers import Tokenizer"] if model.has_tokenizer else []
    lines += [
        "",
        f'session = ort.InferenceSession({where}, providers=["{provider}ExecutionProvider"])',
    ]
    if model.has_tokenizer:
        lines.append(f'tokenizer = Tokenizer.from_file(f"{{{PLACE}}}/{TOKENIZER}")')
    return lines


def _encoded_prompt(model: UsedModel) -> list[str]:
    if model.has_tokenizer:
        return [f'tokens = tokenizer.encode("{PROMPT}").ids']
    return ["tokens = [1, 2, 3]  # of the model's tokenizer, which is not in this folder"]


def _empty_caches(model: UsedModel) -> list[str] | None:
    """Empty caches under the graph's own names, which may have gaps in their numbers."""
    form = model.form
    if form.buffer is not None or form.mask is not None or any(form.windows.values()):
        return None
    dtypes = {getattr(model.inputs[past].dtype, "name", "") for past in model.pasts}
    sizes = {form.heads.get(past, (None, None)) for past in model.pasts}
    if not model.pasts:
        return ["caches, outputs = {}, []"]
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys() or any(None in pair for pair in sizes):
        return None
    if len(sizes) == 1:
        heads, size = next(iter(sizes))
        shape = f"(1, {heads}, 0, {size})"
    else:
        shape = "(1, each.shape[1], 0, each.shape[3])"
    return [
        "# A dropped attention has no cache: the graph itself says which layers have one.",
        'pasts = [each for each in session.get_inputs() if each.name.startswith("past")]',
        f"caches = {{each.name: np.zeros({shape}, {_DTYPES[dtypes.pop()]}) for each in pasts}}",
        'outputs = [name.replace("past_key_values", "present") for name in caches]',
    ]


def _needs(model: UsedModel) -> str:
    runtime = "onnxruntime-gpu" if model.target == "onnxruntime-cuda" else "onnxruntime"
    return f"{runtime} numpy{' tokenizers' if model.has_tokenizer else ''}"
