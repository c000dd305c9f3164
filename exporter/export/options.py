"""What an export can be told, and what it does where it isn't told."""

from __future__ import annotations

from typing import Literal

ExporterName = Literal["torch", "optimum"]

USUAL_ROOM = 4096
"""Positions of a cache where nobody says how many; texts of the model's own limit at most."""
