"""What becomes of a model's answers when branches are skipped or replaced, measured in PyTorch.

Importing this costs no PyTorch.
"""

from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
    branches_replaced,
    without_branches,
)
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import DamageMeter

__all__ = [
    "NOTHING",
    "BranchReplacement",
    "BranchReplacements",
    "Damage",
    "DamageMeter",
    "branches_replaced",
    "without_branches",
]
