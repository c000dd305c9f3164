"""Two models, measured under the same conditions: latency, accuracy, size."""

from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.compare.session import compare, evaluation_text

__all__ = ["CompareOptions", "QualityOptions", "TimingOptions", "compare", "evaluation_text"]
