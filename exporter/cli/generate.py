"""`depthcut generate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import click

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.compare.options import DeviceOption
from exporter.engines.decoding.text_model import TextModel
from exporter.option_types import Arm, Count, InputPath, Provider, Threads
from exporter.options import Options, argument, dataclass, option, part
from exporter.printable import Pieces

if TYPE_CHECKING:
    from exporter.engines.decoding.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class GenerateCall(Options):
    """What `depthcut generate` is asked to do."""

    model: Arm = argument("MODEL")
    prompt: str = argument("PROMPT")
    new_tokens: Count = option(64, "Maximum number of tokens to generate.", "-n", "--new-tokens")
    chat: bool = option(False, "Ask PROMPT as a user of a chat: in the tokenizer's chat template.")
    provider: Provider = option("cpu", "Where ONNX Runtime runs the graphs.")
    threads: Threads = option(
        None, "CPU threads; auto: the physical cores that the process may use.", usual="auto"
    )
    cache_length: Count | None = option(
        None, "Length of the cache, in tokens.", usual="prompt and new tokens"
    )
    runner: Literal["onnxruntime", "engine"] | None = option(
        None, "What to run, if the folder has both an ONNX file and engines.", usual="onnxruntime"
    )
    gpu: DeviceOption = part(DeviceOption())
    tokenizer: InputPath | None = option(
        None, "tokenizer.json or its folder.", usual="beside the model"
    )


@command(GenerateCall)
def generate(call: GenerateCall, progress: ConsoleProgress) -> None:
    """Continue PROMPT, greedily, with a model and the tokenizer next to it.

    MODEL is an ONNX file, an engine, or a folder with one of them or with an engine for prefill and
    one for decode; of several builds (-b1, -b2) the first runs. Or openvino:DIR, or a GGUF file in
    llama.cpp: llama.cpp:FILE.

    Control sequences for a terminal or a CI system are escaped in the printed text; --json has the
    text as it is.
    """
    from exporter.engines.decoding.generate import generate as run
    from exporter.engines.decoding.generate import refuse_too_long
    from exporter.engines.runners.base import tell_notes
    from exporter.engines.runners.registry import RUNNERS, named_backend

    call.gpu.use()
    backend, model = named_backend(call.model)
    if backend is not None:
        model = RUNNERS[backend].folder(model).onnx
    texts = TextModel.of(model, call.tokenizer)
    if call.chat:
        (prompt_ids,) = texts.encode_chats([call.prompt])
    else:
        prompt_ids = texts.encode(call.prompt)
    decoder = _decoder(call)
    refuse_too_long(decoder, len(prompt_ids), call.new_tokens, texts.positions)
    pieces = Pieces()
    silent = progress.as_json
    stream = texts.stream(lambda piece: None if silent else click.echo(pieces.add(piece), nl=False))
    with decoder:
        tell_notes([decoder.capabilities], progress)
        done = run(
            decoder,
            prompt_ids,
            new_tokens=call.new_tokens,
            stop_ids=texts.stop_ids,
            on_token=stream.add,
        )
    if silent:
        text = texts.decode(done.token_ids)
        echo_json(json.dumps({"text": text, **asdict(done)}, indent=2))
        return
    stream.finish(done.token_ids)
    echo()
    later = "" if done.per_token_ms is None else f", then {done.per_token_ms:.1f} ms a token"
    progress.say(f"{len(done.token_ids)} tokens; first after {done.first_token_ms:.0f} ms{later}")


def _decoder(call: GenerateCall) -> Decoder:
    from exporter.engines.decoding.open_decoder import open_decoder

    return open_decoder(
        call.model,
        backend=call.runner,
        provider=call.provider,
        threads=call.threads,
        context=call.cache_length,
    )
