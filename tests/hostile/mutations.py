"""All ways to spoil a folder."""

from tests.hostile import entries, files, graphs, weights
from tests.hostile.spoilt import KINDS, Mutation, Spoilt

__all__ = ["KINDS", "Mutation", "Spoilt", "entries", "files", "graphs", "weights"]
