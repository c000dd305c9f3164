"""What strangers wrote stays text in Markdown: read by a parser, it is what it was."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from exporter.printable import one_line
from exporter.report.markdown import _target as target
from exporter.report.markdown import code, escaped, fenced

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "![x](http://evil/x.png)",
    "[x](http://evil)",
    "[x]: http://evil",
    "[x][y]",
    "a](http://evil)[b",
    "<img src=x onerror=y>",
    "<!-- hidden",
    "`code`",
    "``",
    "**bold** *it* __b__ _i_ ~~gone~~",
    "# heading",
    "> quote",
    ">quote",
    "- item",
    "1. item",
    "---",
    "===",
    "```sh",
    "~~~",
    "a | b",
    "\\",
    "\\[x](http://evil)",
    "&lt;b&gt; &#60;",
    "$\\href{http://evil}{x}$",
    "line\n\n# heading",
    "\x1b[31m\u202e",
]
texts = st.text(st.sampled_from([*"ab1 .)(!`*_[]<>|\\#-+=~&;:/@$%,{}'\"\n\t\x1b"]), min_size=1)


def plain(text: str) -> str:
    """How a text reads: on one line, control characters visible."""
    return one_line(" ".join(text.split()))


def read(tokens: list[Token] | None) -> Iterator[str]:
    """The text, and a mark for all that is more than text."""
    for token in tokens or []:
        if token.type == "inline":
            yield from read(token.children)
        elif token.type in ("text", "text_special"):
            yield token.content
        elif token.type == "html_inline" and token.content == "<!-- -->":
            yield ""
        elif token.type not in ("softbreak",):
            yield f"<{token.type}>"


def rendered(page: str) -> str:
    return "".join(read(PARSER.parse(page)))


CONTEXTS = {
    "{}": "<paragraph_open>{}<paragraph_close>",
    "- a {}": "<bullet_list_open><list_item_open><paragraph_open>a {}<paragraph_close>"
    "<list_item_close><bullet_list_close>",
    "a **{}** b": "<paragraph_open>a <strong_open>{}<strong_close> b<paragraph_close>",
    "[{}](<beside.md>)": "<paragraph_open><link_open>{}<link_close><paragraph_close>",
    "| h | i |\n|---|---|\n| {} | b |": "<table_open><thead_open><tr_open><th_open>h<th_close>"
    "<th_open>i<th_close><tr_close><thead_close><tbody_open><tr_open><td_open>{}<td_close>"
    "<td_open>b<td_close><tr_close><tbody_close><table_close>",
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_it_reads_as_it_was_written(text: str, context: str) -> None:
    page = context.replace("{}", escaped(text))
    assert rendered(page) == CONTEXTS[context].replace("{}", plain(text))


def test_unescaped_it_would_not() -> None:
    wrong = [t for t in HOSTILE if rendered(t) != CONTEXTS["{}"].replace("{}", plain(t))]
    assert len(wrong) > len(HOSTILE) / 2


@given(texts, st.sampled_from(list(CONTEXTS)))
def test_whatever_it_is_it_is_text(text: str, context: str) -> None:
    words = f"w{text}w" if context == "a **{}** b" else text  # bold begins and ends at words
    if plain(words) in ("", "-", "+"):
        return
    page = context.replace("{}", escaped(words))
    assert rendered(page) == CONTEXTS[context].replace("{}", plain(words))


@pytest.mark.parametrize(
    "text",
    ["https://evil.example", "see www.evil.example", "ftp://x", "a@evil.example", "@someone"],
)
def test_what_github_would_make_a_link_of_is_cut(text: str) -> None:
    result = escaped(text)
    assert re.search(r"://|www\.|@\w", result) is None
    assert html.unescape(result.replace("<!-- -->", "")) == text


@pytest.mark.parametrize(
    "text",
    [
        "1.130x [1.101, 1.153]",
        "[-3.2 %, +4.1 %]",
        "layers.0.self_attn/Add_1",
        "2 > 1, 3 - 2",
        "std::vector, 50 %",
        "-0.3",
        "-",
        "1.5 GB",
    ],
)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert escaped(text) == text


def test_our_own_code_and_stress_stay_in_notes() -> None:
    text = "the hash `ab_c*d` is *faster* than ` and a*b*"
    result = escaped(text, own_marks=True)
    assert result == "the hash `ab_c*d` is *faster* than \\` and a\\*b\\*"
    assert rendered(result).count("code_inline") == 1
    assert "`" not in escaped("`a`").replace("\\`", "")


@given(texts)
def test_notes_hold_no_links_or_html_either(text: str) -> None:
    result = rendered(f"a {escaped(text, own_marks=True)}")
    matches = set(re.findall(r"<(\w+)>", result)) - set(re.findall(r"<(\w+)>", text))
    assert matches <= {"paragraph_open", "paragraph_close", "code_inline", "em_open", "em_close"}


@given(texts)
def test_code_is_code(text: str) -> None:
    tokens = PARSER.parse(f"a {code(text)} b")
    kinds = [token.type for token in tokens[1].children or []]
    assert kinds == ["text", "code_inline", "text"]


@given(texts, st.sampled_from(["", "```", "`````"]))
def test_nothing_ends_a_block_of_code(text: str, more: str) -> None:
    tokens = PARSER.parse("\n".join(fenced(f"{text}\n{more}\n{text}", "sh")))
    assert [token.type for token in tokens] == ["fence"]


@given(texts)
def test_a_link_leads_where_we_say(text: str) -> None:
    tokens = PARSER.parse(f"[a]({target(text)})")
    kinds = [token.type for token in tokens[1].children or []]
    assert kinds == ["link_open", "text", "link_close"]
    assert target("cell 1/report.html") == "<cell 1/report.html>"
