"""Decode steps of onnxruntime-genai, asked for line by line; see ``decoding_peers``."""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata

import numpy as np
import onnxruntime_genai


def main(folder: str, threads: int, prompt: int, new: int) -> None:
    """Says that it is ready, and for each line of the input what the later tokens took."""
    config = onnxruntime_genai.Config(folder)
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    ids = np.arange(3, 3 + prompt, dtype=np.int32)[None]

    def generate() -> tuple[float, list[int]]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=prompt + new, min_length=prompt + new)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        begin = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        taken_s = time.perf_counter() - begin
        return taken_s / (new - 1) * 1e3, [int(t) for t in generator.get_sequence(0)[prompt:]]

    _, tokens = generate()
    versions = {name: metadata.version(name) for name in ("onnxruntime-genai", "onnxruntime")}
    print(json.dumps({"tokens": tokens, "versions": versions}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(generate()[0]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
