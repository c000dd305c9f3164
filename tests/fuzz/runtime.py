"""ONNX Runtime in a process of its own: some broken graphs end the process that runs them."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

Arrays = Mapping[str, Any]
Outputs = list[dict[str, Any]]

_FATAL = 4
_PATIENCE_S = 20


class Crashed(Exception):
    """The runtime took the process with it, or never came back."""


class Runtime:
    """Runs models in a child process, and starts another one when it is gone."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._end: Any = None

    def run(self, model: bytes, feeds: Sequence[Arrays]) -> Outputs | str:
        """Every feed's outputs, or why the model doesn't run."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._end.send((model, feeds))
            if not self._end.poll(_PATIENCE_S):
                self.close()
                raise Crashed(f"no answer within {_PATIENCE_S} s")
            answer: Outputs | str = self._end.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise Crashed("the process is gone") from error
        return answer

    def close(self) -> None:
        """Ends the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        self.close()
        self._end, other = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()


def _serve(end: Connection) -> None:
    """Answers until the other side is gone."""
    while True:
        try:
            model, feeds = end.recv()
        except EOFError:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end.send(_run(model, feeds))


def _run(model: bytes, feeds: Sequence[Arrays]) -> Outputs | str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        known = {value.name for value in session.get_inputs()}
        results = []
        for feed in feeds:
            arrays = session.run(names, {k: v for k, v in feed.items() if k in known})
            results.append(dict(zip(names, arrays, strict=True)))
    except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
        return str(error)
    return results
