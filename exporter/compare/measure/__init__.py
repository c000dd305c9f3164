"""Measurements: latency, accuracy, the graph's size, the machine, and the statistics on them."""
