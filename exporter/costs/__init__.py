"""What a model's sublayers cost: parameters, bytes, and milliseconds on an engine, as measured.

Importing this costs neither PyTorch nor a runtime.
"""

from exporter.costs.at import At
from exporter.costs.candidates import MeasuredSpeedup, measure_speedup
from exporter.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.costs.measuring import measure_costs, read_costs
from exporter.costs.onnx_sizes import sizes
from exporter.costs.table import CostGroup, CostTable, MeasuredCandidate, Member, Trial
from exporter.costs.timing import Effort

__all__ = [
    "At",
    "CacheSize",
    "CostGroup",
    "CostTable",
    "Effort",
    "GraphSizes",
    "MeasuredCandidate",
    "MeasuredSpeedup",
    "Member",
    "SublayerSize",
    "Trial",
    "measure_costs",
    "measure_speedup",
    "read_costs",
    "sizes",
]
