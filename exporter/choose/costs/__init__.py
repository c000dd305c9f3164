"""What a model's sublayers cost: parameters, bytes, and milliseconds on an engine, as measured.

Importing this costs neither PyTorch nor a runtime.
"""

from exporter.choose.costs.candidates import MeasuredSpeedup, measure_speedup
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.choose.costs.measuring import CostSettings, measure_costs, read_costs
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostGroup, CostTable, MeasuredCandidate, Member, Trial
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.weighing import sizes

__all__ = [
    "CacheSize",
    "CostGroup",
    "CostSettings",
    "CostTable",
    "Effort",
    "GraphSizes",
    "MeasuredCandidate",
    "MeasuredSpeedup",
    "Member",
    "RequestShape",
    "SublayerSize",
    "Trial",
    "measure_costs",
    "measure_speedup",
    "read_costs",
    "sizes",
]
