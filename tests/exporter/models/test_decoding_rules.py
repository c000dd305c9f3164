"""Which tokens an encoder-decoder's generation config lets come, as transformers applies it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import CalibrationError, ModelSourceError
from exporter.models.decoding_rules import DecodingRules, greedy, target_positions
from exporter.models.texts.pairs import Pair, Pairs
from tests.raising import raises
from tests.tiny_models import made_loaded

NEW = 36
BEGIN = {"decoder_start_token_id": 1, "eos_token_id": 2}
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

    from exporter.models.encoder_decoder_text import _own_targets
    from exporter.models.texts.paired import PairReader

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


def test_what_greedy_answers_do_not_heed_is_named() -> None:
    result = {"num_beams": 4, "do_sample": False, "encoder_no_repeat_ngram_size": 3}
    assert DecodingRules.of({}, BEGIN | result).ignored == (
        "num_beams 4", "encoder_no_repeat_ngram_size 3",
    )  # fmt: skip
    assert DecodingRules.of({}, BEGIN | {"num_beams": 1, "do_sample": None}).ignored == ()


def test_a_model_s_config_speaks_of_generation_where_no_other_file_does() -> None:
    config = BEGIN | {"no_repeat_ngram_size": 3}
    assert DecodingRules.of(config, {}).no_repeat == 3
    assert DecodingRules.of(config, {"eos_token_id": 2}).no_repeat == 0


def test_a_word_that_ends_a_target_is_not_forbidden() -> None:
    rules = DecodingRules.of({}, BEGIN | {"bad_words_ids": [[2], [5]]})
    assert rules.never_in_row == ((5,),)


def test_tokens_beyond_the_vocabulary_are_no_matter() -> None:
    result = {"bad_words_ids": [[99]], "suppress_tokens": [99], "repetition_penalty": 2.0}
    rules = DecodingRules.of({}, BEGIN | result)

    def step(state: int, tokens: Any) -> tuple[Any, int]:
        return np.eye(6, dtype=np.float32)[[4]], state

    assert greedy(step, 0, rules, 1, 3).tolist() == [[1, 4, 4, 4]]


@pytest.mark.parametrize(
    ("told", "answer"),
    [
        ({"forced_eos_token_id": 2, "max_new_tokens": 3}, [1, 4, 4, 2]),
        ({"forced_eos_token_id": [5, 99], "max_length": 4}, [1, 4, 4, 5]),
        ({"forced_eos_token_id": 2, "max_new_tokens": 9}, [1, 4, 4, 4]),
        ({"forced_eos_token_id": 2}, [1, 4, 4, 4]),  # no length is named
        ({"max_new_tokens": 3}, [1, 4, 4, 4]),
    ],
)
def test_a_forced_end_comes_where_the_longest_target_ends(
    told: dict[str, Any], answer: list[int]
) -> None:
    def step(state: int, tokens: Any) -> tuple[Any, int]:
        return np.eye(6, dtype=np.float32)[[4]], state

    assert greedy(step, 0, DecodingRules.of({}, BEGIN | told), 1, 3).tolist() == [answer]


def test_relative_positions_have_no_end() -> None:
    t5 = {"n_positions": 512, "relative_attention_num_buckets": 32}
    assert target_positions(t5) is None
    assert target_positions({"n_positions": 512}) == 512
    assert target_positions({"max_target_positions": 448, "n_positions": 512}) == 448
    assert target_positions({}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forced_eos_token_id", -1),
        ("forced_eos_token_id", "2"),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[-1]]),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", "3"),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("min_length", 1.5),
        ("max_new_tokens", True),
    ],
)
def test_an_odd_setting_is_refused(name: str, value: Any) -> None:
    with raises(ModelSourceError, "odd-setting", name):
        DecodingRules.of({}, BEGIN | {name: value})


@pytest.mark.parametrize("pairs", [[[1, None], [2, 7]], [[2, 7]], [[1, 5], [3, 7]]])
def test_a_prompt_with_a_gap_is_refused(pairs: list[list[int | None]]) -> None:
    with raises(ModelSourceError, "open-prompt"):
        DecodingRules.of({}, BEGIN | {"forced_decoder_ids": pairs})


WORDS = ["<s>", "<pad>", "</s>", "<unk>", "▁w1", "▁w2"]


def translator(kind: str, told: dict[str, Any], **languages: str) -> Any:
    """A reader with a tokenizer of many languages, which knows two words."""
    import transformers

    from exporter.models.texts.paired import PairReader

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
