"""The text that an encoder-decoder is scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import UsageError
from exporter.models.decoding_rules import greedy
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.paired import OWN_TOKENS, PairReader, paired_text
from exporter.models.texts.pairs import RANDOM, read_pairs
from exporter.models.texts.sources import PYDOC
from exporter.progress import QUIET, Progress


def scored_pairs(
    loaded: LoadedModel,
    specs: Sequence[str],
    *,
    samples: int | None = None,
    progress: Progress = QUIET,
) -> CalibrationText:
    """The samples that a user asked for; targets that aren't known are the model's own."""
    reader = PairReader.of(loaded)
    _refuse_other_than_one(specs, loaded.ref.source, hears=reader.hears)
    usual = RANDOM if loaded.tokenizer is None else PYDOC
    pairs = read_pairs((*specs, usual)[0], part="calibration", sound=reader.hears)

    def generate(sources: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return _own_targets(loaded, reader, sources)

    return paired_text(reader, pairs, generate, number=samples, progress=progress)


def _refuse_other_than_one(specs: Sequence[str], model: str, *, hears: bool) -> None:
    if len(specs) > 1:
        raise UsageError(
            "An encoder-decoder is scored on one set of pairs.",
            "Name one with --calibration.",
            code="several-texts",
        )
    if not specs and hears:
        raise UsageError(
            f"{model} reads recordings, and none are named to score it on.",
            "Name a folder of recordings, or a JSON-lines file, with --calibration; random takes "
            "noise, which chooses worse.",
            code="no-recordings",
        )


def _own_targets(
    loaded: LoadedModel, reader: PairReader, sources: Mapping[str, NDArray[Any]]
) -> NDArray[np.int64]:
    """What the model answers, by the likeliest token each time, ``[samples, tokens]``."""
    import torch
    from transformers import EncoderDecoderCache

    from exporter.models.onnx_interface import cache_argument, new_cache

    model: Any = loaded.model
    given = {name: _tensor(array, model) for name, array in sources.items()}
    mask = {k: v for k, v in given.items() if k == "attention_mask"}
    with torch.inference_mode():
        states = model.get_encoder()(**given).last_hidden_state

        def step(cache: Any, tokens: NDArray[np.int64]) -> tuple[NDArray[Any], Any]:
            output = model(
                decoder_input_ids=torch.from_numpy(tokens).to(model.device),
                encoder_outputs=(states,),
                **mask,
                **{cache_argument(model): cache},
                use_cache=True,
            )
            return output.logits[:, -1].float().cpu().numpy(), cache

        cache = EncoderDecoderCache(new_cache(), new_cache())
        return greedy(step, cache, reader.rules, len(states), reader.new_tokens(OWN_TOKENS))


def _tensor(array: NDArray[Any], model: Any) -> Any:
    import torch

    tensor = torch.from_numpy(array).to(model.device)
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor
