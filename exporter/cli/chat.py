"""`depthcut chat`: a talk with one model, or with several side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
from pydantic_core import to_json

from exporter.cli.asking import lines_of_user
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo_json
from exporter.engines.decoding.conversation import Conversation
from exporter.errors import BackendError
from exporter.option_types import Arm, Count, Provider
from exporter.options import Options, argument, dataclass, option
from exporter.printable import Pieces, printable_line

_NEW = "/new"


@dataclass(frozen=True, kw_only=True)
class ChatCall(Options):
    """What `depthcut chat` is asked to do."""

    models: tuple[Arm, ...] = argument("MODEL...")
    new_tokens: Count = option(256, "Maximum number of tokens an answer.", "-n", "--new-tokens")
    provider: Provider = option("cpu", "Where ONNX Runtime runs the graphs.")


@command(ChatCall)
def chat(call: ChatCall, progress: ConsoleProgress) -> None:
    """Talk to each MODEL, such as the whole one and its cut: all answer, with tokens a second.

    MODEL is what `generate` takes. Each has a conversation of its own; /new begins another, Ctrl-C
    stops an answer, Ctrl-D ends. A model without a chat template continues each line as it is.
    Without a terminal the lines of standard input are asked.
    """
    talks = {
        name: Conversation.open(model, provider=call.provider, log=progress)
        for name, model in zip(_names(call.models), call.models, strict=True)
    }
    for name, talk in talks.items():
        if talk.texts.chat is None:
            progress.say(f"{name} has no chat template: it continues each line as it is.")
    with ExitStack() as stack:
        for talk in talks.values():
            stack.enter_context(talk.decoder)
        for line in lines_of_user(progress):
            if line.strip() == _NEW:
                for talk in talks.values():
                    talk.turns.clear()
            elif line.strip():
                with suppress(KeyboardInterrupt):
                    _answer(talks, line, call.new_tokens, progress)


def _names(models: tuple[str, ...]) -> list[str]:
    """The last part of each path that differs, or all of it where two are the same."""
    for parts in zip(*(reversed(Path(model).parts) for model in models), strict=False):
        if len({*parts}) == len(models):
            return list(parts)
    return list(models)


def _answer(
    talks: dict[str, Conversation], line: str, new_tokens: int, progress: ConsoleProgress
) -> None:
    """Lets all answer, one after the other, so that none slows another."""
    answers = []
    for name, talk in talks.items():
        show = click.echo if not progress.as_json else _nothing
        show(f"{printable_line(name)}:")
        try:
            write = partial(_show_piece, show, Pieces())
            answer = talk.ask(line, new_tokens=new_tokens, write=write)
        except BackendError as error:
            progress.say(f"{name}: {error}")
            continue
        finally:
            show("")
        answers.append({"model": name, "text": talk.turns[-1], **asdict(answer)})
        speed = "" if answer.per_token_ms is None else f", {1e3 / answer.per_token_ms:.1f} a second"
        forgotten = f"; {talk.forgotten} turns forgotten" if talk.forgotten else ""
        progress.say(
            f"({len(answer.token_ids)} tokens{speed}; first after {answer.first_token_ms:.0f} ms"
            f"{forgotten})"
        )
    if progress.as_json:
        echo_json(to_json({"prompt": line, "answers": answers}).decode())


def _show_piece(show: Callable[..., object], pieces: Pieces, piece: str) -> None:
    show(pieces.add(piece), nl=False)


def _nothing(*_: object, **__: object) -> None:
    """What is shown of answers that are printed as JSON."""
