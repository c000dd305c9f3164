"""The documents' commands run on a tiny model; a block of commands that doesn't says why not."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_documents import ROOT, WRITTEN

from exporter.cli import cli, run
from exporter.cli.command import SchemaCommand

PAGES = ROOT / "exporter" / "docs"
RUN = [ROOT / "README.md", *(PAGES / f"{name}.md" for name in ("exporting", "shipping", "reports"))]
"""Pages whose commands are run, one page after the other, in one folder, as the demo leaves it."""

LAYERS = 4
QUICK: dict[str, Any] = {
    "samples": 8, "sequence_length": 16, "batch_size": 8, "eval_tokens": 64,
    "eval_sequence_length": 16, "prefill": [8], "decode_past": [8], "rounds": 2, "threads": 1,
    "answer_tokens": 2, "agreement_prompts": 1, "agreement_tokens": 4, "new_tokens": 2,
}  # fmt: skip
SCORED = {"calibration": ["pydoc"]}
HEALED = SCORED | {
    "heal": "auto",
    "heal_tokens": 512,
    "step_tokens": 64,
    "heal_calibration": ["pydoc"],
}
"""Keys that make a command short without changing what is written in the document."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Every block of commands, and why it isn't run; empty where it is."""
    page = re.search(r"<!-- none is run: (.+?) -->", text, flags=re.DOTALL)
    pattern = r"(?:<!-- not run: ((?:(?!-->).)+) -->\n)?```sh\n(.*?)```"
    matches = re.findall(pattern, text, flags=re.DOTALL)
    return [(block, why or (page[1] if page else "")) for why, block in matches]


def calls(text: str) -> list[list[str]]:
    """The words of each call of depthcut that is to be run."""
    texts = []
    for block, why in blocks(text):
        for line in [] if why else block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert words[:1] in ([], ["depthcut"]), f"only depthcut can be run here: {line}"
            texts += [words[1:]] if words else []
    return texts


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [block for block, why in blocks(text) if not why and path not in RUN] == []
    assert calls(text) or path not in RUN


def test_a_block_without_a_reason_would_be_found() -> None:
    text = "<!-- not run: long -->\n```sh\nmake demo\n```\n```sh\ndepthcut a  # b\n```\n"
    assert blocks(text) == [("make demo\n", "long"), ("depthcut a  # b\n", "")]
    assert calls(text) == [["a"]]
    assert blocks(f"<!-- none is run: GPU -->\n{text}")[1] == ("depthcut a  # b\n", "GPU")
    with pytest.raises(AssertionError):
        calls("```sh\nmake demo\n```")


def answer(words: list[str], quick: Path) -> int:
    """Runs a command with those of the quick keys that it has and isn't told itself."""
    command = cli.get_command(None, words[0])
    known = command.leaves if isinstance(command, SchemaCommand) else {}
    keys = {} if words[0] == "plan" else QUICK
    if words[0] in ("export", "score"):
        keys = keys | (SCORED if words[0] == "score" or "--search" in words else HEALED)
    quick.write_text(yaml.safe_dump({key: keys[key] for key in keys if key in known}))
    return run([*words, "--config", str(quick)])


def as_demo(model: Path, folder: Path) -> None:
    """What `make demo` leaves, but portable, and what the pages ask a reader to write."""
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    (folder / "prompts.txt").write_text("the value of a list\nthe name of a class\n")
    (folder / "tasks").mkdir()
    item = re.search(r"```json\n(.*?)```", RUN[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert item is not None
    json.loads(item[1])
    (folder / "tasks" / "mine.jsonl").write_text(item[1] * 8)
    quick, cut = folder / "quick.yaml", ["--search", "one-shot", "--drop-attn", "2"]
    assert answer(["export", str(model), "-o", ".", *cut], quick) == 0
    for arm in ("baseline", "candidate"):
        target = f"fast/{arm}-quantized/model.onnx"
        assert answer(["quantize", arm, "-o", target, "--quantize", "int8"], quick) == 0


@pytest.mark.torch
@pytest.mark.usefixtures("exports_once")
@pytest.mark.parametrize(
    "pages", [RUN[:1], pytest.param(RUN, marks=pytest.mark.long)], ids=["README", "all"]
)
def test_the_commands_run_one_after_the_other(
    pages: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.text_graphs import write_llama_folder

    model, there = tmp_path / "tiny", tmp_path / "demo"
    write_llama_folder(model, layers=LAYERS)
    there.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("list of\n"))
    as_demo(model, there)
    for page in pages:
        for words in calls(page.read_text(encoding="utf-8")):
            named = [str(model) if word in ("MODEL", "$MODEL") else word for word in words]
            code = answer(named, there / "quick.yaml")
            # A random model need not be faster, or have anything worth cutting.
            answers = {"check": (0, 1, 3), "export": (0, 1)}.get(words[0], (0,))
            assert code in answers, (words, capsys.readouterr())
