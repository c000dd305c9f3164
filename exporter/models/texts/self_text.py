"""Text that a model samples itself: calibration without network or file, in its own domain.

Plain ancestral sampling (temperature 1, nothing cut off) from the token that begins a text; after
an end of text a new one begins, so that every sample is full. With ``chat`` each sample begins as
the model's chat template begins what a user says: the model goes on with a question and its answer
(Magpie, arXiv 2406.08464). Kept on disk, since it takes a while.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import BackendError, CalibrationError, ScoringError
from exporter.files import write_text
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.chat_template import ChatTemplate
from exporter.models.texts.tokenizer import tokenizer_of
from exporter.progress import Progress, Task
from graph_passes.files.reading import TABLE_BYTES, read_json

if TYPE_CHECKING:
    import torch

SELF = "self"
CHAT = "chat"
SAMPLED = (SELF, CHAT)
"""What names text that the model samples."""
CHAT_TOKENS = 256
"""Of a chat; a longer sample has several: the time for a token rises with what stands before it."""
_METHOD = 2  # Raised when the same seed would give other text.
_CACHE_BYTES = 2 << 30  # The most that the KV cache of one run of sequences may take.
_SUMS_BYTES = 8 << 20  # Of probabilities that are summed at once: fresh memory takes longer.


def sampled_tokens(
    loaded: LoadedModel,
    samples: int,
    length: int,
    seed: int,
    cache_dir: Path,
    progress: Progress,
    *,
    spec: str = SELF,
) -> NDArray[np.int64]:
    """Token ids ``[samples, length]`` that the model sampled, from disk where they are there."""
    if not loaded.model.can_generate():
        raise CalibrationError(
            f"{loaded.ref.architecture} does not generate text.",
            "Use --calibration pydoc.",
            code="no-next-token",
        )
    key = {
        "method": _METHOD,
        "model_sha256": loaded.ref.sha256,
        "dtype": str(loaded.model.dtype),
        "seed": seed,
        "samples": samples,
        "length": length,
    }
    prefix = chat_prefix(loaded) if spec == CHAT else []
    if spec == CHAT:
        key["prefix"] = prefix
    name = f"{spec}-{loaded.ref.sha256[:16]}-{key['dtype']}-s{seed}-{samples}x{length}.json"
    path = cache_dir / name
    kept = _read(path, key)
    if kept is not None:
        progress.say("calibration: reused the text that this model sampled before")
        return kept
    pieces = length // CHAT_TOKENS if prefix and length % CHAT_TOKENS == 0 else 1
    if 2 * len(prefix) > length // pieces:
        raise CalibrationError(
            f"The chat template of {loaded.ref.source} begins with {len(prefix)} tokens, which "
            f"leaves no room for a chat in samples of {length // pieces}.",
            f"Calibrate on {SELF} or on a text file, or give a longer --sequence-length.",
            code="no-chat-template",
        )
    ids = _sample(loaded.model, samples * pieces, length // pieces, seed, prefix, progress)
    ids = ids.reshape(samples, length)
    _keep(path, key, ids, progress)
    return ids


def _read(path: Path, key: dict[str, Any]) -> NDArray[np.int64] | None:
    """The kept ids; None when there are none, or not of this key, or not whole."""
    try:
        content = read_json(path, limit=TABLE_BYTES)
        if content["key"] != key:
            return None
        ids = np.asarray(content["input_ids"], dtype=np.int64)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return ids if ids.shape == (key["samples"], key["length"]) else None


def _keep(path: Path, key: dict[str, Any], ids: NDArray[np.int64], progress: Progress) -> None:
    try:
        write_text(path, json.dumps({"key": key, "input_ids": ids.tolist()}) + "\n")
    except OSError as error:
        progress.say(f"calibration: the sampled text is not kept for next time: {error}")


def chat_prefix(loaded: LoadedModel) -> list[int]:
    """The tokens that stand before what a user says first."""
    tokenizer: Any = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"The tokenizer of {loaded.ref.source} has no chat template to sample a chat with.",
            f"Calibrate on {SELF} or on a text file.",
            code="no-chat-template",
        )
    said, several = "\N{WHITE SQUARE}", tokenizer.chat_template
    text = several.get("default", "") if isinstance(several, dict) else several
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = ChatTemplate(text, Path(loaded.ref.source), tokens)
    try:
        (written,) = template.prompts([said], add_generation_prompt=False)
    except BackendError as error:
        hint = f"Calibrate on {SELF} or on a text file."
        raise CalibrationError(error.message, hint, code=error.code) from error
    before, result, _ = written.partition(said)
    return tokenizer_of(loaded).plain(before) if result else []


def _sample(
    model: Any, samples: int, length: int, seed: int, prefix: list[int], progress: Progress
) -> NDArray[np.int64]:
    import torch

    generator = torch.Generator(device=model.device).manual_seed(seed)
    rounds = _even_runs(samples, max(1, _CACHE_BYTES // (length * _cache_bytes_per_token(model))))
    with (
        torch.inference_mode(),
        progress.task("sample text", len(rounds) * (length - 1), "tokens a text") as task,
    ):
        runs = [_sample_run(model, count, length, generator, prefix, task) for count in rounds]
    ids: NDArray[np.int64] = torch.cat(runs).cpu().numpy()
    return ids


def _even_runs(samples: int, at_once: int) -> list[int]:
    """How many sequences each run takes: a run of few takes nearly as long as one of many."""
    runs = -(-samples // at_once)
    return [samples * (run + 1) // runs - samples * run // runs for run in range(runs)]


def _sample_run(
    model: Any,
    count: int,
    length: int,
    generator: torch.Generator,
    prefix: list[int],
    task: Task,
) -> torch.Tensor:
    """Samples ``count`` sequences side by side, a token at a time; ``[count, length]``.

    Behind a prefix a text goes on after its end: a turn of a chat ends so, too.
    """
    import torch
    from transformers import DynamicCache

    from exporter.models.onnx_interface import cache_argument

    begin, ends = _special_ids(model)
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    ids = torch.full((count, length), begin, device=model.device)
    forced = prefix[:length] or [begin]
    ids[:, : len(forced)] = torch.tensor(forced, device=model.device)
    if prefix:
        ends = ends[:0]
    for position in range(1, length):
        last = ids[:, position - 1 : position]
        logits = model(input_ids=last, use_cache=True, **cache).logits[:, -1]
        if position >= len(forced):
            drawn = _draw(logits, generator)
            ended = torch.isin(last[:, 0], ends)
            ids[:, position] = torch.where(ended, begin, drawn)
        task.advance()
    return ids


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row, by the inverse of the cumulative distribution."""
    import torch

    number, vocabulary = logits.shape
    points = torch.rand((number, 1), dtype=torch.float64, device=logits.device, generator=generator)
    rows, drawn = max(1, _SUMS_BYTES // (8 * vocabulary)), []
    for start in range(0, number, rows):
        point, part = points[start : start + rows], logits[start : start + rows]
        cumulative = torch.softmax(part.float(), dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise ScoringError(
                "The model's logits are not finite, so it can't sample text.",
                "Load the model in float32, or check its weights.",
                code="not-finite",
            )
        drawn.append(torch.searchsorted(cumulative, point * total, right=True)[:, 0])
    return torch.cat(drawn).clamp_(max=vocabulary - 1)


def _special_ids(model: Any) -> tuple[int, torch.Tensor]:
    """The token that begins a text and those that end one."""
    import torch

    places = [model.generation_config, model.config.get_text_config()]
    begins = [getattr(place, "bos_token_id", None) for place in places]
    ends = [end for end in (getattr(p, "eos_token_id", None) for p in places) if end is not None]
    eos = ends[0] if ends else []
    eos = eos if isinstance(eos, list) else [eos]
    numbers = [begin for begin in (*begins, *eos) if isinstance(begin, int)]
    if not numbers:
        raise CalibrationError(
            "The model's config names no token that begins a text, so it can't sample one.",
            "Give --calibration a text file, or pydoc.",
        )
    return numbers[0], torch.tensor(eos, dtype=torch.int64, device=model.device)


def _cache_bytes_per_token(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(size, int):
        heads, size = 1, config.hidden_size  # an upper bound: as many heads as queries have
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)
