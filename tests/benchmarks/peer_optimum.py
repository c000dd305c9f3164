"""Decode steps of optimum's ORTModelForCausalLM, asked for line by line; see ``decoding_peers``."""

from __future__ import annotations

import json
import sys
import time

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(folder: str, threads: int, prompt: int, new: int) -> None:
    """Says that it is ready, and for each line of the input what the later tokens took."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    model = ORTModelForCausalLM.from_pretrained(
        folder, session_options=options, use_io_binding=True
    )
    torch.set_num_threads(threads)
    ids = torch.arange(3, 3 + prompt)[None]

    def generate() -> tuple[float, list[int]]:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        token, past = found.logits[:, -1:].argmax(-1), found.past_key_values
        tokens, begin = [int(token)], time.perf_counter()
        for number in range(new - 1):
            mask = torch.ones((1, prompt + number + 1), dtype=torch.int64)
            found = model(
                input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True
            )
            token, past = found.logits[:, -1:].argmax(-1), found.past_key_values
            tokens.append(int(token))
        return (time.perf_counter() - begin) / (new - 1) * 1e3, tokens

    _, tokens = generate()
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    print(json.dumps({"tokens": tokens, "versions": versions}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(generate()[0]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
