"""Distillation: the whole model teaches the cut one, and its kept weights change."""
