"""What a graph's sublayers cost: parameters, bytes, and milliseconds on an engine, as measured.

Importing this costs neither PyTorch nor a runtime.
"""

from exporter.costs.at import At
from exporter.costs.sizes import CacheSize, GraphSizes, SublayerSize, sizes
from exporter.costs.table import CostGroup, CostTable, MeasuredCandidate, Member, Trial

__all__ = [
    "At",
    "CacheSize",
    "CostGroup",
    "CostTable",
    "GraphSizes",
    "MeasuredCandidate",
    "Member",
    "SublayerSize",
    "Trial",
    "sizes",
]
