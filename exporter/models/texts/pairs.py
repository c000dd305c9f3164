"""What an encoder-decoder is asked and what is right: texts or recordings, and targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError, ModelSourceError, TextSourceError, UsageError, blaming
from exporter.files import sha256_bytes, sha256_file
from exporter.models.decoding_rules import (
    DecodingRules,
    greedy,
    rules_in,
    settings_of,
    target_positions,
)
from exporter.models.loading.model_class import hub_off, quiet_transformers
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import read_object
from exporter.models.texts.documents import scattered
from exporter.models.texts.images import OTHER_FILE, processor_settings
from exporter.models.texts.passages import paragraphs
from exporter.models.texts.samples import CalibrationText, Sources
from exporter.models.texts.sources import (
    JSON_LINES,
    PYDOC,
    RANDOM,
    Part,
    field_of,
    read_file,
    read_texts,
    records_in,
)
from exporter.optional import require
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import CONFIG_BYTES, check_file, opened

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LARGEST_BYTES = 1 << 28
"""What the file of a recording may take."""
PAIRS = 32
"""Sources where nobody says how many."""
LONGEST = 128
"""Tokens of a source or a target; longer ones lose their end."""
OWN_TOKENS = 48
"""The most tokens of a target that the model makes itself."""
_BATCH = 4
"""Sources that a model answers at once."""
_BLOCK = 1 << 16
_RATES = range(4_000, 400_000)
_TOKENIZERS = ("tokenizer*", "vocab.*", "*.spm", "spiece.model")
_RANDOM_TOKENS = 24
_SEEDS: Mapping[Part, int] = {"calibration": 0, "evaluation": 1}
_HINT = (
    f"Give a folder of recordings ({', '.join(SUFFIXES)}), JSON lines such as "
    '{"audio": "one.wav", "text": "what is said"} or {"source": "...", "target": "..."}, any text '
    "for a model that reads texts, or random for noise."
)

Samples = NDArray[np.float32]
Generate = Callable[[Mapping[str, NDArray[Any]]], NDArray[np.int64]]
"""From the encoder's inputs to the model's own targets, prompt included, ``[samples, tokens]``."""


def read_sound(path: Path, rate: int, longest_s: float) -> tuple[Samples, int]:
    """A recording's samples, ``[samples]`` from -1 to 1, at a rate; and the file's own rate."""
    soundfile = require("soundfile", extra="speech")
    hint = "Convert it, for example with: ffmpeg -i FILE -ar 16000 out.wav"
    with blaming(f"{path} is no recording that can be read", hint, TextSourceError):
        check_file(path, limit=LARGEST_BYTES)
        # The open file: libsndfile takes minutes to call Python for each of a million chunks.
        with opened(path) as held, soundfile.SoundFile(held.fileno(), closefd=False) as file:
            frames, file_rate = int(file.frames), int(file.samplerate)
            if file_rate not in _RATES or not 0 < frames <= longest_s * file_rate:
                raise TextSourceError(
                    f"{path} has {frames:,} samples, {file_rate:,} a second; the model hears "
                    f"{longest_s:g} s at once.",
                    "Leave it out, or cut it into shorter recordings: what is behind would be lost "
                    "without a word.",
                    code="sound-too-long",
                )
            # A compressed file may have hundreds of channels: only their mean is kept.
            parts = file.blocks(_BLOCK, always_2d=True)
            samples = np.concatenate([part.mean(axis=1) for part in parts])
        if not np.isfinite(samples).all():
            raise ValueError("it holds samples that are not finite")
    if file_rate != rate:
        from scipy.signal import resample_poly

        common = gcd(rate, file_rate)
        samples = resample_poly(samples, rate // common, file_rate // common)
    return samples.astype(np.float32), file_rate


@dataclass(frozen=True)
class Pair:
    """One source; ``target`` is None where it isn't known.

    ``source`` is a text, or the path of a recording.
    """

    source: str
    target: str | None = None


@dataclass(frozen=True)
class Pairs:
    """Sources with their targets, all or none of them."""

    source: str
    pairs: tuple[Pair, ...]
    sha256: str
    content_sha256: str = ""

    @property
    def is_random(self) -> bool:
        """Whether they are noise."""
        return not self.pairs

    @property
    def has_targets(self) -> bool:
        """Whether it is known what is right."""
        return bool(self.pairs) and self.pairs[0].target is not None


def read_pairs(spec: str, *, part: Part, sound: bool) -> Pairs:
    """Reads what a user named."""
    if spec == RANDOM:
        label = f"{RANDOM} ({part})"
        digest = sha256_bytes(label.encode())
        return Pairs(label, (), digest, digest)
    path = Path(spec)
    if sound:
        return _sounds(spec, path)
    lines = [*records_in(path)] if path.suffix.lower() in JSON_LINES else []
    if lines and "source" in lines[0][0]:
        pairs = [
            Pair(field_of(line, "source", at, _HINT), _target(line, "target", at))
            for line, at in lines
        ]
        return _whole(spec, pairs, [sha256_bytes(pair.source.encode()) for pair in pairs])
    texts = read_texts(spec, part=part)
    drawn = tuple(map(Pair, scattered(paragraphs(texts))))
    return Pairs(texts.source, drawn, texts.sha256, texts.sha256)


def _sounds(spec: str, path: Path) -> Pairs:
    folder, pairs = path, list[Pair]()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        pairs = [Pair(str(file), _beside(file)) for file in files]
    elif path.suffix.lower() in JSON_LINES:
        folder = path.parent  # from which the paths are taken
        for line, at in records_in(path):
            sound = folder / field_of(line, "audio", at, _HINT)
            if not sound.exists():  # nor does what has a zero byte in its name
                raise TextSourceError(f"{at}: {sound} does not exist.", _HINT, code="unreadable")
            pairs.append(Pair(str(sound), _target(line, "text", at)))
    sounds = [Path(pair.source) for pair in pairs]
    for sound in sounds:
        check_file(sound, folder, limit=LARGEST_BYTES)
    return _whole(spec, pairs, [*map(sha256_file, sounds)])


def _beside(sound: Path) -> str | None:
    text = sound.with_suffix(".txt")
    check_file(text, limit=CONFIG_BYTES)
    return read_file(text).strip() if text.is_file() else None


def _whole(spec: str, pairs: Sequence[Pair], digests: Sequence[str]) -> Pairs:
    if not pairs:
        raise TextSourceError(f"{spec} holds no pairs, or no recordings.", _HINT, code="no-text")
    lacking = [number for number, pair in enumerate(pairs, 1) if pair.target is None]
    if lacking and len(lacking) < len(pairs):
        raise TextSourceError(
            f"{spec}: pair {lacking[0]} has no target, and others have one.",
            "Give all of them a target, or none.",
            code="one-sided",
        )
    held = scattered([*zip(digests, pairs, strict=True)])
    alone = "\n".join(sorted({*digests})).encode()
    data = json.dumps([[digest, pair.target] for digest, pair in held]).encode()
    return Pairs(spec, tuple(pair for _, pair in held), sha256_bytes(alone), sha256_bytes(data))


def _target(line: Mapping[str, Any], name: str, at: str) -> str | None:
    return None if line.get(name) is None else field_of(line, name, at, _HINT)


_Size = Annotated[int, Field(gt=0, lt=1 << 20)]
_Window = Annotated[int, Field(gt=1, le=1 << 11)]
"""The largest Whisper reads 128 x 3,000 numbers of a recording; these bounds take 22 times more."""


class _Heard(BaseModel):
    """What a model of sound reads, by its config."""

    model_config = ConfigDict(strict=True)

    num_mel_bins: Annotated[int, Field(gt=0, le=1 << 9)]
    max_source_positions: Annotated[int, Field(gt=0, le=1 << 13)]


class _Features(BaseModel):
    """The settings of a feature extractor, with transformers' defaults."""

    model_config = ConfigDict(strict=True)

    feature_size: _Size
    sampling_rate: _Size = 16_000
    hop_length: _Window = 160
    chunk_length: _Size = 30
    n_fft: _Window = 400
    padding_value: float = 0.0
    dither: float = 0.0


@dataclass(frozen=True)
class PairReader:
    """Turns pairs into an encoder-decoder's inputs."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    rules: DecodingRules
    tokenizer: Any  # transformers' own; None for a model without one

    @classmethod
    def of(cls, loaded: LoadedModel) -> PairReader:
        """That of a loaded model."""
        model: Any = loaded.model
        config = model.config.to_dict()
        rules = DecodingRules.of(config, model.generation_config.to_dict())
        return cls(loaded.ref.source, loaded.path, config, rules, loaded.tokenizer)

    @classmethod
    def beside(cls, folder: Path) -> PairReader:
        """That of an exported model."""
        path, tokenizer = folder / "config.json", None
        if not (config := read_object(path)):
            hint = "Put the model's own there."
            raise ModelSourceError(f"{path} is empty, or not there.", hint, code="file-missing")
        if any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
            auto = require("transformers", extra="torch").AutoTokenizer
            with quiet_transformers(), hub_off():
                tokenizer = auto.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        return cls(str(folder), folder, config, rules_in(folder), tokenizer)

    @property
    def hears(self) -> bool:
        """Whether it reads recordings."""
        return "num_mel_bins" in self.config

    @property
    def longest_target(self) -> int:
        """Tokens of a target, prompt and end included; longer ones lose their end."""
        return min(LONGEST, target_positions(self.config) or LONGEST)

    def new_tokens(self, most: int = LONGEST) -> int:
        """The most tokens behind a prompt that a target may have."""
        return self.rules.room(min(most, self.longest_target - len(self.rules.prompt)))

    @property
    def answer_tokens(self) -> int:
        """The most tokens of an answer; of speech all that fit, for the words behind count."""
        positions = target_positions(self.config) if self.hears else None
        if positions is None:
            return self.new_tokens()
        return self.rules.room(positions - len(self.rules.prompt))

    def within(self, pairs: Pairs, tokens: int) -> int:
        """How many of the first pairs have targets of so many tokens together; at least one."""
        return within([len(row) for row in self.targets(pairs, len(pairs.pairs))], tokens)

    def sources(
        self, pairs: Pairs, number: int, *, part: Part, progress: Progress = QUIET
    ) -> Sources:
        """What the encoder reads of the first pairs."""
        if pairs.is_random:
            return self._noise(number, _SEEDS[part])
        chosen = pairs.pairs[:number]
        return self._features(chosen, progress) if self.hears else self._tokens(chosen)

    def targets(self, pairs: Pairs, number: int) -> list[list[int]]:
        """The decoder's tokens of the first pairs: its prompt, the target, and its end."""
        room = max(1, self.longest_target - len(self.rules.prompt) - 1)
        first, *begin = reversed(self.rules.prompt)
        numbers = []
        for pair in pairs.pairs[:number]:
            ids = self._target_ids(pair.target or "")[:room]
            row = [*reversed(begin), *(() if ids[:1] == [first] else (first,)), *ids]
            ends = self.rules.end_ids
            numbers.append(row if row[-1] in ends or not ends else [*row, min(ends)])
        return numbers

    def _target_ids(self, text: str) -> list[int]:
        """A target's own tokens, as far as its end; the prompt names the language, not they.

        What names a language stands before the text, or behind its end, by the tokenizer, and is
        the source's where nobody has set the target's.
        """
        tokenizer, ends = self._tokenizer(), self.rules.end_ids
        if self.hears:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        elif hasattr(tokenizer, "tgt_lang"):
            self._refuse_no_language(tokenizer)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(text_target=text)["input_ids"]
        last = next((place for place, item in enumerate(ids) if item in ends), len(ids))
        return [int(item) for item in ids[: last + 1]]

    def _refuse_no_language(self, tokenizer: Any) -> None:
        """Refuses targets whose language nothing tells."""
        named = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        others = {*self.rules.end_ids, *named, tokenizer.mask_token_id, tokenizer.eos_token_id}
        if self.rules.prompt[-1] not in {*tokenizer.all_special_ids} - others:
            raise CalibrationError(
                f"{self.name} knows many languages, and nothing says into which it translates.",
                "Set forced_bos_token_id in generation_config.json to the target language's token.",
                code="no-target-language",
            )

    def text(self, row: Sequence[int]) -> str:
        """A target in words."""
        words: str = self._tokenizer().decode(row, skip_special_tokens=True)
        return words.strip()

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise CalibrationError(
                f"{self.name} has no tokenizer, so no text can be turned into tokens.",
                "Give a model with its tokenizer, or random as the text.",
                code="no-tokenizer",
            )
        return self.tokenizer

    def _tokens(self, pairs: Sequence[Pair]) -> Sources:
        tokenizer = self._tokenizer()
        rows = [tokenizer(pair.source)["input_ids"] for pair in pairs]
        most = min(LONGEST, target_positions(self.config) or LONGEST)
        rows = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in rows]
        return _of_tokens(*padded(rows, self.rules.pad_id))

    def _features(self, pairs: Sequence[Pair], progress: Progress) -> Sources:
        extractor, rate = self.extractor, int(self.extractor.sampling_rate)
        longest = float(extractor.chunk_length)
        parts, lengths, rates = list[Samples](), list[int](), set[int]()
        for pair in pairs:  # one by one: a spectrum is much larger than what is made of it
            samples, file_rate = read_sound(Path(pair.source), rate, longest)
            made = extractor(samples, sampling_rate=rate, return_tensors="np")
            parts.append(np.asarray(made["input_features"], np.float32))
            lengths.append(len(samples))
            rates.add(file_rate)
        if others := sorted(rates - {rate}):
            text = ", ".join(f"{other:,} Hz" for other in others)
            progress.say(f"audio: resampled from {text} to {rate:,} Hz")
        features = np.concatenate(parts)
        ends = -np.array(lengths) // (2 * int(extractor.hop_length))
        mask = np.arange(features.shape[-1] // 2) < -ends[:, None]
        return Sources({"input_features": features}, mask)

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor of a speech model."""
        settings, where = processor_settings(self.folder, "feature_extractor")
        own, wanted = settings_of(_Features, settings, where), self._heard_shape
        makes = own.feature_size, own.chunk_length * own.sampling_rate // own.hop_length
        if makes != wanted:
            raise ModelSourceError(
                f"{where} makes {makes[0]} features of {makes[1]} frames; the model takes "
                f"{wanted[0]} of {wanted[1]}.",
                OTHER_FILE,
                code="odd-setting",
            )
        made: Any = require("transformers", extra="torch").WhisperFeatureExtractor
        return made(**own.model_dump())

    @property
    def _heard_shape(self) -> tuple[int, int]:
        """Features and frames of a recording, as the model's config says."""
        heard = settings_of(_Heard, self.config, f"{self.name}: config.json")
        return heard.num_mel_bins, 2 * heard.max_source_positions

    def _noise(self, number: int, seed: int) -> Sources:
        rng = np.random.default_rng(seed)
        if self.hears:
            shape = (number, *self._heard_shape)
            features = rng.standard_normal(shape, dtype=np.float32)
            mask = np.ones((number, shape[-1] // 2), np.bool_)
            return Sources({"input_features": features}, mask)
        ids = rng.integers(3, int(self.config["vocab_size"]), (number, _RANDOM_TOKENS))
        return _of_tokens(ids, np.ones(ids.shape, np.bool_))


def _of_tokens(ids: NDArray[np.int64], mask: NDArray[np.bool_]) -> Sources:
    return Sources({"input_ids": ids, "attention_mask": mask.astype(np.int64)}, mask)


def within(lengths: Sequence[int] | NDArray[np.int64], tokens: int) -> int:
    """How many of the first targets have so many tokens together; at least one."""
    return max(1, int(np.count_nonzero(np.cumsum(lengths) <= tokens)))


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], Any]:
    """Token ids and mask, ``[rows, longest]``."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids, np.arange(longest) < np.array([len(row) for row in rows])[:, None]


def paired_text(
    reader: PairReader,
    pairs: Pairs,
    generate: Generate,
    *,
    number: int | None = None,
    part: Part = "calibration",
    progress: Progress = QUIET,
) -> CalibrationText:
    """Samples of an encoder-decoder: what its encoder reads, and its decoder's tokens."""
    count = number or PAIRS
    sources = reader.sources(pairs, count, part=part, progress=progress)
    if pairs.has_targets:
        rows = reader.targets(pairs, count)
    else:
        progress.say(f"{pairs.source}: the targets are the whole model's own")
        parts = (sources[at : at + _BATCH] for at in range(0, len(sources.mask), _BATCH))
        rows = [_until_end(row, reader.rules) for part in parts for row in generate(part.arrays)]
    ids, mask = padded(rows, reader.rules.pad_id)
    ref = CalibrationRef(
        source=pairs.source,
        samples=len(ids),
        sequence_length=ids.shape[1],
        tokens=int(mask.sum()),
        sha256=pairs.sha256,
    )
    return CalibrationText(ref, ids, mask, sources=sources)


def _until_end(row: NDArray[np.int64], rules: DecodingRules) -> list[int]:
    """A generated row without the padding behind its end."""
    numbers = [int(token) for token in row]
    start = len(rules.prompt)
    ends = (n for n, token in enumerate(numbers) if n >= start and token in rules.end_ids)
    return numbers[: next(ends, len(numbers)) + 1]


def scored_pairs(
    loaded: LoadedModel,
    specs: Sequence[str],
    *,
    samples: int | None = None,
    progress: Progress = QUIET,
) -> CalibrationText:
    """The samples that a user asked for; targets that aren't known are the model's own."""
    reader = PairReader.of(loaded)
    if len(specs) > 1 or (reader.hears and not specs):
        raise UsageError(
            f"{loaded.ref.source} is scored on one set of pairs or recordings; {len(specs)} are "
            "named.",
            "Name one with --calibration; random takes noise, which chooses worse.",
            code="not-one-text",
        )
    usual = RANDOM if loaded.tokenizer is None else PYDOC
    pairs = read_pairs((*specs, usual)[0], part="calibration", sound=reader.hears)

    def generate(sources: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return _own_targets(loaded, reader, sources)

    return paired_text(reader, pairs, generate, number=samples, progress=progress)


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
