"""Calibration text: packed from a file, or sampled by the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import CalibrationError, ScoringError
from exporter.files import sha256_bytes
from exporter.models.texts.calibration import usable_length
from exporter.score import calibration_text
from tests.raising import raises, tells
from tests.reading import Heard
from tests.tiny_models import tiny_loaded, tiny_tokenizer


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{n % 60}" for n in range(100)))
    return path


@pytest.mark.torch
def test_a_file_is_packed(words: Path) -> None:
    loaded = tiny_loaded("llama", tiny_tokenizer())
    text = calibration_text(loaded, str(words), samples=3, sequence_length=20)
    assert text.input_ids.tolist() == (np.arange(60).reshape(3, 20) + 4).tolist()
    assert text.mask.all()
    assert text.ref.source == str(words)
    assert text.ref.tokens == 60
    assert text.ref.sha256 == sha256_bytes(words.read_bytes())


@pytest.mark.torch
def test_samples_begin_and_end_as_the_tokenizer_would(words: Path) -> None:
    loaded = tiny_loaded("bert", tiny_tokenizer(special_ends=True))
    text = calibration_text(loaded, str(words), samples=3, sequence_length=20)
    assert text.input_ids[:, 0].tolist() == [1, 1, 1]
    assert text.input_ids[:, -1].tolist() == [2, 2, 2]
    assert text.input_ids[:, 1:-1].ravel().tolist() == (np.arange(54) + 4).tolist()


@pytest.mark.torch
def test_fewer_samples_than_asked_for_are_told(words: Path) -> None:
    heard = Heard()
    loaded = tiny_loaded("llama", tiny_tokenizer())
    text = calibration_text(loaded, str(words), samples=9, sequence_length=20, progress=heard)
    assert text.ref.samples == 5
    name = text.ref.source
    assert any(name in line and tells(line, 5) and tells(line, 9) for line in heard.lines)
    warning = f"{name}: warning: only 100 tokens; results will be imprecise"
    assert warning in heard.lines
    judging = Heard()
    calibration_text(
        loaded, str(words), samples=5, sequence_length=20, part="evaluation", progress=judging
    )
    assert not any("warning" in line for line in judging.lines), "its intervals tell"


@pytest.mark.torch
def test_a_text_needs_a_tokenizer(words: Path) -> None:
    with raises(CalibrationError, "no-tokenizer", "llama"):
        calibration_text(tiny_loaded("llama"), str(words))


@pytest.mark.torch
def test_a_vision_model_takes_no_text() -> None:
    with raises(CalibrationError, "takes-no-text", "vit"):
        calibration_text(tiny_loaded("vit"))


@pytest.mark.torch
def test_samples_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    heard = Heard()
    text = calibration_text(tiny_loaded("llama"), samples=1, cache_dir=tmp_path, progress=heard)
    assert text.ref.sequence_length == 64
    assert any(tells(line, 64) for line in heard.lines)


@pytest.mark.torch
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
    import torch

    model = tiny_loaded(model_type, pad_token_id=padding).model
    assert usable_length(model) == usable
    if usable is not None:
        with torch.no_grad():
            model(torch.full((1, usable), 7))
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, usable + 1), 7))


@pytest.mark.torch
@pytest.mark.parametrize("length", [1, 2])
def test_samples_without_room_for_text(words: Path, length: int) -> None:
    loaded = tiny_loaded("bert", tiny_tokenizer(special_ends=True))
    with raises(CalibrationError, "length-out-of-range", length, 2, 3):
        calibration_text(loaded, str(words), sequence_length=length)
    text = calibration_text(loaded, str(words), samples=2, sequence_length=3)
    assert [(first, last) for first, _, last in text.input_ids.tolist()] == [(1, 2)] * 2


@pytest.mark.torch
def test_encoders_get_pydoc_and_decoders_their_own_text(tmp_path: Path) -> None:
    encoder = tiny_loaded("bert", tiny_tokenizer())
    text = calibration_text(encoder, samples=2, sequence_length=16, cache_dir=tmp_path)
    assert text.ref.source.startswith("pydoc (calibration half")
    decoder = tiny_loaded("llama")
    text = calibration_text(decoder, samples=2, sequence_length=16, cache_dir=tmp_path)
    assert text.ref.source == "self (text sampled by the model, seed 0)"
    with raises(CalibrationError, "no-next-token", "BertModel"):
        calibration_text(encoder, "self", cache_dir=tmp_path)


@pytest.mark.torch
def test_sampled_text_is_seeded(tmp_path: Path) -> None:
    def sample(seed: int, folder: str) -> Any:
        return calibration_text(
            tiny_loaded("llama"), samples=4, sequence_length=24, seed=seed,
            cache_dir=tmp_path / folder,
        )  # fmt: skip

    first, again, other = sample(1, "a"), sample(1, "b"), sample(2, "a")
    assert first.input_ids.tolist() == again.input_ids.tolist()
    assert first.ref == again.ref
    assert first.ref.sha256 != other.ref.sha256
    assert first.input_ids.shape == (4, 24)
    assert len({tuple(row) for row in first.input_ids.tolist()}) == 4


@pytest.mark.torch
def test_sampled_text_begins_anew_after_its_end(tmp_path: Path) -> None:
    text = calibration_text(
        tiny_loaded("llama"), samples=16, sequence_length=64, cache_dir=tmp_path
    )
    ids = text.input_ids
    assert (ids[:, 0] == 1).all()
    ended = ids[:, :-1] == 2
    assert ended.sum() > 3
    assert (ids[:, 1:][ended] == 1).all()


@pytest.mark.torch
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


@pytest.mark.torch
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    heard = Heard()
    blocked = tmp_path / "file"
    blocked.write_text("")
    text = calibration_text(
        tiny_loaded("llama"), samples=2, sequence_length=16, cache_dir=blocked / "sub",
        progress=heard,
    )  # fmt: skip
    assert text.ref.samples == 2
    assert any(str(blocked) in line for line in heard.lines)


@pytest.mark.torch
def test_tokens_are_drawn_by_their_probability() -> None:
    import torch

    from exporter.models.texts.self_text import _draw

    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    generator = torch.Generator().manual_seed(0)
    drawn = _draw(probabilities.log().expand(20_000, 4), generator)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert shares[1] == 0
    assert (shares - probabilities).abs().max() <= 0.015


@pytest.mark.torch
def test_sampling_from_broken_logits_is_refused(tmp_path: Path) -> None:
    import torch

    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight[3] = float("nan")
    with raises(ScoringError, "not-finite"):
        calibration_text(loaded, samples=2, sequence_length=16, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gpt_neox", "gemma2", "opt"])
def test_sampling_uses_the_cache_rightly(model_type: str, tmp_path: Path) -> None:
    """Each token must be likely under the model run without a cache: the draws are the same."""
    import torch

    from exporter.models.texts.self_text import _draw

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
