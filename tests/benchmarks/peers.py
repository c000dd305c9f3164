"""Other programs with a decoder, run by the Python of an environment that has them.

``peers.py serve LIBRARY MODEL THREADS CONTEXT`` answers ``prefill TOKENS`` and ``decode TOKENS
STEPS`` line by line with milliseconds; ``answers LIBRARY MODEL IDS.npy OUT.npy`` writes logits;
``times ROUNDS WHOLE.gguf CUT.gguf`` lets files take turns in llama.cpp, with one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_MOST_STEPS = 256


class Depthcut:
    """depthcut's own decoder on an ONNX folder; as all, it gives the likeliest next token."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        from exporter.engines.decoding.generate import open_decoder

        path = Path(model, "model.onnx")
        self._decoder = open_decoder(path, threads=threads, context=context).__enter__()

    def prefill(self, ids: Any) -> int:
        return int(self._decoder.prefill(ids).argmax(-1)[0])

    def step(self, token: int) -> int:
        return int(self._decoder.step(np.array([[token]])).argmax(-1)[0])


class Genai:
    """onnxruntime-genai; it takes the next token by itself."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import onnxruntime_genai as runtime

        config: Any = runtime.Config(model)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._runtime, self._context = runtime, context
        self._model: Any = runtime.Model(config)
        self._generator: Any = None

    def prefill(self, ids: Any) -> int:
        parameters = self._runtime.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=self._context, min_length=self._context, do_sample=False
        )
        self._generator = self._runtime.Generator(self._model, parameters)
        self._generator.append_tokens(ids.astype(np.int32))
        return self.step(0)

    def step(self, token: int) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class Torch:
    """transformers, logits of the last position only."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self._model = torch, self._loaded(model, threads)
        self._past: Any = None
        self._length = 0

    def _loaded(self, model: str, threads: int) -> Any:
        import transformers

        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(model, local_files_only=True).eval()

    def _inputs(self, new: int) -> dict[str, Any]:
        places = self._torch.arange(self._length - new, self._length)[None]
        return {"position_ids": places, "logits_to_keep": 1}

    def prefill(self, ids: Any) -> int:
        self._past, self._length = None, 0
        return self._run(self._torch.tensor(ids))

    def step(self, token: int) -> int:
        return self._run(self._torch.tensor([[token]]))

    def _run(self, ids: Any) -> int:
        self._length += ids.shape[1]
        more = self._inputs(ids.shape[1])
        with self._torch.inference_mode():
            answer = self._model(input_ids=ids, past_key_values=self._past, use_cache=True, **more)
        self._past = answer.past_key_values
        return int(answer.logits[0, -1].argmax())


class Optimum(Torch):
    """optimum's ORTModelForCausalLM with IO binding."""

    def _loaded(self, model: str, threads: int) -> Any:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        return ORTModelForCausalLM.from_pretrained(
            model, session_options=options, use_io_binding=True
        )

    def _inputs(self, new: int) -> dict[str, Any]:
        return {"attention_mask": self._torch.ones((1, self._length), dtype=self._torch.int64)}


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    def __init__(self, model: str, threads: int, context: int, **more: Any) -> None:
        import llama_cpp

        self._library = llama_cpp
        self.model: Any = llama_cpp.Llama(
            model, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, **more
        )

    def prefill(self, ids: Any) -> int:
        self.model.reset()
        return self._eval(ids[0].tolist())

    def step(self, token: int) -> int:
        return self._eval([token])

    def _eval(self, ids: list[int]) -> int:
        self.model.eval(ids)
        logits = self._library.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax())


LIBRARIES: dict[str, tuple[Callable[[str, int, int], Any], tuple[str, ...]]] = {
    "depthcut": (Depthcut, ("onnxruntime",)),
    "onnxruntime-genai": (Genai, ("onnxruntime-genai", "onnxruntime")),
    "optimum": (Optimum, ("optimum", "onnxruntime")),
    "torch": (Torch, ("torch", "transformers")),
    "llama.cpp": (LlamaCpp, ("llama-cpp-python",)),
}


class Served:
    """A session with the place where it stands."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._prompt, self._steps, self._token = 0, 0, 0

    def prefill(self, tokens: int) -> float:
        """Milliseconds from the prompt to the first new token."""
        ids = np.random.default_rng(0).integers(3, 32000, (1, tokens))
        begin = time.perf_counter()
        self._token = self._session.prefill(ids)
        taken = (time.perf_counter() - begin) * 1e3
        self._prompt, self._steps = tokens, 0
        return taken

    def decode(self, tokens: int, steps: int) -> float:
        """Milliseconds of a step."""
        if self._prompt != tokens or self._steps + steps > _MOST_STEPS:
            self.prefill(tokens)
        begin = time.perf_counter()
        for _ in range(steps):
            self._token = self._session.step(self._token)
        self._steps += steps
        return (time.perf_counter() - begin) / steps * 1e3


def serve(library: str, model: str, threads: str, context: str) -> None:
    """Says that it is ready, then answers."""
    make, distributions = LIBRARIES[library]
    served = Served(make(model, int(threads), int(context)))
    print(json.dumps({name: metadata.version(name) for name in distributions}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        print(json.dumps(getattr(served, command)(*map(int, numbers))), flush=True)


def answers(library: str, model: str, ids: str, out: str) -> None:
    """Writes the logits of all positions, and prints the library's version."""
    tokens = np.load(ids)
    if library == "mlx":
        import mlx.core as mx
        import mlx_lm

        made, _ = mlx_lm.load(model, tokenizer_config={"trust_remote_code": True})
        logits, version = made(mx.array(tokens[None]))[0].astype(mx.float32), mlx_lm.__version__
    else:
        llama = LlamaCpp(model, 1, 512, n_batch=512, logits_all=True, flash_attn=True).model
        llama.eval(tokens.tolist())
        logits, version = llama.scores[: len(tokens)], metadata.version("llama-cpp-python")
    np.save(out, np.array(logits, np.float32))
    print(json.dumps({"version": version}))


def times(rounds: str, *paths: str) -> None:
    """Prints medians of seconds and of the rounds' ratios, first over second, and all samples."""
    arms = [Served(LlamaCpp(path, 1, 2304, n_batch=512, flash_attn=True)) for path in paths]
    samples: dict[str, list[list[float]]] = {}
    for arm in arms:
        arm.prefill(512)
    for number in range(int(rounds)):
        for prompt in (512, 2048):
            order = list(enumerate(arms))[:: 1 if number % 2 == 0 else -1]
            read = {at: (arm.prefill(prompt), arm.decode(prompt, 32)) for at, arm in order}
            for place, name in enumerate((f"prompt {prompt}", f"step at {prompt}")):
                row = [read[at][place] / 1e3 for at in range(len(arms))]
                samples.setdefault(name, []).append(row)
    columns = {name: zip(*rows, strict=True) for name, rows in samples.items()}
    medians = {name: [*map(statistics.median, both)] for name, both in columns.items()}
    ratios = {n: statistics.median(row[0] / row[1] for row in rows) for n, rows in samples.items()}
    print(json.dumps({"seconds": medians, "ratios": ratios, "samples": samples}))


if __name__ == "__main__":
    {"serve": serve, "answers": answers, "times": times}[sys.argv[1]](*sys.argv[2:])
