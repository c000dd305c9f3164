"""Answers one prompt with each GGUF file that is named, in llama.cpp."""

import sys

from llama_cpp import Llama

for path in sys.argv[1:]:
    model = Llama(path, n_ctx=256, flash_attn=True, verbose=False)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = model.create_chat_completion(messages, max_tokens=24, temperature=0)
    print(f"{path}: {answer['choices'][0]['message']['content']}")
