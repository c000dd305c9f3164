"""What takes a deleted branch's place, fitted without training on calibration activations.

Importing this costs no PyTorch.
"""

from exporter.healing.fit import Fit, Name, fit_branches
from exporter.healing.healed import Healed, heal
from exporter.healing.options import HealOptions
from exporter.healing.plan_file import write_healed_plan, write_replacements
from exporter.healing.sequential import fit_sequential
from exporter.replacement_cut import cut_of_plan

__all__ = [
    "Fit",
    "HealOptions",
    "Healed",
    "Name",
    "cut_of_plan",
    "fit_branches",
    "fit_sequential",
    "heal",
    "write_healed_plan",
    "write_replacements",
]
