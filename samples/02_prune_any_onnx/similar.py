"""Shows what a cut did to sentence embeddings: how similar each pair is, before and after.

Call: ``python similar.py MODEL_FOLDER original.onnx pruned.onnx``
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PAIRS = [
    ("A man is playing a guitar.", "Someone makes music on an instrument."),
    ("The train was two hours late.", "We waited very long at the station."),
    ("How do I reset my password?", "I forgot my login and can't get in."),
    ("The cat sleeps on the sofa.", "Quarterly revenue rose by four percent."),
    ("Water boils at 100 degrees.", "The committee meets again on Monday."),
]


def embed(model: str, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Mean of the last hidden state over real tokens, of length 1: ``[texts, hidden]``."""
    encoded = tokenizer.encode_batch(texts)
    mask = np.array([e.attention_mask for e in encoded], np.int64)
    feeds = {"input_ids": np.array([e.ids for e in encoded], np.int64), "attention_mask": mask}
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for needed in session.get_inputs():
        feeds.setdefault(needed.name, np.zeros_like(mask))  # token_type_ids: one sentence
    feeds = {needed.name: feeds[needed.name] for needed in session.get_inputs()}
    hidden = session.run(None, feeds)[0]
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


folder, original, pruned = sys.argv[1:]
tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
tokenizer.enable_padding()
texts = [text for pair in PAIRS for text in pair]
embeddings = [embed(model, tokenizer, texts) for model in (original, pruned)]
print("before  after  cosine of each pair")
for i, (one, other) in enumerate(PAIRS):
    cosines = [float(e[2 * i] @ e[2 * i + 1]) for e in embeddings]
    print("  ".join(f"{cosine:5.2f}" for cosine in cosines), f"   {one} / {other}")
