"""Writes a folder's greedy continuations as vLLM computes them. Needs vllm alone."""

from __future__ import annotations

import json
import sys

import numpy as np
import vllm


def main(folder: str, prompts: str, new: str, out: str) -> None:
    model = vllm.LLM(
        folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=512,
        max_num_seqs=32, enable_prefix_caching=False,
    )  # fmt: skip
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=int(new), ignore_eos=True)
    asked = [{"prompt_token_ids": tokens} for tokens in np.load(prompts).tolist()]
    found = [list(each.outputs[0].token_ids) for each in model.generate(asked, greedy)]
    np.save(out, np.array(found, np.int64))
    print(json.dumps({"version": vllm.__version__}))


if __name__ == "__main__":  # vLLM starts processes, which import this again
    main(*sys.argv[1:])
