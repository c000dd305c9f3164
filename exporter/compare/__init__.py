"""Two models, measured under the same conditions: latency, accuracy, size.

In come two paths and how to measure (``options``); out comes a report. ``session`` opens the arms
(``kinds``), judges their answers (``accuracy``, ``quality/``, ``tasks/``) and times them in turns
(``latency``, ``timing/``). A measure of accuracy is a function in ``quality/``, called in
``accuracy``, and a field of :class:`exporter.artifacts.Accuracy`.
"""
