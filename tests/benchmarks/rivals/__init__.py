"""Published ways of cutting a model's depth, a file each, made anew from their papers.

They are here to be measured beside depthcut's own; :mod:`tests.benchmarks.bench_rivals` does so.
"""
