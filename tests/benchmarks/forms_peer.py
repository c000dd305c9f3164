"""One library with one decoder, asked for prompts and steps line by line; see bench_forms."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_MOST_STEPS = 256


class Session(Protocol):
    """A loaded decoder; both calls give the likeliest next token."""

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        """Forgets everything and runs a prompt ``[1, tokens]``."""

    def step(self, token: int) -> int:
        """Runs one more token."""


class Depthcut:
    """depthcut's own decoder on an ONNX folder."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder

        path = Path(model, "model.onnx")
        self._decoder = OnnxRuntimeDecoder(path, threads=threads, context=context).__enter__()

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
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

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
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


class Optimum:
    """optimum's ORTModelForCausalLM with IO binding."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = ORTModelForCausalLM.from_pretrained(
            model, session_options=options, use_io_binding=True
        )
        self._past: Any = None
        self._length = 0

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        self._past, self._length = None, 0
        return self._run(self._torch.tensor(ids))

    def step(self, token: int) -> int:
        return self._run(self._torch.tensor([[token]]))

    def _run(self, ids: Any) -> int:
        self._length += ids.shape[1]
        mask = self._torch.ones((1, self._length), dtype=self._torch.int64)
        answer = self._model(
            input_ids=ids, attention_mask=mask, past_key_values=self._past, use_cache=True
        )
        self._past = answer.past_key_values
        return int(answer.logits[0, -1].argmax())


class Torch:
    """transformers, logits of the last position only."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, local_files_only=True
        ).eval()
        self._cache: Any = None
        self._length = 0

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        self._cache, self._length = None, 0
        return self._run(self._torch.tensor(ids))

    def step(self, token: int) -> int:
        return self._run(self._torch.tensor([[token]]))

    def _run(self, ids: Any) -> int:
        places = self._torch.arange(self._length, self._length + ids.shape[1])[None]
        self._length += ids.shape[1]
        with self._torch.inference_mode():
            answer = self._model(
                input_ids=ids, position_ids=places, past_key_values=self._cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        self._cache = answer.past_key_values
        return int(answer.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import llama_cpp

        self._model: Any = llama_cpp.Llama(
            model, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        self._model.reset()
        return self._eval(ids[0].tolist())

    def step(self, token: int) -> int:
        return self._eval([token])

    def _eval(self, ids: list[int]) -> int:
        import llama_cpp

        self._model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self._model.n_vocab(),)).argmax())


LIBRARIES: dict[str, tuple[Callable[[str, int, int], Session], tuple[str, ...]]] = {
    "depthcut": (Depthcut, ("onnxruntime",)),
    "onnxruntime-genai": (Genai, ("onnxruntime-genai", "onnxruntime")),
    "optimum": (Optimum, ("optimum", "onnxruntime")),
    "torch": (Torch, ("torch", "transformers")),
    "llama.cpp": (LlamaCpp, ("llama-cpp-python",)),
}


class Served:
    """A session with the place where it stands."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prompt, self._steps, self._token = 0, 0, 0

    def prefill(self, tokens: int) -> float:
        """Milliseconds from the prompt to the first new token."""
        begin = time.perf_counter()
        self._token = self._session.prefill(_prompt(tokens))
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


def _prompt(tokens: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(3, 32000, (1, tokens))


def main(library: str, model: str, threads: str, context: str) -> None:
    """Says that it is ready, then answers."""
    make, distributions = LIBRARIES[library]
    served = Served(make(model, int(threads), int(context)))
    print(json.dumps({name: metadata.version(name) for name in distributions}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        print(json.dumps(getattr(served, command)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
