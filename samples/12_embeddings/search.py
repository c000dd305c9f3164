"""Searches a corpus with a graph that pools by itself, and prints the best answer to each query.

Call: ``python search.py FOLDER corpus.jsonl``; the folder has model.onnx and tokenizer.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, corpus = map(Path, sys.argv[1:])
lines = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
passages = [line for line in lines if "id" in line]
queries = [line for line in lines if "query" in line]

tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding()
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def embed(texts: list[str]) -> np.ndarray:
    """Of length 1, ``[texts, size]``."""
    encoded = tokenizer.encode_batch(texts)
    known = {
        "input_ids": np.array([each.ids for each in encoded], np.int64),
        "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
        "token_type_ids": np.array([each.type_ids for each in encoded], np.int64),
    }
    feeds = {each.name: known[each.name] for each in session.get_inputs()}
    (vectors,) = session.run(["sentence_embedding"], feeds)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


cosines = embed([each["query"] for each in queries]) @ embed([each["text"] for each in passages]).T
best = cosines.argmax(axis=1)
right = sum(passages[at]["id"] in q["relevant"] for q, at in zip(queries, best, strict=True))
print(f"{folder.name}: {right} of {len(queries)} right")
for query, at in zip(queries, best, strict=True):
    print(f"  {query['query']} -> {passages[at]['id']}")
