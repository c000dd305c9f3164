"""Pairs of sources and targets, recordings, and how targets are decoded."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ModelSourceError, TextSourceError
from exporter.models.decoding_rules import DecodingRules, greedy
from exporter.models.texts.paired import PairReader, paired_text
from exporter.models.texts.pairs import LARGEST_BYTES, Pair, Pairs, read_pairs, read_sound
from graph_passes.errors import UnsafeInputError
from tests.raising import raises
from tests.tiny_models import RATE, write_recordings, write_sound


def written(folder: Path, *lines: Any) -> str:
    file = folder / "pairs.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(file)


def test_a_recording_is_read_as_it_is_whatever_its_channels_and_bits(tmp_path: Path) -> None:
    from scipy.io import wavfile

    sound = read_sound(write_sound(tmp_path / "a.wav", 0.5), RATE, 1)
    assert (sound.samples.shape, sound.samples.dtype) == ((RATE // 2,), np.float32)
    assert 0.3 < np.abs(sound.samples).max() < 0.4
    assert sound.file_rate == RATE
    two = read_sound(write_sound(tmp_path / "b.wav", 0.5, channels=2), RATE, 1)
    assert np.allclose(sound.samples, two.samples, atol=1e-6)
    wavfile.write(tmp_path / "c.wav", RATE, np.full(100, 128, np.uint8))
    assert not read_sound(tmp_path / "c.wav", RATE, 1).samples.any()
    wavfile.write(tmp_path / "d.wav", RATE, np.full(100, np.nan, np.float32))
    with raises(TextSourceError, "not-finite"):
        read_sound(tmp_path / "d.wav", RATE, 1)


def test_another_rate_keeps_pitch_and_length(tmp_path: Path) -> None:
    sound = read_sound(write_sound(tmp_path / "a.wav", 0.5, 44_100, pitch=440), RATE, 1)
    assert sound.file_rate == 44_100
    assert len(sound.samples) == RATE // 2
    spectrum = np.abs(np.fft.rfft(sound.samples))
    assert abs(spectrum.argmax() * 2 - 440) <= 2


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "file-missing"),
        (lambda path: path.write_bytes(b"no sound at all"), "no-recording"),
        (lambda path: write_sound(path, 0), "no-sound"),
        (lambda path: write_sound(path, 1.5), "sound-too-long"),
        (lambda path: write_sound(path, 0.5, 100), "odd-rate"),
    ],
)
def test_a_recording_that_can_not_be_taken_is_refused(tmp_path: Path, make: Any, code: str) -> None:
    path = tmp_path / "a.wav"
    make(path)
    with raises(TextSourceError, code, path):
        read_sound(path, RATE, 1)


def header(channels: int = 1, align: int = 2, bits: int = 16, kind: int = 1) -> bytes:
    fields = struct.pack("<IHHIIHH", 16, kind, channels, RATE, 2 * RATE, align, bits)
    return b"RIFF\x2c\0\0\0WAVEfmt " + fields + b"data\x08\0\0\0" + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"RIFF\x24",
        b"RIFF\x04\0\0\0WAVE",
        header()[:30],
        header(channels=0, align=0),
        header(channels=0, kind=3),
        header(align=1, bits=32, kind=3),
        b"RIFF\xff\xff\0\0" + header()[8:36] + b"fact\0\0\0\0" * 1_000 + header()[36:],
    ],
)
def test_a_broken_header_is_no_recording(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with raises(TextSourceError, "no-recording", path):
        read_sound(path, RATE, 1)


@pytest.mark.torch
def test_what_is_too_long_is_not_decoded(tmp_path: Path) -> None:
    """A compressed hour takes little room on disk and much in memory."""
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(300 * RATE, np.int16), RATE)
    tracemalloc.start()
    with raises(TextSourceError, "sound-too-long", path):
        read_sound(path, RATE, 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * RATE


@pytest.mark.torch
def test_a_compressed_recording_is_read_as_a_plain_one(tmp_path: Path) -> None:
    from scipy.io import wavfile

    soundfile = pytest.importorskip("soundfile")
    plain = write_sound(tmp_path / "a.wav", 5, channels=2)
    soundfile.write(tmp_path / "a.flac", wavfile.read(plain)[1], RATE)
    one, other = (read_sound(tmp_path / name, RATE, 5) for name in ("a.wav", "a.flac"))
    assert np.array_equal(one.samples, other.samples)


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
        with raises(TextSourceError, "no-recordings"):
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


def test_noise_is_another_for_each_part() -> None:
    parts = [read_pairs("random", part=part, sound=True) for part in ("calibration", "evaluation")]
    assert all(pairs.is_random and not pairs.has_targets for pairs in parts)
    assert parts[0].sha256 != parts[1].sha256


@pytest.mark.parametrize(
    ("lines", "sound", "code"),
    [
        ([{"source": "a", "target": "b"}, {"source": "c"}], False, "one-sided"),
        ([{"source": "a"}, {"target": "b"}], False, "field-missing"),
        ([{"source": "a", "target": ""}], False, "field-missing"),
        ([{"source": "a", "target": 3}], False, "field-missing"),
        ([{"source": "a"}, "[1]"], False, "not-an-object"),
        ([{"source": "a"}, "{"], False, "not-json"),
        ([{"source": "a", "target": "\ud800"}], False, "not-json"),
        ([{"audio": "\ud800.wav"}], True, "not-json"),
        ([{"audio": "a\0.wav"}], True, "file-missing"),
        ([{"text": "no audio"}], True, "field-missing"),
        ([{"audio": "gone.wav"}], True, "file-missing"),
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


@pytest.mark.parametrize(
    ("told", "code", "named"),
    [
        ({"eos_token_id": 1}, "no-start-token", "decoder_start_token_id"),
        (WHISPER | {"task": "translate"}, "unknown-task", "translate"),
    ],
)
def test_a_prompt_that_nothing_tells_is_refused(
    told: dict[str, Any], code: str, named: str
) -> None:
    with raises(ModelSourceError, code, named):
        DecodingRules.of({}, told)


@pytest.mark.torch
def test_a_language_may_be_told_by_its_name() -> None:
    assert DecodingRules.of({}, WHISPER | {"language": "German"}).prompt == (50, 61, 62, 63)
    with raises(ModelSourceError, "unknown-language", "french", "<|de|>"):
        DecodingRules.of({}, WHISPER | {"language": "french"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lang_to_id", ["<|en|>"]),
        ("task_to_id", {"transcribe": "62"}),
        ("language", ["de", "en"]),
        ("suppress_tokens", [1.5]),
        ("begin_suppress_tokens", 7),
        ("forced_decoder_ids", [[1]]),
        ("forced_decoder_ids", [["a", 3], [1, 2]]),
        ("eos_token_id", "57"),
        ("decoder_start_token_id", -1),
        ("pad_token_id", 10**30),
        ("bad_words_ids", [[1, 2]] * 20_000),
        ("suppress_tokens", [1] * 20_000),
    ],
)
def test_odd_entries_of_a_generation_config_are_refused(name: str, value: Any) -> None:
    with raises(ModelSourceError, "odd-setting", name):
        DecodingRules.of({}, WHISPER | {name: value})


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
        ({"chunk_length": 6250, "hop_length": 1_000_000}, "odd-setting", "n_fft"),
        ({"feature_size": 10**5}, "other-features", 10**5),
        ({"chunk_length": 2}, "other-features", 200),
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


def test_a_model_s_own_targets_are_made_of_few_sources_at_once() -> None:
    reader, given = reader_with({"num_mel_bins": 2, "max_source_positions": 3}), []

    def generate(sources: Any) -> Any:
        given.append(len(sources["input_features"]))
        return np.full((given[-1], 4 + len(given)), 7)

    noise = read_pairs("random", part="evaluation", sound=True)
    text = paired_text(reader, noise, generate, number=10)
    assert given == [4, 4, 2]
    assert text.mask.sum(axis=1).tolist() == [5] * 4 + [6] * 4 + [7] * 2


def test_no_more_pairs_are_judged_on_than_have_so_many_tokens() -> None:
    reader = reader_with({"max_position_embeddings": 40})
    pairs = Pairs("p", tuple(Pair("a", "one two three") for _ in range(9)), "0" * 64)
    count = len(reader.targets(pairs, 1)[0])
    assert [reader.within(pairs, most) for most in (1, 3 * count - 1, 3 * count, 100 * count)] == [
        1, 2, 3, 9,
    ]  # fmt: skip


def test_answers_of_speech_end_where_the_decoder_does() -> None:
    prompt = len(DecodingRules.of({}, WHISPER).prompt)
    sizes = {"max_target_positions": 448}
    speech = reader_with({"num_mel_bins": 2, **sizes})
    assert (speech.new_tokens(), speech.answer_tokens) == (128 - prompt, 448 - prompt)
    assert reader_with(sizes).answer_tokens == 128 - prompt


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
