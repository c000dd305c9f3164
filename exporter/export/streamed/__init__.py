"""Export of models whose weights stay in their shards: traced without them, written one by one."""

from exporter.export.streamed.forward import filled_on_the_way
from exporter.export.streamed.lent import lend_weights
from exporter.export.streamed.pretended import interface_without_weights, pretended
from exporter.export.streamed.transposes import fold_transposes

__all__ = [
    "filled_on_the_way",
    "fold_transposes",
    "interface_without_weights",
    "lend_weights",
    "pretended",
]
