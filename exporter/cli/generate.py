"""`depthcut generate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.options import AUTO, EXISTING_PATH, Threads, json_option, verbosity_options
from exporter.cli.sections import Count
from exporter.printable import Pieces

if TYPE_CHECKING:
    from exporter.engines.runners.base import Runner


@click.command(short_help="Continue a text with a model or an engine.")
@click.argument("model", type=EXISTING_PATH)
@click.argument("prompt")
@click.option(
    "-n", "--new-tokens", type=Count(), default=64, show_default=True,
    help="The most tokens to generate.",
)  # fmt: skip
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=int, help="Draw among that many tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--seed", type=Count(0), default=0, show_default=True, help="For the draws.")
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where ONNX Runtime runs the model.",
)  # fmt: skip
@click.option(
    "--threads",
    type=Threads(),
    help="CPU threads; auto: the fastest, by a probe. [all cores]",
)
@click.option(
    "--context", type=click.IntRange(min=1),
    help="Positions that the cache has room for. [prompt and new tokens]",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(["onnxruntime", "engine"]),
    help="What of a folder is to run, where it holds both. [onnxruntime]",
)  # fmt: skip
@click.option(
    "--tokenizer", type=EXISTING_PATH, help="tokenizer.json or its folder. [beside the model]"
)
@json_option
@verbosity_options
@click.pass_obj
def generate(
    progress: ConsoleProgress,
    /,
    model: Path,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    provider: str,
    threads: int | str | None,
    context: int | None,
    backend: str | None,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with a model and the tokenizer beside it.

    MODEL is an ONNX file, an engine, or a folder with one of them or with an engine for prefill and
    one for decode; of several builds (-b1, -b2) the first runs.

    What a terminal or a CI system would act on in the text is shown and not obeyed; --json has the
    text as it is.
    """
    from exporter.compare.threads import choose_threads
    from exporter.engines.decoding.generate import generate as run
    from exporter.engines.decoding.generate import refuse_too_long
    from exporter.engines.decoding.open_decoder import open_decoder
    from exporter.engines.decoding.sampling import SamplingSettings
    from exporter.engines.decoding.text_model import TextModel
    from exporter.engines.widening import tell_widened

    def fastest(runner: Runner, longest: int | None) -> None:
        choose_threads(runner, longest=longest, progress=progress)

    sampling = SamplingSettings(temperature, top_k, top_p, seed)
    texts = TextModel.of(model, tokenizer)
    prompt_ids = texts.encode(prompt)
    decoder = open_decoder(
        model,
        backend=backend,
        provider=provider,
        threads=threads if isinstance(threads, int) else None,
        choose_threads=fastest if threads == AUTO else None,
        context=context,
    )
    refuse_too_long(decoder, len(prompt_ids), new_tokens, texts.positions)
    pieces = Pieces()
    stream = texts.stream(
        lambda piece: None if as_json else click.echo(pieces.add(piece), nl=False)
    )
    with decoder:
        tell_widened([decoder.capabilities], progress)
        done = run(
            decoder,
            prompt_ids,
            new_tokens=new_tokens,
            stop_ids=texts.stop_ids,
            sampling=sampling,
            on_token=stream.add,
        )
    if as_json:
        text = texts.decode(done.token_ids)
        echo_json(json.dumps({"text": text, **asdict(done)}, indent=2))
        return
    stream.finish(done.token_ids)
    echo()
    later = "" if done.per_token_ms is None else f", then {done.per_token_ms:.1f} ms a token"
    progress.say(f"{len(done.token_ids)} tokens; first after {done.first_token_ms:.0f} ms{later}")
