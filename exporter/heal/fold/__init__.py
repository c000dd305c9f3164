"""Folding: least squares whose result goes into weights that are there already.

In come a model, a plan and a text; out go changed weights of the kept branches' last products, and
of the embedding where nothing else reads it, so that nothing is added to the graph. A newcomer adds
a kind of product in ``places.py``, another fit in ``refit.py``.
"""
