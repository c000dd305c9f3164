"""`depthcut gguf`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.dropping import DropOptions
from exporter.cut.gguf_surgery import GgufOptions
from exporter.option_types import InputFile, OutputFile
from exporter.options import Options, argument, dataclass, part, required

if TYPE_CHECKING:
    from exporter.cut.gguf_surgery import GgufFacts


@dataclass(frozen=True, kw_only=True)
class GgufCall(Options):
    """What `depthcut gguf` is asked to do."""

    model: InputFile = argument("FILE")
    output: OutputFile = required("The cut GGUF file.", "-o", "--output")
    what: DropOptions = part()
    cut: GgufOptions = part(GgufOptions())


@command(GgufCall)
def gguf(call: GgufCall, progress: ConsoleProgress) -> None:
    """Cut sublayers out of FILE, a GGUF file or one of its shards. Needs no PyTorch.

    What stays is copied byte for byte. If only whole blocks go, the result is of FILE's own
    architecture; otherwise FILE must be a Llama, and the result is of llama.cpp's architecture
    deci. A cut that llama.cpp would compute wrongly is refused.
    """
    from exporter.cut.gguf_surgery import cut_gguf

    facts = cut_gguf(call.model, call.output, call.what.read(), call.cut, progress=progress)
    if progress.as_json:
        echo_json(facts.model_dump_json(indent=2))
        return
    echo(_told(facts), *(call.output.with_name(name) for name in facts.files))


def _told(facts: GgufFacts) -> str:
    before, after = facts.bytes_before / 1e6, facts.bytes_after / 1e6
    return (
        f"{len(facts.kept)} of {facts.layers} layers, architecture {facts.architecture[1]}: "
        f"{facts.tensors_kept} tensors kept, {facts.tensors_removed} removed, "
        f"{facts.tensors_added} added; {before:.1f} -> {after:.1f} MB"
    )
