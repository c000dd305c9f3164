"""Texts to tokens, read downwards: this is the way of ``--calibration`` and of ``--eval-text``."""
