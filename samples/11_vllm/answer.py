"""Answers a prompt with a folder in vLLM."""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes, which import this again
    model = LLM(sys.argv[1], trust_remote_code=True, max_model_len=512)
    asked = ["The capital of France is"]
    for answer in model.generate(asked, SamplingParams(temperature=0.0, max_tokens=16)):
        print(answer.prompt + answer.outputs[0].text)
