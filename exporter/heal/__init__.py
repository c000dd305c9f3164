"""What takes a deleted branch's place, fitted without training on calibration activations.

Importing this costs no PyTorch.
"""

from exporter.cut.branch_replacements import branch_replacements_of
from exporter.heal.fit import fit_branches
from exporter.heal.fits import Fit
from exporter.heal.healed import Healed, heal
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import write_healed_plan, write_replacements
from exporter.heal.sequential import fit_sequential

__all__ = [
    "Fit",
    "HealOptions",
    "Healed",
    "branch_replacements_of",
    "fit_branches",
    "fit_sequential",
    "heal",
    "write_healed_plan",
    "write_replacements",
]
