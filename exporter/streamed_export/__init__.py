"""Export of models whose weights stay in their shards: traced without them, written one by one."""

from exporter.streamed_export.forward import filled_on_the_way
from exporter.streamed_export.lent import lend_weights
from exporter.streamed_export.pretended import interface_without_weights, pretended
from exporter.streamed_export.transposes import fold_transposes

__all__ = [
    "filled_on_the_way",
    "fold_transposes",
    "interface_without_weights",
    "lend_weights",
    "pretended",
]
