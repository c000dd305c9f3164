"""Calibration text: packed from a file, or sampled by the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import CalibrationError, ScoringError
from exporter.files import sha256_bytes
from exporter.models.model_folder import longest_sequence
from exporter.models.texts.calibration import calibration_text
from exporter.models.texts.self_text import _draw
from tests.raising import raises, tells
from tests.reading import Heard
from tests.tiny_models import tiny_loaded, tiny_tokenizer, write_words

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return Path(write_words(tmp_path / "words.txt", 100))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_file_is_packed(words: Path, family: str) -> None:
    """Samples begin and end as the tokenizer would."""
    ends = family == "bert"
    loaded = tiny_loaded(family, tiny_tokenizer(special_ends=ends))
    text = calibration_text(loaded, str(words), samples=3, sequence_length=20)
    inner = text.input_ids[:, 1:-1] if ends else text.input_ids
    assert inner.ravel().tolist() == (np.arange(inner.size) + 4).tolist()
    if ends:
        assert text.input_ids[:, [0, -1]].tolist() == [[1, 2]] * 3
    assert text.mask.all()
    assert (text.ref.source, text.ref.tokens) == (str(words), 60)
    assert text.ref.sha256 == sha256_bytes(words.read_bytes())


@pytest.mark.parametrize(
    ("family", "source", "length", "error", "code", "fields"),
    [
        ("llama", "words", 20, CalibrationError, "no-tokenizer", ["llama"]),
        ("vit", None, None, CalibrationError, "takes-no-text", ["vit"]),
        ("bert", "self", None, CalibrationError, "no-next-token", ["BertModel"]),
        *(("bert", "words", n, CalibrationError, "length-out-of-range", [n, 2, 3]) for n in (1, 2)),
        ("bert", "words", 3, None, "", []),
        ("narrow", "words", 20, CalibrationError, "token-out-of-range", [40, 1]),
        ("broken", None, 16, ScoringError, "not-finite", []),
    ],
)
def test_what_gives_no_samples_is_refused(
    words: Path, tmp_path: Path, family: str, source: Any, length: Any, error: Any, code: str,
    fields: list[object],
) -> None:  # fmt: skip
    more = {"vocab_size": 40} if family == "narrow" else {}
    tokenizer = tiny_tokenizer(special_ends=not more) if family in ("bert", "narrow") else None
    model = family if family in ("bert", "vit") else "llama"
    loaded, cache = tiny_loaded(model, tokenizer, **more), tmp_path / "cache"
    if family == "broken":
        loaded.model.lm_head.weight[3] = float("nan")
    given: Any = {"samples": 2, "cache_dir": cache} | (
        {"sequence_length": length} if length else {}
    )
    source = str(words) if source == "words" else source
    if error is None:
        text = calibration_text(loaded, source, **given)
        assert [(first, last) for first, _, last in text.input_ids.tolist()] == [(1, 2)] * 2
        return
    with raises(error, code, *fields):
        calibration_text(loaded, source, **given)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_encoders_get_pydoc_and_decoders_their_own_text(tmp_path: Path) -> None:
    encoder, heard = tiny_loaded("bert", tiny_tokenizer()), Heard()
    text = calibration_text(encoder, samples=2, sequence_length=16, cache_dir=tmp_path)
    assert text.ref.source.startswith("pydoc (calibration half")
    blocked = tmp_path / "file"
    blocked.write_text("")
    given: Any = {"samples": 1, "cache_dir": blocked / "sub", "progress": heard}
    text = calibration_text(tiny_loaded("llama"), **given)
    assert text.ref.source == "self (text sampled by the model, seed 0)"
    # It is cut to what the model takes, and a cache that can't be written is told.
    assert (text.ref.samples, text.ref.sequence_length) == (1, 64)
    assert any(tells(line, 64) for line in heard.lines)
    assert any(str(blocked) in line for line in heard.lines)


def test_sampled_text_is_seeded_and_begins_anew_after_its_end(tmp_path: Path) -> None:
    def sample(seed: int, folder: str, length: int = 24, samples: int = 4) -> Any:
        options = {"samples": samples, "sequence_length": length, "seed": seed}
        return calibration_text(tiny_loaded("llama"), cache_dir=tmp_path / folder, **options)

    first, again, other = sample(1, "a"), sample(1, "b"), sample(2, "a")
    assert first.input_ids.tolist() == again.input_ids.tolist()
    assert first.ref == again.ref
    assert first.ref.sha256 != other.ref.sha256
    assert first.input_ids.shape == (4, 24)
    assert len({tuple(row) for row in first.input_ids.tolist()}) == 4
    ids = sample(0, "a", 64, 16).input_ids
    assert (ids[:, 0] == 1).all()
    ended = ids[:, :-1] == 2
    assert ended.sum() > 3
    assert (ids[:, 1:][ended] == 1).all()


@pytest.mark.parametrize(
    ("model_type", "padding", "usable"),
    [
        ("bert", 1, 64),
        ("roberta", 1, 62),
        ("roberta", 0, 63),
        ("camembert", 1, 62),
        ("xlm-roberta", 1, 62),
        ("mpnet", 1, 62),
        ("opt", 1, 64),
        ("bloom", 3, None),
    ],
)
def test_the_most_tokens_that_a_model_takes(
    model_type: str, padding: int, usable: int | None
) -> None:
    model = tiny_loaded(model_type, pad_token_id=padding).model
    assert longest_sequence(model.config.to_dict()) == usable
    if usable is not None:
        with torch.no_grad():
            model(torch.full((1, usable), 7))
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, usable + 1), 7))


def test_sampled_text_is_kept_and_damaged_text_is_not_used(tmp_path: Path) -> None:
    def sample() -> tuple[Any, list[str]]:
        heard = Heard()
        text = calibration_text(
            tiny_loaded("llama"), samples=2, sequence_length=16, cache_dir=tmp_path, progress=heard
        )
        return text.input_ids.tolist(), [line for line in heard.lines if "reused" in line]

    fresh, reused = sample()
    assert reused == []
    (path,) = tmp_path.iterdir()
    kept, reused = sample()
    assert kept == fresh
    assert len(reused) == 1
    content = json.loads(path.read_text())
    for damaged in ("", "{", json.dumps({**content, "key": {}}), json.dumps({"key": 1})):
        path.write_text(damaged)
        assert sample() == (fresh, [])
    path.write_text(json.dumps({**content, "input_ids": [[5] * 16] * 2}))
    assert sample()[0] == [[5] * 16] * 2  # What is kept is what is used.


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_sampling_uses_the_cache_rightly(model_type: str, tmp_path: Path) -> None:
    """Each token must be likely under the model run without a cache: the draws are the same."""
    loaded = tiny_loaded(model_type)
    text = calibration_text(loaded, samples=3, sequence_length=12, seed=5, cache_dir=tmp_path)
    ids = torch.from_numpy(text.input_ids)
    generator = torch.Generator().manual_seed(5)
    for position in range(1, 12):
        with torch.no_grad():
            logits = loaded.model(ids[:, :position]).logits[:, -1]
        drawn = _draw(logits, generator)
        ended = ids[:, position - 1] == 2
        assert ids[:, position].tolist() == torch.where(ended, 1, drawn).tolist()


def test_tokens_are_drawn_by_their_probability() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    generator = torch.Generator().manual_seed(0)
    drawn = _draw(probabilities.log().expand(20_000, 4), generator)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert shares[1] == 0
    assert (shares - probabilities).abs().max() <= 0.015
