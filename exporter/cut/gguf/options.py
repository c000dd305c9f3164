"""How a GGUF file may be cut."""

from __future__ import annotations

from exporter.cut.gguf.maps import MapType
from exporter.option_types import Size
from exporter.options import Options, dataclass, option


@dataclass(frozen=True)
class GgufOptions(Options):
    """How a GGUF file is cut.

    Attributes:
        map_type: In which type the linear maps are written that take attentions' places.
        shard_bytes: The most bytes of tensors in a file; None: one file.
    """

    map_type: MapType = option(
        "Q8_0", "Type of the linear maps that take the places of attentions."
    )
    shard_bytes: Size | None = option(
        None,
        "Write shards with at most this many bytes of tensors each: NAME-00001-of-00003.gguf.",
        "--shard-size",
        usual="one file",
    )
