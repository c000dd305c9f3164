"""Distillation: the whole model teaches the cut one, and its kept weights change.

In come a model, a plan and texts; out go changed weights, which are merged into those that the
model has, so that nothing is added to the graph. A newcomer adds a loss in ``loss.py``, another way
to train in ``student.py``.
"""
