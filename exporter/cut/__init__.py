"""ONNX file and plan to pruned ONNX file, and the oracle that verifies it.

In go an ONNX file, a :class:`~exporter.artifacts.plans.loaded.LoadedPlan` and
:class:`~exporter.cut.options.CutOptions`; out come the pruned file, its weights and prune.json, all
or nothing. The graph itself is cut by :func:`graph_passes.prune_graph`.
"""
