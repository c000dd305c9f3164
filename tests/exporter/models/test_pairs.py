"""Pairs of sources and targets, recordings, and how targets are decoded."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import CalibrationError, ModelSourceError, TextSourceError
from exporter.models.decoding_rules import DecodingRules, greedy
from exporter.models.texts.pairs import (
    LARGEST_BYTES,
    Pair,
    PairReader,
    Pairs,
    _own_targets,
    read_pairs,
    read_sound,
)
from graph_passes.errors import UnsafeInputError
from tests.raising import raises
from tests.tiny_models import RATE, made_loaded, write_recordings, write_sound


def written(folder: Path, *lines: Any) -> str:
    file = folder / "pairs.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(file)


@pytest.mark.torch
def test_recordings_are_read_as_they_are(tmp_path: Path) -> None:
    from scipy.io import wavfile

    sound, file_rate = read_sound(write_sound(tmp_path / "a.wav", 0.5), RATE, 1)
    assert (sound.shape, sound.dtype) == ((RATE // 2,), np.float32)
    assert 0.3 < np.abs(sound).max() < 0.4
    assert file_rate == RATE
    two, _ = read_sound(write_sound(tmp_path / "b.wav", 0.5, channels=2), RATE, 1)
    assert np.allclose(sound, two, atol=1e-6)
    wavfile.write(tmp_path / "c.wav", RATE, np.full(100, 128, np.uint8))
    assert not read_sound(tmp_path / "c.wav", RATE, 1)[0].any()
    wavfile.write(tmp_path / "d.wav", RATE, np.full(100, np.nan, np.float32))
    with raises(TextSourceError, "unreadable"):
        read_sound(tmp_path / "d.wav", RATE, 1)
    sound, file_rate = read_sound(write_sound(tmp_path / "a.wav", 0.5, 44_100, pitch=440), RATE, 1)
    assert file_rate == 44_100
    assert len(sound) == RATE // 2
    spectrum = np.abs(np.fft.rfft(sound))
    assert abs(spectrum.argmax() * 2 - 440) <= 2


def header(channels: int = 1, align: int = 2, kind: int = 1) -> bytes:
    fields = struct.pack("<IHHIIHH", 16, kind, channels, RATE, 2 * RATE, align, 16)
    return b"RIFF\x2c\0\0\0WAVEfmt " + fields + b"data\x08\0\0\0" + bytes(8)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "unreadable"),
        (lambda path: write_sound(path, 0), "sound-too-long"),
        (lambda path: write_sound(path, 1.5), "sound-too-long"),
        (lambda path: write_sound(path, 0.5, 100), "sound-too-long"),
        (b"no sound at all", "unreadable"),
        (b"RIFF\x24", "unreadable"),
        (b"RIFF\x04\0\0\0WAVE", "unreadable"),
        (header()[:30], "unreadable"),
        (header(channels=0, align=0), "unreadable"),
        (header(channels=0, kind=3), "unreadable"),
        (b"RIFF\xff\xff\0\0" + header()[8:36] + b"fact\0\0\0\0" * 1_000 + header()[36:],
         "unreadable"),
    ],
)  # fmt: skip
def test_a_recording_that_can_not_be_taken_is_refused(tmp_path: Path, make: Any, code: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    with raises(TextSourceError, code, path):
        read_sound(path, RATE, 1)


@pytest.mark.torch
def test_compressed_recordings(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(300 * RATE, np.int16), RATE)
    tracemalloc.start()
    with raises(TextSourceError, "sound-too-long", path):
        read_sound(path, RATE, 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * RATE
    from scipy.io import wavfile

    plain = write_sound(tmp_path / "a.wav", 5, channels=2)
    soundfile.write(tmp_path / "a.flac", wavfile.read(plain)[1], RATE)
    one, other = (read_sound(tmp_path / name, RATE, 5)[0] for name in ("a.wav", "a.flac"))
    assert np.array_equal(one, other)


def test_a_folder_gives_its_recordings_and_the_texts_beside(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_sound(tmp_path / f"{name}.wav")
        (tmp_path / f"{name}.txt").write_text(f"{name} said\n")
    (tmp_path / "notes.md").write_text("no sound")
    pairs = read_pairs(str(tmp_path), part="calibration", sound=True)
    assert sorted(pair.target or "" for pair in pairs.pairs) == ["a said", "b said"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").unlink()
    assert not read_pairs(str(tmp_path), part="calibration", sound=True).has_targets
    (tmp_path / "a.txt").symlink_to(Path(__file__))  # elsewhere
    with raises(UnsafeInputError, "", "a.txt"):
        read_pairs(str(tmp_path), part="evaluation", sound=True)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "b.txt").write_text("some text")
    for spec in (str(tmp_path / "r" / "b.txt"), str(tmp_path / "r"), "pydoc"):
        with raises(TextSourceError, "no-text"):
            read_pairs(spec, part="evaluation", sound=True)


def test_the_same_sources_have_one_hash_in_whatever_form(tmp_path: Path) -> None:
    listed = write_recordings(tmp_path / "a", 0)
    pairs = read_pairs(str(listed), part="evaluation", sound=True)
    targets = {Path(pair.source).name: pair.target for pair in pairs.pairs}
    assert sorted(targets) == [f"{n}.wav" for n in range(4)]
    assert targets["1.wav"] == "w1 w8 w21"
    folder = read_pairs(str(listed.parent), part="calibration", sound=True)
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(reversed(lines)).replace("w0", "w1"))
    turned = read_pairs(str(listed), part="evaluation", sound=True)
    assert len({item.sha256 for item in (pairs, folder, turned)}) == 1
    # What is made of them depends on their words and their order, too.
    assert len({item.content_sha256 for item in (pairs, folder, turned)}) == 3
    listed.write_text("\n".join(lines[:-1]))
    assert read_pairs(str(listed), part="evaluation", sound=True).sha256 != pairs.sha256
    listed.write_text("\n".join(lines))
    write_sound(listed.parent / "0.wav", 0.7)
    assert read_pairs(str(listed), part="evaluation", sound=True).sha256 != pairs.sha256


def test_a_source_is_cut_where_its_encoder_ends() -> None:
    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*range(3, 3 + len(text)), 2]}

    pairs = Pairs("p", (Pair("x" * 9),), "")
    for most, length in ((6, 6), (64, 10)):
        config = {"max_position_embeddings": most}
        reader = PairReader("m", Path("m"), config, DecodingRules.of({}, WHISPER), Letters())
        (row,) = reader.sources(pairs, 1, part="evaluation").arrays["input_ids"]
        assert (len(row), row[-1]) == (length, 2)


def test_pairs_of_text_and_sources_alone(tmp_path: Path) -> None:
    both = written(tmp_path, {"source": "one two", "target": "eins zwei"})
    assert read_pairs(both, part="calibration", sound=False).pairs == (
        Pair("one two", "eins zwei"),
    )
    alone = written(tmp_path, {"source": "one"}, {"source": "two", "target": None})
    assert not read_pairs(alone, part="calibration", sound=False).has_targets
    text = tmp_path / "text.txt"
    text.write_text("a paragraph that is long enough to be one, at least\n\n" * 2)
    assert len(read_pairs(str(text), part="calibration", sound=False).pairs) == 1


@pytest.mark.parametrize("form", ["lines", "text", "recordings"])
def test_the_first_pairs_are_of_the_whole_list(tmp_path: Path, form: str) -> None:
    number = 64
    if form == "lines":
        spec = written(tmp_path, *({"source": f"{n}", "target": f"{n}"} for n in range(number)))
    elif form == "text":
        spec = str(tmp_path / "text.txt")
        Path(spec).write_text("\n\n".join(f"{n} {'a paragraph ' * 9}" for n in range(number)))
    else:
        spec = str(tmp_path)
        for n in range(number):
            (tmp_path / f"{n:02}.wav").write_bytes(b"%d" % n)
    drawn = read_pairs(spec, part="evaluation", sound=form == "recordings").pairs
    assert drawn == read_pairs(spec, part="evaluation", sound=form == "recordings").pairs
    places = [int(Path(pair.source.split(" ")[0]).stem) for pair in drawn]
    assert sorted(places) == [*range(number)]
    assert {place // 16 for place in places[:16]} == {0, 1, 2, 3}
    assert all(pair.target in (None, pair.source) for pair in drawn)


@pytest.mark.parametrize(
    ("lines", "sound", "code"),
    [
        ([{"source": "a", "target": "b"}, {"source": "c"}], False, "one-sided"),
        ([{"source": "a"}, {"target": "b"}], False, "bad-line"),
        ([{"source": "a", "target": ""}], False, "bad-line"),
        ([{"source": "a", "target": 3}], False, "bad-line"),
        ([{"source": "a"}, "[1]"], False, "bad-line"),
        ([{"source": "a"}, "{"], False, "bad-line"),
        ([{"source": "a", "target": "\ud800"}], False, "bad-line"),
        ([{"audio": "\ud800.wav"}], True, "bad-line"),
        ([{"audio": "a\0.wav"}], True, "unreadable"),
        ([{"text": "no audio"}], True, "bad-line"),
        ([{"audio": "gone.wav"}], True, "unreadable"),
        ([], True, "no-text"),
    ],
)
def test_pairs_that_can_not_be_taken_are_refused(
    tmp_path: Path, lines: list[Any], sound: bool, code: str
) -> None:
    with raises(TextSourceError, code, "pairs.jsonl"):
        read_pairs(written(tmp_path, *lines), part="calibration", sound=sound)


@pytest.mark.parametrize("place", ["outside", "absolute", "link", "large"])
def test_only_recordings_of_the_folder_are_read(tmp_path: Path, place: str) -> None:
    sound, folder = write_sound(tmp_path / "out.wav"), tmp_path / "r"
    folder.mkdir()
    (folder / "link.wav").symlink_to(sound)
    with (folder / "large.wav").open("wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    names = {"outside": "../out.wav", "absolute": str(sound)}
    spec = written(folder, {"audio": names.get(place, f"{place}.wav")})
    with raises(UnsafeInputError):
        read_pairs(spec, part="evaluation", sound=True)
    if place in ("link", "large"):
        (folder / ("link.wav" if place == "large" else "large.wav")).unlink()
        with raises(UnsafeInputError):
            read_pairs(str(folder), part="evaluation", sound=True)


BEGIN = {"decoder_start_token_id": 1, "eos_token_id": 2}
WHISPER = {
    "decoder_start_token_id": 50, "eos_token_id": 57, "pad_token_id": 57,
    "suppress_tokens": [3, 4], "begin_suppress_tokens": [5],
    "lang_to_id": {"<|en|>": 59, "<|de|>": 61}, "task_to_id": {"transcribe": 62},
    "no_timestamps_token_id": 63,
}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "prompt"),
    [
        ({"decoder_start_token_id": 0, "eos_token_id": 1}, (0,)),
        (WHISPER, (50, 59, 62, 63)),
        (WHISPER | {"language": "de"}, (50, 61, 62, 63)),
        (WHISPER | {"language": "<|de|>"}, (50, 61, 62, 63)),
        ({"decoder_start_token_id": 5, "forced_decoder_ids": [[2, 8], [1, 7]]}, (5, 7, 8)),
        ({"decoder_start_token_id": 5, "no_timestamps_token_id": 9}, (5, 9)),
        ({"decoder_start_token_id": 2, "forced_bos_token_id": 4, "eos_token_id": [2, 3]}, (2, 4)),
    ],
)
def test_a_target_begins_as_the_configs_say(told: dict[str, Any], prompt: tuple[int, ...]) -> None:
    assert DecodingRules.of({}, told).prompt == prompt
    assert DecodingRules.of(told, {"eos_token_id": None}).prompt == prompt


@pytest.mark.torch
def test_a_language_may_be_told_by_its_name() -> None:
    assert DecodingRules.of({}, WHISPER | {"language": "German"}).prompt == (50, 61, 62, 63)
    with raises(ModelSourceError, "odd-setting", "french", "<|de|>"):
        DecodingRules.of({}, WHISPER | {"language": "french"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lang_to_id", ["<|en|>"]),
        ("task_to_id", {"transcribe": "62"}),
        ("language", ["de", "en"]),
        ("suppress_tokens", [1.5]),
        ("suppress_tokens", [1] * 20_000),
        ("begin_suppress_tokens", 7),
        ("forced_decoder_ids", [[1]]),
        ("forced_decoder_ids", [["a", 3], [1, 2]]),
        ("eos_token_id", "57"),
        ("decoder_start_token_id", -1),
        ("pad_token_id", 10**30),
        ("bad_words_ids", [[1, 2]] * 20_000),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[-1]]),
        ("forced_eos_token_id", -1),
        ("forced_eos_token_id", "2"),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", "3"),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("min_length", 1.5),
        ("max_new_tokens", True),
    ],
)
def test_odd_entries_of_a_generation_config_are_refused(name: str, value: Any) -> None:
    with raises(ModelSourceError, "odd-setting", name):
        DecodingRules.of({}, WHISPER | {name: value})


@pytest.mark.parametrize(
    ("told", "code", "named"),
    [
        ({"eos_token_id": 1}, "odd-setting", "decoder_start_token_id"),
        (WHISPER | {"task": "translate"}, "odd-setting", "translate"),
        *[(BEGIN | {"forced_decoder_ids": ids}, "odd-setting", "")
          for ids in ([[1, None], [2, 7]], [[2, 7]], [[1, 5], [3, 7]])],
    ],
)  # fmt: skip
def test_a_prompt_that_nothing_tells_is_refused(
    told: dict[str, Any], code: str, named: str
) -> None:
    with raises(ModelSourceError, code, named):
        DecodingRules.of({}, told)


FEATURES = {"feature_size": 8, "sampling_rate": RATE, "hop_length": 160, "chunk_length": 1}


@pytest.mark.parametrize(
    ("told", "code", "named"),
    [
        ({"hop_length": 0}, "odd-setting", "hop_length"),
        ({"feature_size": "x"}, "odd-setting", "feature_size"),
        ({"chunk_length": None}, "odd-setting", "chunk_length"),
        ({"n_fft": 10**9}, "odd-setting", "n_fft"),
        ({"n_fft": 1}, "odd-setting", "n_fft"),
        ({"padding_value": [0]}, "odd-setting", "padding_value"),
        ({"chunk_length": 6250, "hop_length": 1_000_000}, "odd-setting", "hop_length"),
        ({"feature_size": 10**5}, "odd-setting", 10**5),
        ({"chunk_length": 2}, "odd-setting", 200),
    ],
)
def test_odd_settings_of_a_feature_extractor_are_refused(
    tmp_path: Path, told: dict[str, Any], code: str, named: object
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FEATURES | told))
    config = {"num_mel_bins": 8, "max_source_positions": 50}
    reader = PairReader("m", tmp_path, config, DecodingRules.of({}, WHISPER), None)
    with raises(ModelSourceError, code, named):
        assert reader.extractor


@pytest.mark.torch
def test_recordings_take_no_more_memory_than_the_longest_window_of_one(tmp_path: Path) -> None:
    widest = {"hop_length": 1 << 11, "n_fft": 1 << 11, "sampling_rate": 1 << 13, "chunk_length": 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FEATURES | widest))
    spec = str(write_recordings(tmp_path / "sounds", 0))
    config = {"num_mel_bins": 8, "max_source_positions": 128}
    reader = PairReader("m", tmp_path, config, DecodingRules.of({}, WHISPER), None)
    pairs, peaks = read_pairs(spec, part="evaluation", sound=True), []
    reader.sources(pairs, 1, part="evaluation")  # imports, and the extractor's filters
    for number in (1, 4):
        tracemalloc.start()
        assert len(reader.sources(pairs, number, part="evaluation").mask) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text_target: str, **asked: Any) -> dict[str, list[int]]:
        return {"input_ids": [7] * len(text_target.split())}


def reader_with(config: dict[str, Any]) -> PairReader:
    return PairReader("m", Path("m"), config, DecodingRules.of({}, WHISPER), Words())


@pytest.mark.parametrize("told", [1 << 19, 10**12, -1, "many", None])
def test_noise_is_no_larger_than_any_model_reads(told: Any) -> None:
    reader = reader_with({"num_mel_bins": 80, "max_source_positions": told})
    with raises(ModelSourceError, "odd-setting"):
        reader.sources(read_pairs("random", part="evaluation", sound=True), 1, part="evaluation")


def test_the_likeliest_token_that_may_come_is_taken_until_each_has_ended() -> None:
    rules = DecodingRules((1,), frozenset({2}), 0, never=(7, 99), never_first=(6,))
    fed = []

    def step(state: int, tokens: Any) -> tuple[Any, int]:
        fed.append(tokens.tolist())
        logits = np.zeros((2, 8), np.float32)
        logits[:, 7], logits[:, 6] = 9, 8  # 7 never comes, 6 not first
        logits[:, 3] = 1
        if state == 2:
            logits[0, 2] = 20
        if state == 3:
            logits[1, 2] = 20
        return logits, state + 1

    result = greedy(step, 0, rules, 2, 10)
    assert result.tolist() == [[1, 3, 6, 2, 0], [1, 3, 6, 6, 2]]
    assert fed[0] == [[1], [1]]
    assert fed[-1] == [[2], [6]]
    assert greedy(step, 0, rules, 2, 1).tolist() == [[1, 3], [1, 3]]


NEW = 36
END = 2
CASES: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "bad words": lambda row: {"bad_words_ids": [[row[3]], [row[6]]]},
    "bad rows": lambda row: {"bad_words_ids": [row[3:5], row[6:9], [row[2], 1]]},
    "no pair twice": lambda _: {"no_repeat_ngram_size": 2},
    "no token twice": lambda _: {"no_repeat_ngram_size": 1},
    "penalty": lambda _: {"repetition_penalty": 1.7},
    "a shortest length": lambda row: {"min_length": 9, "eos_token_id": [row[4], END]},
    "a fewest number": lambda row: {"min_new_tokens": 7, "eos_token_id": [row[4], END]},
    "a longest length": lambda _: {"max_length": 6},
    "a largest number": lambda _: {"max_new_tokens": 3},
    "a last token": lambda _: {"forced_eos_token_id": 9, "max_new_tokens": 4},
    "a last token in spite of a shortest length": lambda _: {
        "forced_eos_token_id": END, "max_length": 6, "min_length": 9,
    },
    "never": lambda row: {"suppress_tokens": row[2:4]},
    "not first": lambda row: {"begin_suppress_tokens": row[1:2]},
    "a first token": lambda row: {
        "forced_bos_token_id": 9, "min_new_tokens": 6, "max_new_tokens": 9,
        "eos_token_id": [row[4], END],
    },
    "several": lambda row: {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_length": 5,
        "bad_words_ids": [[row[2]]],
    },
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("name", CASES)
def test_what_a_generation_config_says_is_done_as_transformers_does_it(name: str) -> None:
    plain, same = answers({})
    assert plain == same
    assert len({*plain[0]}) > 4
    result = CASES[name](plain[0])
    ours, theirs = answers(result)
    assert ours == theirs
    ends = {"eos_token_id": result.get("eos_token_id", END)}
    assert ours != answers(ends)[0], "the setting changes nothing here, so nothing is shown"


def answers(told: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy answers to the same sources, ours and transformers'."""
    import torch
    from transformers import GenerationConfig

    loaded = made_loaded("bart")
    model: Any = loaded.model
    torch.manual_seed(5)
    torch.nn.init.normal_(model.model.decoder.embed_positions.weight, std=0.7)  # many tokens come
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 32), requires_grad=False)
    config = {"max_new_tokens": NEW, "decoder_start_token_id": 1, "eos_token_id": END}
    if "max_length" in told:
        del config["max_new_tokens"]
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, **config | told)
    ids = torch.randint(6, 64, (6, 7), generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reader = PairReader.of(loaded)
    ours = _own_targets(loaded, reader, {name: value.numpy() for name, value in given.items()})
    theirs = model.generate(**given, do_sample=False, num_beams=1)
    return ours.tolist(), theirs.tolist()


def test_what_configs_say_of_generation_is_taken_or_named() -> None:
    result = {"num_beams": 4, "do_sample": False, "encoder_no_repeat_ngram_size": 3}
    ignored = ("num_beams 4", "encoder_no_repeat_ngram_size 3")
    assert DecodingRules.of({}, BEGIN | result).ignored == ignored
    assert DecodingRules.of({}, BEGIN | {"num_beams": 1, "do_sample": None}).ignored == ()
    config = BEGIN | {"no_repeat_ngram_size": 3}  # a model's, where no other file speaks of it
    assert DecodingRules.of(config, {}).no_repeat == 3
    assert DecodingRules.of(config, {"eos_token_id": 2}).no_repeat == 0
    rules = DecodingRules.of({}, BEGIN | {"bad_words_ids": [[2], [5]]})
    assert rules.never_in_row == ((5,),), "a word that ends a target is not forbidden"


WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁w1", "▁w2"]


def translator(kind: str, told: dict[str, Any], **languages: str) -> Any:
    """A reader with a tokenizer of many languages, which knows two words."""
    import transformers

    words: Any = [(word, -1.0 * number) for number, word in enumerate(WORDS)]
    if kind == "NllbTokenizer":
        words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = getattr(transformers, kind)(vocab=words, **languages)
    config = {name: tokenizer.convert_tokens_to_ids(value) for name, value in told.items()}
    rules = DecodingRules.of({}, {"decoder_start_token_id": 2, "eos_token_id": 2} | config)
    return PairReader("m", Path("m"), {}, rules, tokenizer)


PAIRS = Pairs("pairs", (Pair("w1", "w2 w1"),), "")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "told", "begin"),
    [
        # Behind the end token, as facebook/mbart-large-50-one-to-many-mmt begins.
        ("MBart50Tokenizer", {"forced_bos_token_id": "ro_RO"}, ["</s>", "ro_RO"]),
        # The language itself, as facebook/mbart-large-en-ro begins.
        ("MBartTokenizer", {"decoder_start_token_id": "ro_RO"}, ["ro_RO"]),
        # As facebook/nllb-200, whose model is m2m_100.
        ("NllbTokenizer", {"forced_bos_token_id": "ron_Latn"}, ["</s>", "ron_Latn"]),
    ],
)
@pytest.mark.parametrize("set_in_tokenizer", [True, False])
def test_a_target_of_many_languages_begins_with_its_own(
    kind: str, told: dict[str, Any], begin: list[str], *, set_in_tokenizer: bool
) -> None:
    languages = {"tgt_lang": begin[-1]} if set_in_tokenizer else {}
    reader = translator(kind, told, **languages)
    (row,) = reader.targets(PAIRS, 1)
    text = reader.tokenizer("w2 w1", add_special_tokens=False)["input_ids"]
    assert len(text) >= 2
    assert row == [*reader.tokenizer.convert_tokens_to_ids(begin), *text, 2]


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["MBart50Tokenizer", "NllbTokenizer"])
def test_a_target_of_no_known_language_is_refused(kind: str) -> None:
    with raises(CalibrationError, "no-target-language", "forced_bos_token_id"):
        translator(kind, {}).targets(PAIRS, 1)
