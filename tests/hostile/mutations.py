"""All ways to spoil a folder."""

from tests.hostile import (
    code_files,
    configs,
    folder_entries,
    graphs,
    odd_names,
    prepared,
    records,
    strangers,
    token_files,
    weights,
)
from tests.hostile.spoilt import KINDS, Mutation, Spoilt

__all__ = [
    "KINDS", "Mutation", "Spoilt", "code_files", "configs", "folder_entries", "graphs",
    "odd_names", "prepared", "records", "strangers", "token_files", "weights",
]  # fmt: skip
