"""Makes up for dropped branches: replacements in their places, or new values of kept weights.

In come a model, a plan and calibration text; out go biases and linear maps, or weights that least
squares (``fold/``) or training (``distill/``) changed, with a report of what that gained. A
newcomer adds a kind of replacement in ``fit.py``. Importing this costs no PyTorch.
"""
