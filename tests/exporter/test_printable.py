"""The one escape for what strangers wrote: a reader sees it, no terminal and no CI obeys it."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.printable import (
    Pieces,
    PrintableOutput,
    are,
    counted,
    json_text,
    one_line,
    printable,
    printable_json,
    printable_output,
    raw_output,
)

ACTIVE = [
    *map(chr, [*range(0x20), *range(0x7F, 0xA0)]),
    *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    "\ud800",
    "\udfff",
]
COMMANDS = ["::error::x", "  ::error::x", "\u00a0::x", "##[error]x", "a ##[x", "##vso[task.x]y"]
texts = st.text(st.sampled_from([*"a:#[]v \n\t\r\\", "\x1b", "\x9b", "\u202e", "\udc80"]))


def begins_a_command(line: str) -> bool:
    return line.lstrip().startswith("::") or any(
        opening in line for opening in ("##[", "##vso[", "##teamcity[")
    )


@pytest.mark.parametrize("letter", ACTIVE, ids=ascii)
def test_no_active_character_is_left(letter: str) -> None:
    assert letter not in one_line(f"a{letter}b")
    assert one_line(f"a{letter}b").isascii()
    if letter not in "\n\t":
        assert letter not in printable(f"a{letter}b")


@pytest.mark.parametrize(
    "text", ["", "layers.0/Add", "Größe: 3 × 4", "שלום", "👩\u200d🔬", "C:\\x\\n"]
)
def test_other_text_stays(text: str) -> None:
    assert one_line(text) == printable(text) == text
    assert json.loads(printable_json(json.dumps(text, ensure_ascii=False))) == text


def test_lines_of_our_own_stay_lines() -> None:
    assert printable("one\n\ttwo\n") == "one\n\ttwo\n"
    assert one_line("one\ntwo") == "one\\ntwo"


@pytest.mark.parametrize("text", COMMANDS)
def test_no_command_to_ci_is_left(text: str) -> None:
    assert begins_a_command(text)
    for line in printable(f"{text}\n{text}").splitlines():
        assert not begins_a_command(line)
    assert "error" not in text or "error" in printable(text)


@pytest.mark.parametrize("text", ["std::vector", "a::b", "1: 2", "## heading", "x[0]", "# [1]"])
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert printable(text) == text


@given(texts)
def test_whatever_the_text_nothing_is_obeyed_and_once_is_enough(text: str) -> None:
    result = printable(text)
    assert not any(begins_a_command(line) for line in result.split("\n"))
    assert not set(result) & (set(ACTIVE) - {"\n", "\t"})
    assert printable(result) == result
    assert one_line(one_line(text)) == one_line(text)


@given(st.lists(texts))
def test_pieces_add_up_to_the_whole(pieces: list[str]) -> None:
    stream = Pieces()
    assert "".join(map(stream.add, pieces)) == printable("".join(pieces))


@given(st.dictionaries(texts, texts))
def test_json_says_the_same_and_is_safe(data: dict[str, str]) -> None:
    safe = {key: value for key, value in data.items() if (key + value).isprintable()}
    for content, text in (
        (data, json.dumps(data, indent=2)),
        (safe, json.dumps(safe, ensure_ascii=False)),
    ):
        result = printable_json(text)
        assert json.loads(result) == content
        assert not any(begins_a_command(line) for line in result.split("\n"))


def test_json_escapes_what_json_leaves() -> None:
    content = {"name": "\x9b31m\u202e\x7f"}
    result = json_text(content)
    assert result.isascii()
    assert json.loads(result) == content


def test_what_libraries_print_passes_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with printable_output():
        print("\x1b[31mred\n::error::x")
        print(":", ":error::x", sep="", file=sys.stderr)
        sys.stderr.writelines(["\r 10%", "\r 20%", "\r::error::x"])
        assert sys.stderr.isatty() is before[1].isatty()
        raw_output(sys.stdout).write("\x1b[0m")
    assert (sys.stdout, sys.stderr) == before
    printed = capsys.readouterr()
    assert printed.out == "\\x1b[31mred\n:\\x3aerror::x\n\x1b[0m"
    assert printed.err == ":\\x3aerror::x\n\r 10%\r 20%\r:\\x3aerror::x"


def test_a_stream_that_nobody_wrapped_is_its_own_raw_one() -> None:
    stream = io.StringIO()
    assert raw_output(stream) is stream
    with contextlib.suppress(TypeError):
        PrintableOutput(stream).write(b"bytes")  # type: ignore[arg-type]
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 blocks"), (1, "1 block"), (2, "2 blocks"), (1.0, "1 block")]
)
def test_one_is_one(number: float, said: str) -> None:
    assert counted(number, "block") == said


def test_the_verb_goes_with_the_number() -> None:
    assert [are(number) for number in (0, 1, 2)] == ["are", "is", "are"]


def test_a_plural_of_its_own() -> None:
    assert counted(1, "branch", "branches") == "1 branch"
    assert counted(3, "branch", "branches") == "3 branches"
    assert counted(1_234_567, "token") == "1234567 tokens"
