"""An ``LM`` of lm-eval on depthcut's runners: ``--model depthcut --model_args path=FOLDER``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from exporter.compare.tasks.likelihood import (
    ContinuationRequest,
    Likelihood,
    LikelihoodScorer,
    open_scorer,
)
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import decoder_on
from exporter.engines.decoding.text_model import TextModel
from exporter.errors import TaskError

NAME = "depthcut"


def register() -> None:
    """Makes the model known to lm-eval in this process, under its name."""
    import lm_eval.models  # noqa: F401  or lm-eval believes that its registry is filled

    if NAME not in model_registry:
        model_registry.register(NAME, target=PathLM)


class RunnerLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's questions, answered by an entered runner."""

    def __init__(
        self, scorer: LikelihoodScorer, text_model: TextModel, *, new_tokens: int = 256
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._text_model = text_model
        self.max_gen_toks = new_tokens
        self.batch_size = scorer.batch_size

    @property
    def eot_token_id(self) -> int | None:
        """The token that stands before a text that has nothing before it."""
        return self._text_model.prefix_id

    @property
    def max_length(self) -> int:
        """Positions that the model knows."""
        return self._scorer.longest

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self._text_model.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens, with those that the tokenizer adds by itself unless told not to."""
        return self._text_model.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        result = [
            ContinuationRequest(tuple(context), tuple(answer)) for _, context, answer in requests
        ]
        likelihoods = self._scorer.score(result)
        for (texts, *_ids), likelihood in zip(requests, likelihoods, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(likelihood))
        return [(item.log_likelihood, item.greedy) for item in likelihoods]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        flat = iter(self._scorer.score([*itertools.chain(*windows)]))
        values = [_total(itertools.islice(flat, len(window))) for window in windows]
        for text, value in zip(texts, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return values

    def _windows(self, text: str) -> list[ContinuationRequest]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [ContinuationRequest(*map(tuple, make_disjoint_window(pair))) for pair in pairs]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first text that ends them."""
        names = []
        with decoder_on(self._scorer.runner) as decoder:
            for context, how in (request.args for request in requests):
                text = self._continue(decoder, context, dict(how))
                self.cache_hook.add_partial("generate_until", (context, how), text)
                names.append(text)
        return names

    def _continue(self, decoder: Decoder, context: str, how: dict[str, Any]) -> str:
        draws = how.get("do_sample") and float(how.get("temperature", 1.0)) > 0
        if draws or int(how.get("num_beams", 1)) > 1:
            raise TaskError(
                "The task draws tokens (do_sample) or asks for several beams (num_beams); "
                "depthcut's model in lm-eval is greedy.",
                code="not-greedy",
            )
        until = how.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        room = int(how.get("max_gen_toks", self.max_gen_toks))
        ids = self.tok_encode(context)[-max(1, self.max_length - room) :]
        logits = decoder.prefill(np.array([ids], np.int64), context=len(ids) + room)
        new: list[int] = []
        text = ""
        while len(new) < room:
            token = int(logits[0].argmax())
            if token in self._text_model.stop_ids:
                break
            new.append(token)
            text = self._text_model.decode(new)
            if any(end in text for end in ends if end):
                break
            logits = decoder.step(np.array([[token]], np.int64))
        return _before(text, ends)


class PathLM(RunnerLM):
    """What ``--model depthcut`` makes of its arguments."""

    def __init__(
        self,
        path: str | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
        pretrained: str | None = None,
    ) -> None:
        if (path is None) == (pretrained is None):
            raise TaskError(
                "lm-eval's model depthcut takes one folder or file.",
                "Give it once: --model_args pretrained=FOLDER.",
                code="one-model",
            )
        rows = None if batch_size in (None, 1, "1", "auto") else int(str(batch_size))
        self._open = ExitStack()
        scorer, text_model = open_scorer(
            path or pretrained or "",
            self._open,
            provider=provider,
            threads=threads,
            batch_size=rows,
            longest=max_length,
        )
        super().__init__(scorer, text_model, new_tokens=max_gen_toks)

    def close(self) -> None:
        """Frees the model."""
        self._open.close()


def _total(likelihoods: Sequence[Likelihood] | itertools.islice[Likelihood]) -> float:
    return sum(likelihood.log_likelihood for likelihood in likelihoods)


def _before(text: str, ends: list[str]) -> str:
    for end in ends:
        if end:
            text = text.split(end)[0]
    return text
