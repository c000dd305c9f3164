"""`depthcut generate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import EXISTING_PATH, json_option, verbosity_options


@click.command()
@click.argument("model", type=EXISTING_PATH)
@click.argument("prompt")
@click.option(
    "-n", "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True,
    help="The most tokens to generate.",
)  # fmt: skip
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=int, help="Draw among that many tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For the draws."
)
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where ONNX Runtime runs the model.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [all cores]")
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
    threads: int | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with a model: a folder with model.onnx and its tokenizer."""
    from exporter.errors import BackendError
    from exporter.generation.generate import TextModel
    from exporter.generation.generate import generate as run
    from exporter.generation.onnxruntime_decoder import OnnxRuntimeDecoder
    from exporter.generation.sampling import Sampling
    from exporter.measure.environment import default_threads
    from exporter.measure.model_folder import find_model

    if model.suffix == ".engine":
        raise BackendError(
            f"{model} is an engine; text comes from ONNX files alone so far.",
            "Name the ONNX file that it was built from.",
        )
    folder = find_model(model)
    texts = TextModel.of(folder)
    sampling = Sampling(temperature, top_k, top_p, seed)
    decoder = OnnxRuntimeDecoder(
        folder.onnx, provider=provider, threads=threads or default_threads()
    )
    with decoder:
        done = run(
            decoder,
            texts.encode(prompt),
            new_tokens=new_tokens,
            stop_ids=texts.stop_ids,
            sampling=sampling,
        )
    text = texts.decode(done.token_ids)
    if as_json:
        click.echo(json.dumps({"text": text, **asdict(done)}, indent=2))
        return
    click.echo(text)
    later = "" if done.per_token_ms is None else f", then {done.per_token_ms:.1f} ms a token"
    progress.say(f"{len(done.token_ids)} tokens; first after {done.first_token_ms:.0f} ms{later}")
