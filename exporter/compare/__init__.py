"""Two models, measured under the same conditions: latency, accuracy, size."""
